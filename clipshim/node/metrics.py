"""Prometheus metrics, made from the counts at the moment of the scrape."""

import logging
from collections.abc import Iterable, Iterator

import trio
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from clipshim.lazy.statistics import BUCKETS_S, Histogram
from clipshim.node.node import Node

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_S = 10.0
MAX_HTTP_REQUEST = 8192


class NodeCollector(Collector):
    """Reads a node when it is asked."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterable[Metric]:
        """All metrics of the node."""
        yield from self._events()
        yield from self._fetching()
        yield from self._store()

    def _events(self) -> Iterator[Metric]:
        node, events = self._node, self._node.events
        yield _counter("container_starts", "containers whose start succeeded", events.starts)
        failures = CounterMetricFamily(
            "clipshim_container_failures", "containers whose start failed", labels=["cause"]
        )
        for cause, count in events.failures.items():
            failures.add_metric([cause], count)
        yield failures
        yield _counter(
            "deleted_directory", "starts refused by runc for a directory without links",
            events.deleted_directory,
        )  # fmt: skip
        yield _counter("mounts", "trees mounted", node.trees.mounts)
        yield _counter("mount_failures", "trees that could not be mounted", node.trees.failures)
        yield _counter("unpacked", "images unpacked whole instead", events.unpacked)
        yield _counter("indexed", "images indexed on demand", events.indexed)
        yield _counter("indexing_seconds", "time spent indexing on demand", events.indexing_s)
        yield _counter("server_restarts", "servers that were replaced", node.restarts)
        yield _counter("keeper_restarts", "keepers that were replaced", node.keeper.keeper_deaths)
        trees = node.trees.trees.values()
        yield _gauge("trees", "trees mounted now", len(trees))
        yield _gauge("holds", "containers and mounts by hand", len(node.trees.in_use()))
        yield _gauge("open_layers", "layers whose index is open", node.layers.open_count())

    def _fetching(self) -> Iterator[Metric]:
        total = self._node.fetch_statistics()
        for name, count in total.counters().items():
            yield _counter(name, f"lazy loading: {name.replace('_', ' ')}", count)
        yield _histogram("read_seconds", "reads that reached the server", total.read_s)
        yield _histogram("fetch_seconds", "fetches of spans", total.fetch_s)
        retries = CounterMetricFamily(
            "clipshim_registry_retries", "registry requests tried again", labels=["cause"]
        )
        causes: dict[str, int] = {}
        for statistics in self._node.registry_statistics():
            found = statistics.get("retries")
            if isinstance(found, dict):
                for cause, count in found.items():
                    causes[str(cause)] = causes.get(str(cause), 0) + int(count)
        for cause, count in causes.items():
            retries.add_metric([cause], count)
        yield retries
        open_breakers = len(self._node.fetching.open_breakers())
        yield _gauge("registries_not_answering", "registries held back now", open_breakers)

    def _store(self) -> Iterator[Metric]:
        store = self._node.store.statistics()
        yield _gauge("cache_layers", "layers in the store", store.layers)
        yield _gauge("cache_used_bytes", "bytes of spans in the store", store.used_bytes)
        yield _gauge("cache_limit_bytes", "bound of the store", store.limit_bytes)
        yield _counter("cache_evicted_bytes", "bytes evicted", store.evicted_bytes)
        yield _counter("cache_full", "spans not kept for lack of room", store.full)
        yield _counter("cache_resets", "layers found corrupt", store.resets)


def metrics_text(node: Node) -> str:
    """The text that Prometheus reads."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(NodeCollector(node))
    return generate_latest(registry).decode()


async def serve_http(node: Node, address: str) -> None:
    """Serves GET /metrics on `host:port`. Raises OSError if it cannot listen there."""
    host, _, port = address.rpartition(":")
    listeners = await trio.open_tcp_listeners(int(port), host=host.strip("[]"))

    async def answer(stream: trio.SocketStream) -> None:
        request = b""
        with trio.move_on_after(REQUEST_S):
            while b"\r\n\r\n" not in request and len(request) < MAX_HTTP_REQUEST:
                part = await stream.receive_some(MAX_HTTP_REQUEST)
                if not part:
                    return
                request += part
            await stream.send_all(_response(node, request))

    async def guarded(stream: trio.SocketStream) -> None:
        try:
            await answer(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        except Exception:  # what goes wrong in a scrape must not end the server
            log.exception("metrics")
        finally:
            await trio.aclose_forcefully(stream)

    await trio.serve_listeners(guarded, listeners)


def _response(node: Node, request: bytes) -> bytes:
    if request.startswith((b"GET /metrics ", b"GET /metrics?")):
        body = metrics_text(node).encode()
        status = "200 OK"
    else:
        body, status = b"see /metrics\n", "404 Not Found"
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"clipshim_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"clipshim_{name}", text, value=value)


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    buckets = []
    running = 0
    for bound, count in zip([*map(str, BUCKETS_S), "+Inf"], histogram.counts, strict=True):
        running += count
        buckets.append((bound, running))
    return HistogramMetricFamily(
        f"clipshim_{name}", text, buckets=buckets, sum_value=histogram.sum_s
    )

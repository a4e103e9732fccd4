"""Dead servers: how long they are waited for, and when they are asked again."""

from __future__ import annotations

import socket
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from clipshim.errors import RegistryError
from clipshim.registry import health
from clipshim.registry.access import RegistryAccess
from clipshim.registry.attempts import AttemptFailed
from clipshim.registry.blobs import BlobReader, RegistryBlob
from clipshim.registry.embedded_server import EmbeddedRegistry
from clipshim.registry.health import ServerHealth
from clipshim.registry.mirrors import Endpoint
from clipshim.registry.references import parse_reference
from clipshim.registry.sources import fetch_manifest
from tests.support.fault_proxy import Fault, FaultProxy
from tests.unit.registry.layouts import Layout, digest_of, layer_tar, some_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONTENT = some_bytes(300_000)
DIGEST = digest_of(CONTENT)
NEVER_S = 3600.0  # a test that waits for a dead server as long as that has failed
A_WHILE_S = 120.0
STALLS = (Fault("stall-headers"), Fault("stall"), Fault("drip-headers"), Fault("drip"))


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    layout = Layout(tmp_path_factory.mktemp("layout") / "l")
    layout.blob(CONTENT)
    layout.tag(layout.image(layer_tar("a", b"a")))
    with EmbeddedRegistry({"app": str(layout.path)}) as registry:
        yield registry.address


@pytest.fixture
def proxy(upstream: str) -> Iterator[FaultProxy]:
    with FaultProxy(upstream) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PATIENCE_S", 0.3)
    monkeypatch.setattr(health, "FIRST_AVOIDED_S", NEVER_S)
    monkeypatch.setattr(health, "LONGEST_AVOIDED_S", NEVER_S)


def access_over(directory: Path, origin: str, *mirrors: str) -> RegistryAccess:
    host, port = origin.split(":")
    hosts = directory / f"{host}_{port}_"
    hosts.mkdir()
    text = f'server = "http://{origin}"\n'
    text += "".join(f'[host."http://{mirror}"]\n' for mirror in mirrors)
    (hosts / "hosts.toml").write_text(text)
    return RegistryAccess(
        anonymous=True,
        certs_dir=str(directory),
        connect_timeout_s=NEVER_S,
        read_timeout_s=NEVER_S,
        deadline_s=A_WHILE_S,
    )


@pytest.fixture
def deaf() -> Iterator[str]:
    """A server whose queue is full, so that connections to it do not come about."""
    with closing(socket.socket()) as listener, closing(socket.socket()) as first:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        first.connect(listener.getsockname())
        more = []
        for _ in range(4):
            other = socket.socket()
            other.setblocking(False)
            other.connect_ex(listener.getsockname())
            more.append(other)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        for other in more:
            other.close()


def blob_at(host: str) -> RegistryBlob:
    return RegistryBlob(parse_reference(f"{host}/app:1"), DIGEST, len(CONTENT))


def read(reader: BlobReader, host: str, start: int) -> None:
    got = reader.read_range(blob_at(host), start, 1000, deadline=time.monotonic() + A_WHILE_S)
    assert got == CONTENT[start : start + 1000]


@pytest.mark.parametrize("fault", STALLS, ids=lambda fault: fault.kind)
def test_a_mirror_that_keeps_silent_is_soon_left_and_then_asked_last(
    proxy: FaultProxy, upstream: str, tmp_path: Path, fault: Fault
) -> None:
    access = access_over(tmp_path, upstream, proxy.host)
    reader = BlobReader(access, transport=access.transport)
    proxy.inject(fault, times=1_000_000)
    for start in range(0, 10_000, 1000):
        read(reader, upstream, start)
    assert len(proxy.requests) == 1
    access.transport.close()


def test_a_mirror_that_takes_no_connection_is_soon_left(
    upstream: str, deaf: str, tmp_path: Path
) -> None:
    access = access_over(tmp_path, upstream, deaf)
    reader = BlobReader(access, transport=access.transport)
    read(reader, upstream, 0)
    assert access.transport.health.is_avoided(f"http://{deaf}/v2")
    access.transport.close()


def test_manifests_and_streams_come_from_the_next_server_too(
    proxy: FaultProxy, upstream: str, tmp_path: Path
) -> None:
    access = access_over(tmp_path, upstream, proxy.host)
    proxy.inject(Fault("stall-headers"), match="GET", times=1_000_000)
    assert fetch_manifest(access, parse_reference(f"{upstream}/app:1")).raw
    access.transport.health.answered(f"http://{proxy.host}/v2")
    reader = BlobReader(access, transport=access.transport)
    with reader.open_stream(blob_at(upstream)) as stream:
        assert stream.read() == CONTENT
    assert len(proxy.requests) == 2
    access.transport.close()


def test_a_stream_whose_mirror_stalls_goes_on_at_the_next_server(
    proxy: FaultProxy, upstream: str, tmp_path: Path
) -> None:
    access = access_over(tmp_path, upstream, proxy.host)
    proxy.inject(Fault("stall", after=5000), times=1)
    proxy.inject(Fault("stall"), times=1_000_000)
    reader = BlobReader(access)
    with reader.open_stream(blob_at(upstream)) as stream:
        assert stream.read() == CONTENT
    assert len(proxy.requests) == 2
    reader.close()


def test_a_server_is_waited_for_where_there_is_no_other(
    proxy: FaultProxy, upstream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer takes longer than any patience."""
    monkeypatch.setattr(health, "PATIENCE_S", 1e-6)
    access = RegistryAccess(anonymous=True)
    reader = BlobReader(access)
    read(reader, proxy.host, 0)
    assert reader.statistics()["retries"] == {}
    reader.close()


def test_a_slow_mirror_serves_when_the_registry_is_dead(
    proxy: FaultProxy, upstream: str, deaf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both keep silent longer than the patience; then the one that is alive gets its time."""
    monkeypatch.setattr(health, "PATIENCE_S", 1e-6)
    access = access_over(tmp_path, deaf, proxy.host)
    reader = BlobReader(
        RegistryAccess(anonymous=True, certs_dir=access.certs_dir, connect_timeout_s=0.5)
    )
    read(reader, deaf, 0)
    read(reader, deaf, 1000)
    reader.close()


def test_a_caller_that_is_in_a_hurry_gets_an_error_instead_of_waiting(
    proxy: FaultProxy, tmp_path: Path
) -> None:
    access = RegistryAccess(anonymous=True, read_timeout_s=NEVER_S)
    reader = BlobReader(access)
    proxy.inject(Fault("stall"), times=1_000_000)
    with pytest.raises(RegistryError, match="no byte"):
        reader.read_range(
            blob_at(proxy.host), 0, 10, deadline=time.monotonic() + NEVER_S, hurried=True
        )
    assert len(proxy.requests) == 1
    reader.close()


def test_a_silent_server_is_tried_again_by_one_caller_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "PATIENCE_S", NEVER_S)
    a, b = Endpoint("http://a/v2", "a"), Endpoint("http://b/v2", "b")
    nothing: frozenset[str] = frozenset()
    known = ServerHealth()
    known.kept_silent(a.base)
    assert known.is_avoided(a.base)
    assert known.in_order([a, b], nothing) == [b, a]
    monkeypatch.setattr(health, "FIRST_AVOIDED_S", 0.0)
    known.answered(a.base)
    known.kept_silent(a.base)
    assert known.in_order([a, b], nothing) == [a, b]
    assert known.in_order([a, b], nothing) == [b, a]
    known.answered(a.base)
    assert known.in_order([a, b], nothing) == [a, b]


def test_liars_come_after_the_silent() -> None:
    a, b, c = (Endpoint(f"http://{name}/v2", name) for name in "abc")
    known = ServerHealth()
    known.kept_silent(b.base)
    assert known.in_order([a, b, c], frozenset({a.base})) == [c, b, a]


def test_an_answer_of_any_kind_is_no_silence() -> None:
    known = ServerHealth()
    known.kept_silent("a")
    known.failed("a", AttemptFailed("server-error", "500", retryable=True, status=500), 60.0)
    assert not known.is_avoided("a")
    # the caller's own deadline was over at once
    known.failed("a", AttemptFailed("stall", "", retryable=True), 0.0)
    assert not known.is_avoided("a")
    known.failed("a", AttemptFailed("refused", "", retryable=True), 0.0)
    assert known.is_avoided("a")


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MAX_SERVERS", 3)
    known = ServerHealth()
    for number in range(10):
        known.kept_silent(str(number))
    assert [number for number in range(10) if known.is_avoided(str(number))] == [7, 8, 9]


@pytest.mark.parametrize("capability", ["pull", "resolve", "push"])
def test_only_who_reads_is_impatient(tmp_path: Path, capability: str) -> None:
    access = access_over(tmp_path, "127.0.0.1:9", "127.0.0.1:8")
    asked: list[float] = []

    def operation(endpoint: Endpoint) -> None:
        asked.append(endpoint.patience_s)
        if len(asked) == 1:
            raise AttemptFailed("protocol", "", retryable=False)

    reference = parse_reference("127.0.0.1:9/app:1")
    access.transport.exchange(reference, operation, capability=capability, what="test")
    never = float("inf")
    assert asked == [never if capability == "push" else health.PATIENCE_S, never]

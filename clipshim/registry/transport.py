"""HTTP to registries: pools, log-in, redirects, mirrors in order, retries inside a deadline.

One Transport serves all threads. `send` is one attempt at one server, `exchange` is an operation
with all its attempts at all servers. What the bytes mean and whether they are right is for the
caller. Proxies are taken from HTTP_PROXY, HTTPS_PROXY and NO_PROXY; loopback is never proxied.
"""

from __future__ import annotations

import contextlib
import logging
import random
import ssl
import threading
import time
import urllib.request
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlencode, urlsplit

import urllib3
import urllib3.exceptions

from clipshim.errors import ConfigError, RegistryError
from clipshim.registry import health
from clipshim.registry.attempts import (
    UNAUTHORIZED,
    AttemptFailed,
    Statistics,
    final_error,
)
from clipshim.registry.health import ServerHealth
from clipshim.registry.mirrors import Endpoint, endpoints_for
from clipshim.registry.references import is_loopback, split_port
from clipshim.registry.replies import Reply, drain, read_body, refusal, released, transport_failure
from clipshim.registry.tokens import MAX_TOKEN_BYTES, Authorizer
from clipshim.registry.urls import join_url, parse_url, same_origin
from clipshim.registry.watchdog import POOL_CLASSES, bounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import IO

    from urllib3.response import BaseHTTPResponse

    from clipshim.registry.access import RegistryAccess
    from clipshim.registry.references import Reference
    from clipshim.registry.tokens import Grant

log = logging.getLogger(__name__)

T = TypeVar("T")

USER_AGENT = "clipshim/1"
MAX_REDIRECTS = 5
NOTE_EVERY_S = 30.0
MAX_NOTED = 1000
MAX_REGISTRIES = 1000
MAX_REDIRECT_FAILURES = 5  # in a row at one server: then its redirects do not work at all
MAX_LOGINS = 3
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0
ENDPOINTS_LIFE_S = 30.0  # how long a change in certs.d may go unnoticed


class Transport:
    """Connections, tokens and mirrors under one RegistryAccess."""

    def __init__(self, access: RegistryAccess) -> None:
        self.access = access
        self.authorizer = Authorizer(access)
        self.statistics = Statistics()
        self.health = ServerHealth()
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._noted: dict[tuple[str, str], float] = {}  # when to log a server's trouble again
        self._pools: dict[object, urllib3.PoolManager] = {}
        self._endpoints: dict[str, tuple[float, tuple[Endpoint, ...]]] = {}
        self._closing = threading.Event()

    def close(self) -> None:
        """Wakes every waiting thread with an error and closes idle connections."""
        self._closing.set()
        with self._lock:
            pools, self._pools = list(self._pools.values()), {}
        for pool in pools:
            pool.clear()

    def endpoints(self, reference: Reference, capability: str) -> tuple[Endpoint, ...]:
        """The servers to ask, in order. Raises ConfigError."""
        now = time.monotonic()
        with self._lock:
            known = self._endpoints.get(reference.registry)
        if known is None or known[0] < now:
            found = endpoints_for(reference, self.access)
            known = (now + ENDPOINTS_LIFE_S, found)
            with self._lock:
                if len(self._endpoints) >= MAX_REGISTRIES:
                    self._endpoints.clear()  # they are only read again
                self._endpoints[reference.registry] = known
        return tuple(item for item in known[1] if capability in item.capabilities)

    def exchange(
        self,
        reference: Reference,
        operation: Callable[[Endpoint], T],
        *,
        capability: str,
        what: str,
        deadline: float | None = None,
        attempts: int | None = None,
        statistics: Statistics | None = None,
        last_resort: tuple[Endpoint, ...] = (),
        distrusted: frozenset[str] = frozenset(),
        hurried: bool = False,
    ) -> T:
        """What `operation` returns at the first server where it does not raise AttemptFailed.

        Servers are asked in order, again and again with growing jittered pauses while one of them
        may recover, until `deadline` (monotonic) or `attempts` rounds. `what` begins the message
        of the error: RegistryError, AuthError or RegistryNotFoundError. `last_resort` comes after
        the registry's own servers, servers whose base is in `distrusted` after all others, and
        before them those that kept silent lately. `hurried`: the caller has somewhere else to go,
        so each server is asked once, and not waited for if it keeps silent.
        """
        counters = statistics or self.statistics
        if deadline is None:
            deadline = time.monotonic() + self.access.deadline_s
        order = [*self.endpoints(reference, capability), *last_resort]
        if not order:
            raise RegistryError(f"{what}: no server of {reference.registry} may {capability}")
        live = self.health.in_order(order, distrusted)
        failed: dict[str, AttemptFailed] = {}
        redirect_failures = 0
        rounds = 0  # since the last progress
        total = 0
        while True:
            progressed = False
            to_ask = list(live)
            while to_ask:
                endpoint = to_ask.pop(0)
                self._check_open(what)
                others = [item for item in to_ask if item.base not in distrusted]
                elsewhere = any(not self.health.is_avoided(item.base) for item in others)
                # a push that was not waited for may have come through all the same
                if capability != "push" and (hurried or elsewhere):
                    endpoint = replace(endpoint, patience_s=health.PATIENCE_S)
                began = time.monotonic()
                try:
                    result = operation(endpoint)
                except AttemptFailed as failure:
                    self.health.failed(endpoint.base, failure, time.monotonic() - began)
                    if failure.cause != "deadline" or endpoint.base not in failed:
                        failed[endpoint.base] = failure  # the trouble before tells more
                    progressed = progressed or failure.progressed
                    redirect_failures += failure.cause == "redirect"
                    if not failure.retryable or redirect_failures >= MAX_REDIRECT_FAILURES:
                        live.remove(endpoint)
                    counters.add_retry(failure.cause)
                    # debug: who asked says what it came to; many may ask a server that is dead
                    log.debug("%s: %s: %s", what, endpoint.host, failure.message)
                    self._note(endpoint.host, failure)
                else:
                    self.health.answered(endpoint.base)
                    return result
                if time.monotonic() >= deadline:
                    break
            total += 1
            rounds = 1 if progressed else rounds + 1
            now = time.monotonic()
            delay = _backoff_s(rounds)
            wishes = [failed[item.base].retry_after or 0.0 for item in live if item.base in failed]
            delay = max(delay, min(wishes, default=0.0))
            over = now + delay >= deadline
            hurried = hurried and not progressed
            if not live or over or hurried or (attempts is not None and rounds >= attempts):
                counters.add_failure()
                said = [(item, failed[item.base]) for item in order if item.base in failed]
                note = f" (gave up after {total} attempts)" if live and total > 1 else ""
                raise final_error(what, said, note=note) from said[-1][1]
            self._closing.wait(delay)

    def _note(self, host: str, failure: AttemptFailed) -> None:
        """One line a server, cause and NOTE_EVERY_S."""
        now = time.monotonic()
        key = (host, failure.cause)
        with self._lock:
            if now < self._noted.get(key, 0.0):
                return
            if len(self._noted) > MAX_NOTED:
                self._noted.clear()
            self._noted[key] = now + NOTE_EVERY_S
        log.info("%s: %s, trying again or elsewhere", host, failure.message)

    @contextlib.contextmanager
    def send(
        self,
        endpoint: Endpoint,
        reference: Reference,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | Callable[[], IO[bytes]] | None = None,
        actions: str = "pull",
        deadline: float,
        accept: tuple[int, ...] = (200,),
        url: str | None = None,
        statistics: Statistics | None = None,
    ) -> Iterator[Reply]:
        """One attempt: logs in where asked to, follows redirects; the body is still to be read.

        `path` follows /v2/ (or `url` is absolute, for upload sessions). A status that is not in
        `accept` raises AttemptFailed, as does every transport trouble, also inside the `with`.
        `reply.url` tells where redirects led. The connection goes back to its pool if the
        body was read to its end, else it is closed.
        """
        target = url or f"{endpoint.base}/{path}"
        if endpoint.namespace is not None and url is None:
            target += f"{'&' if '?' in target else '?'}{urlencode({'ns': endpoint.namespace})}"
        reply = self._authorized(
            endpoint,
            reference,
            method,
            target,
            dict(headers or {}),
            body,
            actions,
            deadline,
            statistics or self.statistics,
        )
        with released(reply):
            if reply.status not in accept:
                raise refusal(reply)
            yield reply

    @contextlib.contextmanager
    def fetch_url(
        self,
        url: str,
        *,
        headers: Mapping[str, str],
        deadline: float,
        endpoint: Endpoint | None = None,
        accept: tuple[int, ...] = (200,),
        statistics: Statistics | None = None,
        patience_s: float = float("inf"),
    ) -> Iterator[Reply]:
        """One GET of a URL that is no registry API: a remembered redirect, a foreign layer.

        No credentials are sent. Raises AttemptFailed as `send` does.
        """
        counters = statistics or self.statistics
        reply = self._redirected(
            endpoint, "GET", url, dict(headers), None, None, deadline, counters, patience_s
        )
        reply = replace(reply, moved=True)
        with released(reply):
            if reply.status not in accept:
                raise refusal(reply)
            yield reply

    def _authorized(
        self,
        endpoint: Endpoint,
        reference: Reference,
        method: str,
        url: str,
        headers: dict[str, str],
        body: bytes | Callable[[], IO[bytes]] | None,
        actions: str,
        deadline: float,
        statistics: Statistics,
    ) -> Reply:
        repository = reference.repository
        grant = self.authorizer.current(endpoint, repository, actions)
        for login in range(MAX_LOGINS + 1):
            reply = self._redirected(
                endpoint, method, url, headers, body, grant, deadline, statistics,
                endpoint.patience_s,
            )  # fmt: skip
            renewable = reply.status == 401 or (
                # Some registries (ECR) say 403 when a log-in has expired.
                reply.status == 403 and grant is not None and login == 0
            )
            if reply.moved or not renewable or login == MAX_LOGINS:
                return reply
            challenges = reply.response.headers.getlist("WWW-Authenticate")
            with released(reply):
                drain(reply)
            if reply.status == 403:
                assert grant is not None
                self.authorizer.forget(endpoint, repository, actions, grant)
                grant = None
                continue
            fresh = self.authorizer.renew(
                endpoint, reference, actions, challenges, grant,
                lambda *args: self._token_request(endpoint, *args, deadline=deadline),
            )  # fmt: skip
            if grant is not None and fresh.header == grant.header:
                raise AttemptFailed(
                    UNAUTHORIZED, "the credentials were refused", retryable=False, status=401
                )
            grant = fresh
        raise AssertionError("unreachable")

    def _token_request(
        self,
        endpoint: Endpoint,
        method: str,
        url: str,
        headers: dict[str, str],
        body: bytes | None,
        *,
        deadline: float,
    ) -> tuple[int, bytes]:
        # The TLS options of the registry hold for its own token server only.
        own = endpoint if urlsplit(url).netloc == endpoint.host else None
        reply = self._redirected(
            own, method, url, headers, body, None, deadline, self.statistics, endpoint.patience_s
        )
        with released(reply):
            return reply.status, read_body(reply, MAX_TOKEN_BYTES, deadline)

    def _redirected(
        self,
        endpoint: Endpoint | None,
        method: str,
        url: str,
        headers: dict[str, str],
        body: bytes | Callable[[], IO[bytes]] | None,
        grant: Grant | None,
        deadline: float,
        statistics: Statistics,
        patience_s: float,
    ) -> Reply:
        origin = url
        for _ in range(MAX_REDIRECTS + 1):
            at_home = same_origin(url, origin)
            sent = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
            if at_home and endpoint is not None:
                sent |= endpoint.headers
            sent |= headers
            if not at_home:
                # A CDN gets neither our log-in nor headers meant for the registry.
                sent.pop("Authorization", None)
            elif grant is not None:
                sent["Authorization"] = grant.header
            response = self._raw(
                endpoint if at_home else None, method, url, sent, body, deadline, statistics,
                patience_s,
            )  # fmt: skip
            reply = Reply(response, url, not at_home, patience_s)
            location = reply.headers.get("Location")
            if reply.status not in (301, 302, 303, 307, 308) or not location:
                return reply
            with released(reply):
                drain(reply)
            url = self._redirect_target(method, url, location)
        raise AttemptFailed("redirect", f"more than {MAX_REDIRECTS} redirects", retryable=False)

    def _redirect_target(self, method: str, url: str, location: str) -> str:
        if method not in ("GET", "HEAD"):
            raise AttemptFailed("redirect", f"{method} was redirected", retryable=False)
        target = join_url(url, location)
        parts = parse_url(target or "")
        if target is None or parts is None:
            raise AttemptFailed("redirect", f"redirect to {location[:200]!r}", retryable=False)
        plain = parts.scheme == "http" and not self.may_be_plain(parts.netloc)
        if plain and urlsplit(url).scheme == "https":
            raise AttemptFailed(
                "redirect", f"redirect from TLS to plain http at {parts.netloc}", retryable=False
            )
        return target

    def may_be_plain(self, host: str) -> bool:
        """Whether host[:port] may be spoken to without TLS."""
        allowed = self.access.plain_http
        return is_loopback(host) or host in allowed or split_port(host)[0] in allowed

    def _raw(
        self,
        endpoint: Endpoint | None,
        method: str,
        url: str,
        headers: dict[str, str],
        body: bytes | Callable[[], IO[bytes]] | None,
        deadline: float,
        statistics: Statistics,
        patience_s: float,
    ) -> BaseHTTPResponse:
        left = deadline - time.monotonic()
        if left <= 0:
            raise AttemptFailed("deadline", "no time is left", retryable=True)
        connect_s = min(self.access.connect_timeout_s, left, patience_s)
        response_s = min(self.access.read_timeout_s, left, patience_s)
        timeout = urllib3.Timeout(connect=connect_s, read=response_s)
        statistics.add_request()
        with contextlib.ExitStack() as stack:
            data: object = body
            if callable(body):
                data = stack.enter_context(body())
            handshake_s = min(left, patience_s)
            stack.enter_context(bounded(connect_s=handshake_s, response_s=response_s))
            try:
                return self._pool(endpoint, url).urlopen(
                    method,
                    url,
                    body=data,
                    headers=headers,
                    timeout=timeout,
                    retries=False,
                    redirect=False,
                    preload_content=False,
                    decode_content=False,
                )
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as exc:
                raise transport_failure(exc) from exc

    def _pool(self, endpoint: Endpoint | None, url: str) -> urllib3.PoolManager:
        parts = urlsplit(url)
        proxy = _proxy_for(parts.scheme, parts.hostname or "")
        tls = (
            (endpoint.ca_files, endpoint.client_certs, endpoint.skip_verify)
            if endpoint is not None
            else None
        )
        key = (proxy, tls)
        with self._lock:
            pool = self._pools.get(key)
        if pool is not None:
            return pool
        with self._making:  # reading all certificates takes 20 ms, and many may ask at first
            with self._lock:
                pool = self._pools.get(key)
            if pool is None:
                pool = self._make_pool(endpoint, proxy)
                with self._lock:
                    self._pools[key] = pool
        return pool

    def _make_pool(self, endpoint: Endpoint | None, proxy: str | None) -> urllib3.PoolManager:
        context = ssl.create_default_context()
        try:
            if self.access.ca_file:
                context.load_verify_locations(self.access.ca_file)
            for path in endpoint.ca_files if endpoint is not None else ():
                context.load_verify_locations(path)
            for certificate, key in endpoint.client_certs if endpoint is not None else ():
                context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as exc:
            raise ConfigError(f"certificates for a registry cannot be read: {exc}") from exc
        options: dict[str, object] = {"num_pools": 64, "maxsize": 32, "ssl_context": context}
        if self.access.insecure or (endpoint is not None and endpoint.skip_verify):
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            options["cert_reqs"] = "CERT_NONE"
            options["assert_hostname"] = False
            # The user asked for it: no warning per connection.
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        if proxy is None:
            pool = urllib3.PoolManager(**options)  # type: ignore[arg-type]
            pool.pool_classes_by_scheme = dict(POOL_CLASSES)
            return pool
        login = urlsplit(proxy)
        if login.username:
            credentials = f"{login.username}:{login.password or ''}"
            options["proxy_headers"] = urllib3.make_headers(proxy_basic_auth=credentials)
        proxied = urllib3.ProxyManager(proxy, **options)  # type: ignore[arg-type]
        proxied.pool_classes_by_scheme = dict(POOL_CLASSES)
        return proxied

    def pause(self, rounds: int, what: str) -> None:
        """Waits as long as `exchange` does after `rounds` failures; close() ends it."""
        self._closing.wait(_backoff_s(rounds))
        self._check_open(what)

    def _check_open(self, what: str) -> None:
        if self._closing.is_set():
            raise RegistryError(f"{what}: the connection to registries was shut down")


def _backoff_s(rounds: int) -> float:
    longest = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(rounds - 1, 16))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret


def _proxy_for(scheme: str, host: str) -> str | None:
    if is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies_environment()
    proxy = proxies.get(scheme) or proxies.get("all")
    if not proxy:
        return None
    return proxy if "://" in proxy else f"http://{proxy}"

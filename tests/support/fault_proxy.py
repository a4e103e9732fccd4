"""An HTTP proxy that misbehaves on request, in front of a registry, for tests.

    with FaultProxy(registry.host) as proxy:
        proxy.inject(Fault("reset", after=1000), times=2)   # the next two blob GETs
        ... read from proxy.host ...
        proxy.requests                                      # what clients asked, in order

It also plays the CDN that a registry redirects to (`redirect_to_cdn`) and the token server that a
registry sends clients to (`require_tokens`). All of it listens on loopback only; nothing waits
longer than until close().
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Kind = Literal[
    "status",  # answer `status` with `headers` and nothing else
    "reset",  # RST after `after` bytes of the body
    "close",  # FIN after `after` bytes of the body
    "stall",  # nothing more after `after` bytes, until the proxy closes
    "drip",  # after `after` bytes one byte now and then
    "short",  # a body that is declared and sent `after` bytes shorter than its Content-Range
    "long",  # a body with `after` bytes too many, declared so
    "wrong-bytes",  # right length, other bytes
    "wrong-range",  # a Content-Range that begins elsewhere
    "ignore-range",  # 200 with the whole body
    "stall-headers",  # no answer at all
    "drip-headers",  # headers that never end, a byte now and then
]
DRIP_PERIOD_S = 0.05
UPSTREAM_TIMEOUT_S = 120.0
BLOB_GET = r"GET /v2/.*/blobs/sha256:"


@dataclass(frozen=True)
class Fault:
    """One way to misbehave."""

    kind: Kind
    after: int = 0
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One request as it arrived. `at` is "registry", "cdn" or "token"."""

    at: str
    method: str
    path: str
    headers: Mapping[str, str]

    @property
    def authorization(self) -> str | None:
        """The header, if it was sent."""
        return self.headers.get("authorization")


@dataclass
class _Rule:
    fault: Fault
    match: re.Pattern[str]
    times: int


class FaultProxy:
    """Forwards to `upstream` (host:port) but for what is injected. A context manager."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._requests: list[Request] = []
        self._bytes = 0
        self._rules: list[_Rule] = []
        self._redirecting = False
        self.tokens_wanted = False
        self._signatures: set[str] = set()
        self._signature_number = 0
        self._tokens: set[str] = set()
        self._token_number = 0
        self._token_life_s: int | None = None
        self._users: dict[str, str] | None = None
        self._servers = {"registry": _Server(self, "registry"), "cdn": _Server(self, "cdn")}

    def __enter__(self) -> FaultProxy:
        for server in self._servers.values():
            server.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self._servers.values():
            server.end()

    # What tests look at

    @property
    def host(self) -> str:
        """host:port of the registry as clients see it."""
        return self._servers["registry"].host

    @property
    def cdn_host(self) -> str:
        """host:port of the CDN."""
        return self._servers["cdn"].host

    @property
    def requests(self) -> list[Request]:
        """Everything asked so far, in order."""
        with self._lock:
            return list(self._requests)

    @property
    def body_bytes(self) -> int:
        """Bytes of bodies sent so far."""
        with self._lock:
            return self._bytes

    # What tests arrange

    def inject(self, fault: Fault, *, match: str = BLOB_GET, times: int = 1) -> None:
        """Makes the next `times` requests whose "METHOD PATH" matches fail so. Rules queue up."""
        with self._lock:
            self._rules.append(_Rule(fault, re.compile(match), times))

    def clear(self) -> None:
        """Forgets what was injected and not used yet."""
        with self._lock:
            self._rules.clear()

    def redirect_to_cdn(self) -> None:
        """Blob GETs are answered with 307 to the CDN, with a signature that can expire."""
        self._redirecting = True

    def expire_signatures(self) -> None:
        """The CDN answers 403 to all URLs handed out so far."""
        with self._lock:
            self._signatures.clear()

    def require_tokens(
        self, *, users: dict[str, str] | None = None, life_s: int | None = 300
    ) -> None:
        """Everything wants a Bearer token; `users` are who may have one (None: everybody)."""
        self._users = users
        self._token_life_s = life_s
        self.tokens_wanted = True

    def expire_tokens(self) -> None:
        """All tokens handed out so far are refused."""
        with self._lock:
            self._tokens.clear()

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Connections are refused inside the `with`, and taken again at the same port after."""
        server = self._servers["registry"]
        port = server.server_address[1]
        server.end()
        try:
            yield
        finally:
            again = _Server(self, "registry", port=int(port))
            self._servers["registry"] = again
            again.begin()

    # What the handler asks

    def record(self, request: Request) -> Fault | None:
        """Notes a request; returns how to misbehave."""
        line = f"{request.method} {request.path}"
        with self._lock:
            self._requests.append(request)
            for rule in self._rules:
                if rule.times > 0 and rule.match.match(line):
                    rule.times -= 1
                    return rule.fault
        return None

    def count_bytes(self, count: int) -> None:
        """Counts what was sent."""
        with self._lock:
            self._bytes += count

    def sign(self, path: str) -> str | None:
        """A CDN URL for a path, if redirects are on."""
        if not self._redirecting:
            return None
        with self._lock:
            self._signature_number += 1
            signature = f"s{self._signature_number}"
            self._signatures.add(signature)
        return f"http://{self.cdn_host}{path}?sig={signature}"

    def is_signed(self, path: str) -> bool:
        """Whether a CDN URL is good."""
        signature = parse_qs(urlsplit(path).query).get("sig", [""])[0]
        with self._lock:
            return signature in self._signatures

    def is_authorized(self, request: Request) -> bool:
        """Whether a request carries a good token, if it needs one."""
        if not self.tokens_wanted:
            return True
        header = request.authorization or ""
        with self._lock:
            return header.removeprefix("Bearer ") in self._tokens

    def make_token(self, request: Request) -> dict[str, Any] | None:
        """A token for who asks, None if they may not."""
        if self._users is not None:
            header = (request.authorization or "").removeprefix("Basic ")
            name, _, password = base64.b64decode(header).decode().partition(":")
            if self._users.get(name) != password:
                return None
        with self._lock:
            self._token_number += 1
            token = f"t{self._token_number}"
            self._tokens.add(token)
        answer: dict[str, Any] = {"token": token}
        if self._token_life_s is not None:
            answer["expires_in"] = self._token_life_s
        return answer


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, proxy: FaultProxy, role: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.proxy = proxy
        self.role = role
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name=f"fault {role}", daemon=True)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Stops listening and drops every connection."""
        self.shutdown()
        self.server_close()
        self._thread.join()
        with self._open_lock:
            connections = list(self._open)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what the tests are about."""

    def _serve(self) -> None:
        self.serve_forever(poll_interval=0.05)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    @property
    def _proxy(self) -> FaultProxy:
        return cast("_Server", self.server).proxy

    def _handle(self) -> None:
        role = cast("_Server", self.server).role
        if self.path.startswith("/token"):
            role = "token"
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(role, self.command, self.path, headers)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self._proxy.record(request)
        if fault is not None and fault.kind == "status":
            self._plain(fault.status, dict(fault.headers))
            return
        if fault is not None and fault.kind == "stall-headers":
            self._proxy.closing.wait()
            self.close_connection = True
            return
        if fault is not None and fault.kind == "drip-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
            while not self._proxy.closing.wait(DRIP_PERIOD_S):
                self.wfile.write(b"x")
            self.close_connection = True
            return
        if role == "token":
            answer = self._proxy.make_token(request)
            raw = b"" if answer is None else json.dumps(answer).encode()
            self._plain(401 if answer is None else 200, {"Content-Type": "application/json"}, raw)
            return
        if role == "cdn":
            if not self._proxy.is_signed(self.path):
                self._plain(403, {})
                return
        elif not self._proxy.is_authorized(request):
            found = re.match(r"/v2/(.+?)/(?:blobs|manifests|referrers)/", self.path)
            scope = f',scope="repository:{found[1]}:pull"' if found else ""
            realm = f"http://{self._proxy.host}/token"
            self._plain(401, {"WWW-Authenticate": f'Bearer realm="{realm}",service="test"{scope}'})
            return
        elif self.command == "GET" and "/blobs/sha256:" in self.path:
            target = self._proxy.sign(self.path)
            if target is not None:
                self._plain(307, {"Location": target})
                return
        self._forward(request, body, fault)

    def _forward(self, request: Request, body: bytes, fault: Fault | None) -> None:
        skipped = {"host", "connection", "authorization"}
        if not self._proxy.tokens_wanted:
            skipped.discard("authorization")
        if fault is not None and fault.kind == "ignore-range":
            skipped.add("range")
        headers = {name: value for name, value in request.headers.items() if name not in skipped}
        host, _, port = self._proxy.upstream.partition(":")
        upstream = http.client.HTTPConnection(host, int(port), timeout=UPSTREAM_TIMEOUT_S)
        try:
            path = self.path
            if request.at == "cdn":
                path = path.partition("?")[0]
            upstream.request(request.method, path, body or None, headers)
            answer = upstream.getresponse()
            raw = answer.read()
            sent = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP_BY_HOP]
            declared = answer.getheader("Content-Length")
        finally:
            upstream.close()
        sent = [(k, v.replace(self._proxy.upstream, self._proxy.host)) for k, v in sent]
        self._answer(answer.status, sent, raw, declared, fault)

    def _answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        raw: bytes,
        declared: str | None,
        fault: Fault | None,
    ) -> None:
        kind = fault.kind if fault is not None else None
        after = fault.after if fault is not None else 0
        if kind == "short":
            raw = raw[: len(raw) - after]
        elif kind == "long":
            raw += b"x" * after
        elif kind == "wrong-bytes":
            raw = bytes(byte ^ 0xFF for byte in raw)
        elif kind == "wrong-range":
            headers = [
                (k, re.sub(r"\d+", lambda m: str(int(m[0]) + 1), v, count=2))
                if k.lower() == "content-range"
                else (k, v)
                for k, v in headers
            ]
        length = declared if self.command == "HEAD" and declared else str(len(raw))
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind in ("reset", "close", "stall", "drip"):
            self._break(cast("Fault", fault), raw)
            return
        self.wfile.write(raw)
        self._proxy.count_bytes(len(raw))

    def _break(self, fault: Fault, raw: bytes) -> None:
        self.wfile.write(raw[: fault.after])
        self.wfile.flush()
        self._proxy.count_bytes(len(raw[: fault.after]))
        self.close_connection = True
        if fault.kind == "stall":
            self._proxy.closing.wait()
        elif fault.kind == "drip":
            for position in range(fault.after, len(raw)):
                self.wfile.write(raw[position : position + 1])
                if self._proxy.closing.wait(DRIP_PERIOD_S):
                    break
        elif fault.kind == "reset":
            # Closing with zero linger sends RST instead of FIN.
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()

    def _plain(self, status: int, headers: dict[str, str], raw: bytes = b"") -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)


_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "date", "server"}

"""What holds for every request: TLS, proxies, redirects, waiting as long as was asked."""

from __future__ import annotations

import email.utils
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from clipshim.errors import ConfigError, RegistryError
from clipshim.registry import replies, transport, urls
from clipshim.registry.access import RegistryAccess
from clipshim.registry.references import parse_reference
from clipshim.registry.sources import fetch_manifest
from clipshim.settings import Settings
from tests.support.fault_proxy import Fault, FaultProxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MANIFEST = b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}'


class Manifests(BaseHTTPRequestHandler):
    """Answers everything with one manifest, or a redirect for /v2/moved/."""

    location = ""
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        if self.path.startswith("/v2/moved/"):
            self.send_response_only(307)
            self.send_header("Location", self.server.location)  # type: ignore[attr-defined]
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response_only(200)
        self.send_header("Content-Length", str(len(MANIFEST)))
        self.end_headers()
        self.wfile.write(MANIFEST)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


class Server(ThreadingHTTPServer):
    """A loopback server, with TLS if it is given a certificate."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, certificate: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Manifests)
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.location = ""
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that do not trust us hang up."""

    def __enter__(self) -> Server:
        self.thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, with its key, in one file."""
    directory = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
            "-nodes", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
            "-days", "2", "-keyout", str(directory / "key"), "-out", str(directory / "cert"),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    both = directory / "both.pem"
    both.write_text((directory / "cert").read_text() + (directory / "key").read_text())
    return both


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[Server]:
    with Server(certificate) as server:
        yield server


def tls_mirror(directory: Path, server: Server, extra: str = "") -> None:
    """certs.d that says the loopback registry has TLS."""
    hosts = directory / server.host
    hosts.mkdir()
    (hosts / "hosts.toml").write_text(f'server = "https://{server.host}"\n{extra}')


def fetch(access: RegistryAccess, image: str) -> bytes:
    try:
        return fetch_manifest(access, parse_reference(image)).raw
    finally:
        access.transport.close()


def test_an_untrusted_certificate_is_refused_with_a_hint(
    tls_server: Server, tmp_path: Path
) -> None:
    tls_mirror(tmp_path, tls_server)
    with pytest.raises(RegistryError, match="not trusted") as caught:
        fetch(RegistryAccess(anonymous=True, certs_dir=str(tmp_path)), f"{tls_server.host}/a")
    assert caught.value.hint is not None
    assert "--ca-file" in caught.value.hint
    assert tls_server.seen == []


def test_certificates_are_trusted_where_the_user_says_so(
    tls_server: Server, certificate: Path, tmp_path: Path
) -> None:
    image = f"{tls_server.host}/a"
    tls_mirror(tmp_path, tls_server)
    directory = str(tmp_path)
    for access in (
        RegistryAccess(anonymous=True, certs_dir=directory, ca_file=str(certificate)),
        RegistryAccess(anonymous=True, certs_dir=directory, insecure=True),
    ):
        assert fetch(access, image) == MANIFEST
    hosts = tmp_path / tls_server.host / "hosts.toml"
    hosts.write_text(f'server = "https://{tls_server.host}"\nca = "{certificate}"\n')
    assert fetch(RegistryAccess(anonymous=True, certs_dir=directory), image) == MANIFEST
    hosts.write_text(f'server = "https://{tls_server.host}"\nskip_verify = true\n')
    assert fetch(RegistryAccess(anonymous=True, certs_dir=directory), image) == MANIFEST


def test_a_ca_file_that_cannot_be_read_is_named_so(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("no certificate")
    for name in ("ca", "missing"):
        with pytest.raises(ConfigError, match="certificates"):
            fetch(RegistryAccess(anonymous=True, ca_file=str(tmp_path / name)), "127.0.0.1:1/a")


def test_plain_http_where_tls_was_expected_is_explained(tmp_path: Path) -> None:
    with Server() as server:
        tls_mirror(tmp_path, server)
        with pytest.raises(RegistryError, match="expected TLS") as caught:
            fetch(RegistryAccess(anonymous=True, certs_dir=str(tmp_path)), f"{server.host}/a")
        assert caught.value.hint is not None
        assert "plain-http" in caught.value.hint


def test_a_redirect_from_tls_to_a_plain_server_elsewhere_is_not_followed(
    tls_server: Server, tmp_path: Path
) -> None:
    tls_mirror(tmp_path, tls_server)
    tls_server.location = "http://example.invalid/blob"
    with pytest.raises(RegistryError, match=r"plain http at example\.invalid"):
        fetch(
            RegistryAccess(anonymous=True, certs_dir=str(tmp_path), insecure=True),
            f"{tls_server.host}/moved/a",
        )


@pytest.mark.parametrize(
    "location", ["/v2/moved/again", "ftp://x/y", "file:///etc/passwd", "http://["]
)
def test_redirects_that_lead_nowhere_end(location: str) -> None:
    with Server() as server:
        server.location = location
        with pytest.raises(RegistryError, match="redirect"):
            fetch(RegistryAccess(anonymous=True), f"{server.host}/moved/a")
        assert len(server.seen) <= transport.MAX_REDIRECTS + 1


def test_headers_of_a_mirror_stay_with_it(tmp_path: Path) -> None:
    with Server() as mirror, Server() as cdn:
        mirror.location = f"http://{cdn.host}/elsewhere"
        hosts = tmp_path / "r.io"
        hosts.mkdir()
        (hosts / "hosts.toml").write_text(
            f'[host."http://{mirror.host}"]\n[host."http://{mirror.host}".header]\nX-Key = "k"\n'
        )
        access = RegistryAccess(anonymous=True, certs_dir=str(tmp_path))
        assert fetch(access, "r.io/moved/a") == MANIFEST
        assert mirror.seen[0][1]["X-Key"] == "k"
        assert "X-Key" not in cdn.seen[0][1]


def test_http_proxies_are_used_but_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server() as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy.host}")
        monkeypatch.setenv("no_proxy", "direct.invalid")
        access = RegistryAccess(anonymous=True, plain_http=frozenset({"r.invalid"}))
        assert fetch(access, "r.invalid/a") == MANIFEST
        assert proxy.seen[0][0] == "http://r.invalid/v2/a/manifests/latest"
        with Server() as other:
            assert fetch(RegistryAccess(anonymous=True), f"{other.host}/a") == MANIFEST
        assert transport._proxy_for("http", "direct.invalid") is None
        assert len(proxy.seen) == 1


def test_retry_after_is_waited_for() -> None:
    with Server() as server, FaultProxy(server.host) as proxy:
        proxy.inject(Fault("status", status=429, headers={"Retry-After": "1"}), match="GET")
        begun = time.monotonic()
        assert fetch(RegistryAccess(anonymous=True), f"{proxy.host}/a") == MANIFEST
        assert time.monotonic() - begun >= 1


def test_retry_after_is_a_number_or_a_date() -> None:
    assert replies._retry_after_s("7") == 7
    later = email.utils.formatdate(time.time() + 1000, usegmt=True)
    found = replies._retry_after_s(later)
    assert found is not None
    assert 900 < found < 1001
    assert replies._retry_after_s("Mon, 01 Jan 2001 00:00:00 GMT") == 0
    for nonsense in (None, "", "soon", "-5"):
        assert replies._retry_after_s(nonsense) is None


@pytest.mark.parametrize("wrong_by_s", [-86_400, 86_400])
def test_a_time_to_retry_is_by_the_servers_clock(wrong_by_s: int) -> None:
    theirs = time.time() + wrong_by_s
    date = email.utils.formatdate(theirs, usegmt=True)
    later = email.utils.formatdate(theirs + 30, usegmt=True)
    assert replies._retry_after_s(later, date) == 30
    assert replies._retry_after_s("30", date) == 30
    found = replies._retry_after_s(email.utils.formatdate(time.time() + 30), "nonsense")
    assert found is not None
    assert 0 <= found <= 30


def test_origins() -> None:
    assert urls.same_origin("http://a/x", "http://a:80/y")
    for other in ("https://a/x", "http://b/x", "http://a:81/x", "/x", "http://["):
        assert not urls.same_origin(other, "http://a/y")


def test_urls_and_what_is_none() -> None:
    assert urls.join_url("http://a/b/c", "/d?e=f") == "http://a/d?e=f"
    assert urls.join_url("http://a/b", "https://c/d") == "https://c/d"
    for nonsense in (
        "http://[",
        "http://a:x/",
        "http://a:99999/",
        "ftp://a",
        "http://a\nb",
        "http:",
    ):
        assert urls.parse_url(nonsense) is None
    assert urls.join_url("http://a", "http://[") is None


def test_access_from_settings() -> None:
    settings = Settings({"plain_http": ["r.io"], "read_timeout_s": 3.0})
    access = RegistryAccess.from_settings(settings, plain_http=frozenset({"s.io"}))
    assert access.plain_http == {"r.io", "s.io"}
    assert access.read_timeout_s == 3.0
    assert access.certs_dir == settings.certs_dir
    assert access.transport is access.transport


def test_the_servers_of_many_registries_are_not_all_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "MAX_REGISTRIES", 5)
    access = RegistryAccess(anonymous=True)
    for number in range(20):
        (endpoint,) = access.transport.endpoints(parse_reference(f"r{number}.example/a"), "pull")
        assert endpoint.host == f"r{number}.example"
    assert len(access.transport._endpoints) <= 5


def test_certificates_are_read_once_however_many_ask_at_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contexts = []
    make = ssl.create_default_context

    def slowly() -> ssl.SSLContext:
        contexts.append(make())
        for _ in range(1000):  # lets the other threads run, if they can
            time.sleep(0)
        return contexts[-1]

    monkeypatch.setattr(ssl, "create_default_context", slowly)
    with Server() as server:
        access = RegistryAccess()
        reference = parse_reference(f"{server.host}/a:1")
        threads = [
            threading.Thread(target=fetch_manifest, args=(access, reference)) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        access.transport.close()

    assert len(server.seen) == 8
    assert len(contexts) == 1

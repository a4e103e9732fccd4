"""Ranged reads against every way in which a registry, a CDN or a network can misbehave."""

from __future__ import annotations

import hashlib
import io
import itertools
import socket
import threading
import time
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from clipshim.errors import AuthError, NotFoundError, RegistryError
from clipshim.registry.access import RegistryAccess
from clipshim.registry.attempts import RegistryNotFoundError
from clipshim.registry.blobs import BlobReader, FileBlob, RegistryBlob, locate_blob
from clipshim.registry.embedded_server import EmbeddedRegistry
from clipshim.registry.references import parse_reference
from tests.support.fault_proxy import Fault, FaultProxy
from tests.unit.registry.layouts import Layout, digest_of, layer_tar, some_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 3_000_000
CONTENT = some_bytes(SIZE)
DIGEST = digest_of(CONTENT)
PATIENCE_S = 120.0
# Long enough for a loaded machine to answer an honest request, short enough to wait for a stall.
SHORT_TIMEOUT_S = 0.5


def soon() -> float:
    """A deadline that only a hanging test reaches."""
    return time.monotonic() + PATIENCE_S


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    layout = Layout(tmp_path_factory.mktemp("layout") / "l")
    layout.blob(CONTENT)
    layout.tag(layout.image(layer_tar("a", b"a")))
    with EmbeddedRegistry({"app": str(layout.path), "proxied/app": str(layout.path)}) as registry:
        yield registry.address


@pytest.fixture
def proxy(upstream: str) -> Iterator[FaultProxy]:
    with FaultProxy(upstream) as proxy:
        yield proxy


@pytest.fixture
def access() -> Iterator[RegistryAccess]:
    access = RegistryAccess(anonymous=True)
    yield access
    access.transport.close()


@pytest.fixture
def reader(access: RegistryAccess) -> BlobReader:
    return BlobReader(access, transport=access.transport)


@pytest.fixture
def impatient() -> Iterator[BlobReader]:
    reader = BlobReader(RegistryAccess(anonymous=True, read_timeout_s=SHORT_TIMEOUT_S))
    yield reader
    reader.close()


def blob_at(host: str, *urls: str) -> RegistryBlob:
    return RegistryBlob(parse_reference(f"{host}/app:1"), DIGEST, SIZE, urls)


def retries(reader: BlobReader) -> dict[str, int]:
    counted = reader.statistics()["retries"]
    assert isinstance(counted, dict)
    return counted


def test_ranges_are_the_right_bytes(proxy: FaultProxy, reader: BlobReader) -> None:
    blob = blob_at(proxy.host)
    for start, length in ((0, 1), (0, SIZE), (1, 1000), (SIZE - 1, 1), (1_234_567, 700_000)):
        got = reader.read_range(blob, start, length, deadline=soon())
        assert got == CONTENT[start : start + length]
    assert retries(reader) == {}
    assert reader.statistics()["requests"] == len(proxy.requests) == 5
    assert reader.statistics()["bytes"] == SIZE + 701_002


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 0), (0, SIZE + 1), (SIZE, 1)])
def test_a_range_outside_the_blob_is_not_even_asked(
    proxy: FaultProxy, reader: BlobReader, start: int, length: int
) -> None:
    with pytest.raises(RegistryError, match="does not lie in"):
        reader.read_range(blob_at(proxy.host), start, length, deadline=soon())
    assert proxy.requests == []


RECOVERABLE = [
    (Fault("reset", after=100_000), "reset"),
    (Fault("reset", after=0), "reset"),
    (Fault("close", after=50_000), "short-body"),
    (Fault("status", status=500), "server-error"),
    (Fault("status", status=503, headers={"Retry-After": "0"}), "server-error"),
    (Fault("status", status=429, headers={"Retry-After": "0"}), "rate-limited"),
    (Fault("status", status=408), "server-error"),
]


@pytest.mark.parametrize(("fault", "cause"), RECOVERABLE)
def test_a_passing_fault_is_retried(
    proxy: FaultProxy, reader: BlobReader, fault: Fault, cause: str
) -> None:
    proxy.inject(fault, times=3)
    got = reader.read_range(blob_at(proxy.host), 500_000, 600_000, deadline=soon())
    assert got == CONTENT[500_000:1_100_000]
    # A close may be noticed as a broken connection or as a body that is too short.
    assert sum(retries(reader).values()) == 3
    assert set(retries(reader)) <= {cause, "reset", "short-body"}


@pytest.mark.parametrize("kind", ["stall", "drip", "stall-headers", "drip-headers"])
def test_a_transfer_that_hangs_is_given_up_and_tried_again(
    proxy: FaultProxy, impatient: BlobReader, kind: str
) -> None:
    proxy.inject(Fault(kind, after=10), times=1)  # type: ignore[arg-type]
    got = impatient.read_range(blob_at(proxy.host), 5, 100_000, deadline=soon())
    assert got == CONTENT[5:100_005]
    assert set(retries(impatient)) <= {"stall", "drip"}
    assert retries(impatient)


def test_a_broken_body_is_continued_where_it_broke(proxy: FaultProxy, reader: BlobReader) -> None:
    proxy.inject(Fault("close", after=100_000))
    proxy.inject(Fault("close", after=50_000))
    got = reader.read_range(blob_at(proxy.host), 1000, 500_000, deadline=soon())
    assert got == CONTENT[1000:501_000]
    asked = [request.headers["range"] for request in proxy.requests]
    assert asked == ["bytes=1000-500999", "bytes=101000-500999", "bytes=151000-500999"]
    assert reader.statistics()["bytes"] == 500_000


@pytest.mark.parametrize(
    "fault",
    [
        Fault("short", after=1),
        Fault("long", after=1),
        Fault("wrong-range"),
        Fault("status", status=206, headers={"Content-Type": "multipart/byteranges"}),
        Fault("status", status=416),
        Fault("status", status=204),
        Fault("status", status=302),
    ],
)
def test_an_answer_that_is_not_the_range_is_never_data(
    proxy: FaultProxy, reader: BlobReader, fault: Fault
) -> None:
    proxy.inject(fault, times=1_000_000)
    blob = blob_at(proxy.host)
    with pytest.raises(RegistryError) as caught:
        reader.read_range(blob, 2_000_000, 1000, deadline=time.monotonic() + 1)
    assert DIGEST in caught.value.message
    assert "bytes 2000000-2000999" in caught.value.message
    assert proxy.host in caught.value.message


def test_bytes_that_are_only_wrong_come_through_and_distrust_finds_another_server(
    proxy: FaultProxy, upstream: str, tmp_path: Path
) -> None:
    mirrored(tmp_path, upstream, proxy.host)
    reader = BlobReader(RegistryAccess(anonymous=True, certs_dir=str(tmp_path)))
    proxy.inject(Fault("wrong-bytes"), times=1_000_000)
    blob = blob_at(upstream)
    # Nobody but the owner of the digest can see it: the caller checks, and says so.
    assert reader.read_range(blob, 0, 1000, deadline=soon()) != CONTENT[:1000]
    reader.distrust(blob)
    assert reader.read_range(blob, 0, 1000, deadline=soon()) == CONTENT[:1000]
    reader.close()


def test_a_server_without_ranges_serves_what_lies_at_the_start(
    proxy: FaultProxy, reader: BlobReader
) -> None:
    proxy.inject(Fault("ignore-range"), times=1_000_000)
    blob = blob_at(proxy.host)
    assert reader.read_range(blob, 0, 100, deadline=soon()) == CONTENT[:100]
    got = reader.read_range(blob, 1_000_000, 300_000, deadline=soon())
    assert got == CONTENT[1_000_000:1_300_000]
    with pytest.raises(RegistryError, match="ranges are not supported"):
        reader.read_range(blob, 2_000_000, 10, deadline=soon())
    with pytest.raises(RegistryError, match="expected a blob of 2999999 bytes"):
        reader.read_range(replace(blob, size=SIZE - 1), 10, 10, deadline=soon())


@pytest.mark.parametrize(
    ("status", "kind"), [(401, AuthError), (403, AuthError), (404, RegistryNotFoundError)]
)
def test_a_refusal_is_final(
    proxy: FaultProxy, reader: BlobReader, status: int, kind: type[Exception]
) -> None:
    proxy.inject(Fault("status", status=status), times=1_000_000)
    with pytest.raises(kind, match=f"{proxy.host}"):
        reader.read_range(blob_at(proxy.host), 0, 10, deadline=soon())
    assert len(proxy.requests) == 1


def test_retries_end_at_the_deadline_with_the_cause(proxy: FaultProxy, reader: BlobReader) -> None:
    proxy.inject(Fault("status", status=502), times=1_000_000)
    with pytest.raises(RegistryError, match=r"502.*gave up after \d+ attempts"):
        reader.read_range(blob_at(proxy.host), 0, 10, deadline=time.monotonic() + 3)
    assert len(proxy.requests) > 1
    assert reader.statistics()["failures"] == 1


def test_a_wish_to_wait_longer_than_the_deadline_is_an_error_at_once(
    proxy: FaultProxy, reader: BlobReader
) -> None:
    proxy.inject(Fault("status", status=429, headers={"Retry-After": "100000"}))
    with pytest.raises(RegistryError, match="429"):
        reader.read_range(blob_at(proxy.host), 0, 10, deadline=soon())
    assert len(proxy.requests) == 1


def test_a_stalled_registry_does_not_hold_a_reader_past_its_deadline(
    proxy: FaultProxy, reader: BlobReader
) -> None:
    proxy.inject(Fault("stall", after=10), times=1_000_000)
    with pytest.raises(RegistryError, match="blob sha256"):
        reader.read_range(blob_at(proxy.host), 0, 1000, deadline=time.monotonic() + 0.5)


def test_refused_connections_are_retried_until_the_registry_is_back(
    proxy: FaultProxy, reader: BlobReader
) -> None:
    results: list[bytes] = []
    blob = blob_at(proxy.host)
    with proxy.refusing():
        thread = threading.Thread(
            target=lambda: results.append(reader.read_range(blob, 7, 1000, deadline=soon()))
        )
        thread.start()
        wait_until(lambda: bool(retries(reader)))
    thread.join(PATIENCE_S)
    assert results == [CONTENT[7:1007]]
    assert set(retries(reader)) == {"refused"}


def test_an_unknown_host_is_named(reader: BlobReader) -> None:
    blob = blob_at("no-such-host.invalid")
    with pytest.raises(RegistryError, match=r"no-such-host\.invalid: .*(resolved|connect)"):
        reader.read_range(blob, 0, 10, deadline=time.monotonic() + 1)


def test_name_resolution_that_fails_is_tried_again_until_it_works(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, port = "registry.test", proxy.host.rpartition(":")[2]
    resolve = socket.getaddrinfo
    failures: Iterator[bool] = itertools.repeat(True)

    def flaky(host: str, *args: Any, **options: Any) -> Any:
        if host != name:
            return resolve(host, *args, **options)
        if next(failures, False):
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve("127.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", flaky)
    access = RegistryAccess(anonymous=True, plain_http=frozenset({f"{name}:{port}"}))
    with closing(BlobReader(access)) as reader:
        blob = blob_at(f"{name}:{port}")
        with pytest.raises(RegistryError, match=r"registry\.test.*cannot be resolved"):
            reader.read_range(blob, 7, 1000, deadline=time.monotonic() + 2)
        failures = itertools.repeat(True, 3)
        assert reader.read_range(blob, 7, 1000, deadline=soon()) == CONTENT[7:1007]
        assert retries(reader)["dns"] >= 3
        assert set(retries(reader)) <= {"dns", "deadline"}


def test_close_ends_waiting_readers(proxy: FaultProxy) -> None:
    reader = BlobReader(RegistryAccess(anonymous=True))
    proxy.inject(Fault("status", status=429, headers={"Retry-After": "60"}), times=1_000_000)
    errors: list[Exception] = []

    def read() -> None:
        try:
            reader.read_range(blob_at(proxy.host), 0, 10, deadline=soon())
        except RegistryError as exc:
            errors.append(exc)

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: bool(retries(reader)))
    reader.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert "shut down" in str(errors[0])


def test_a_cdn_is_remembered_gets_no_log_in_and_is_renewed_when_its_signature_expires(
    proxy: FaultProxy, reader: BlobReader
) -> None:
    proxy.require_tokens()
    proxy.redirect_to_cdn()
    blob = blob_at(proxy.host)
    for start in (0, 100, 200):
        assert reader.read_range(blob, start, 50, deadline=soon()) == CONTENT[start : start + 50]
    cdn = [request for request in proxy.requests if request.at == "cdn"]
    assert len(cdn) == 3
    assert all(request.authorization is None for request in cdn)
    asked_registry = [request for request in proxy.requests if request.at == "registry"]
    assert len(asked_registry) == 2  # 401 and 307; after that the CDN alone
    proxy.expire_signatures()
    assert reader.read_range(blob, 300, 50, deadline=soon()) == CONTENT[300:350]
    assert retries(reader) == {"redirect": 1}


def test_a_cdn_that_always_refuses_is_an_error_before_the_deadline(
    proxy: FaultProxy, reader: BlobReader
) -> None:
    proxy.redirect_to_cdn()
    proxy.inject(Fault("status", status=403), match=r"GET .*\?sig=", times=1_000_000)
    with pytest.raises(RegistryError, match=r"403 at .* after a redirect"):
        reader.read_range(blob_at(proxy.host), 0, 10, deadline=soon())


def test_a_token_is_fetched_once_and_renewed_when_it_is_refused(
    proxy: FaultProxy, reader: BlobReader
) -> None:
    proxy.require_tokens()
    blob = blob_at(proxy.host)
    for start in (0, 100):
        assert reader.read_range(blob, start, 50, deadline=soon()) == CONTENT[start : start + 50]
    assert [request.at for request in proxy.requests].count("token") == 1
    proxy.expire_tokens()
    assert reader.read_range(blob, 200, 50, deadline=soon()) == CONTENT[200:250]
    assert [request.at for request in proxy.requests].count("token") == 2


def test_many_readers_log_in_once(proxy: FaultProxy, reader: BlobReader) -> None:
    proxy.require_tokens()
    blob = blob_at(proxy.host)
    wrong: list[int] = []

    def read(number: int) -> None:
        start = number * 1000
        if reader.read_range(blob, start, 999, deadline=soon()) != CONTENT[start : start + 999]:
            wrong.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert [request.at for request in proxy.requests].count("token") == 1


def mirrored(directory: Path, origin: str, *mirrors: str) -> None:
    """certs.d for a registry at `origin`."""
    host, _, port = origin.partition(":")
    hosts = directory / f"{host}_{port}_"
    hosts.mkdir()
    text = f'server = "http://{origin}"\n'
    text += "".join(f'[host."http://{mirror}"]\n' for mirror in mirrors)
    (hosts / "hosts.toml").write_text(text)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", status=404),
        Fault("status", status=403),
        Fault("status", status=500),
        Fault("wrong-range"),
        Fault("close", after=100),
        Fault("reset", after=100),
    ],
)
def test_when_a_mirror_fails_the_next_server_is_asked(
    proxy: FaultProxy, upstream: str, tmp_path: Path, fault: Fault
) -> None:
    mirrored(tmp_path, upstream, proxy.host)
    reader = BlobReader(RegistryAccess(anonymous=True, certs_dir=str(tmp_path)))
    proxy.inject(fault, times=1_000_000)
    got = reader.read_range(blob_at(upstream), 1000, 5000, deadline=soon())
    assert got == CONTENT[1000:6000]
    (asked,) = proxy.requests
    assert "ns=127.0.0.1" in asked.path
    reader.close()


def test_all_servers_are_named_when_all_fail(
    proxy: FaultProxy, upstream: str, tmp_path: Path
) -> None:
    mirrored(tmp_path, upstream, proxy.host)
    reader = BlobReader(RegistryAccess(anonymous=True, certs_dir=str(tmp_path)))
    missing = replace(blob_at(upstream), digest="sha256:" + "0" * 64)
    with pytest.raises(RegistryNotFoundError) as caught:
        reader.read_range(missing, 0, 10, deadline=soon())
    assert proxy.host in caught.value.message
    assert upstream in caught.value.message
    assert isinstance(caught.value, NotFoundError)
    reader.close()


def test_foreign_urls_are_a_further_source(proxy: FaultProxy, upstream: str) -> None:
    reader = BlobReader(RegistryAccess(anonymous=True))
    proxy.inject(Fault("status", status=404), times=1_000_000)
    url = f"http://{upstream}/v2/app/blobs/{DIGEST}"
    got = reader.read_range(blob_at(proxy.host, url), 5, 500, deadline=soon())
    assert got == CONTENT[5:505]
    reader.close()


def test_an_index_cannot_name_loopback_urls_for_a_remote_registry(upstream: str) -> None:
    reader = BlobReader(RegistryAccess(anonymous=True))
    blob = blob_at("no-such-host.invalid", f"http://{upstream}/v2/app/blobs/{DIGEST}")
    with pytest.raises(RegistryError) as caught:
        reader.read_range(blob, 0, 10, deadline=time.monotonic() + 0.5)
    assert upstream not in caught.value.message
    reader.close()


# Streams


def test_a_stream_is_the_whole_blob(proxy: FaultProxy, reader: BlobReader) -> None:
    with reader.open_stream(blob_at(proxy.host)) as stream:
        assert stream.read(10) == CONTENT[:10]
        assert stream.read() == CONTENT[10:]
        assert stream.read() == b""
    assert len(proxy.requests) == 1


def test_a_stream_survives_breaks(proxy: FaultProxy, reader: BlobReader) -> None:
    for after in (0, 1, 1_000_000, 0, 500_000):
        proxy.inject(Fault("reset", after=after))
        proxy.inject(Fault("close", after=after))
    proxy.inject(Fault("status", status=503), times=2)
    proxy.inject(Fault("ignore-range"))
    with reader.open_stream(blob_at(proxy.host)) as stream:
        assert hashlib.sha256(stream.read()).hexdigest() == DIGEST.removeprefix("sha256:")


def test_a_stream_that_makes_no_progress_ends_in_an_error(
    proxy: FaultProxy, reader: BlobReader
) -> None:
    proxy.inject(Fault("close", after=0), times=1_000_000)
    with (
        pytest.raises(RegistryError, match=DIGEST),
        reader.open_stream(blob_at(proxy.host)) as stream,
    ):
        stream.read()


def test_a_stalled_stream_is_continued(proxy: FaultProxy, impatient: BlobReader) -> None:
    proxy.inject(Fault("stall", after=200_000))
    with impatient.open_stream(blob_at(proxy.host)) as stream:
        assert stream.read() == CONTENT


def test_a_stream_closed_half_way_leaves_no_connection_in_use(
    proxy: FaultProxy, reader: BlobReader
) -> None:
    stream = reader.open_stream(blob_at(proxy.host))
    assert stream.read(5) == CONTENT[:5]
    stream.close()
    assert reader.read_range(blob_at(proxy.host), 0, 5, deadline=soon()) == CONTENT[:5]


# Local files


def test_local_blobs(tmp_path: Path, reader: BlobReader) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"before" + CONTENT + b"after")
    blob = FileBlob(str(file), 6, SIZE)
    assert reader.read_range(blob, 1000, 5000, deadline=soon()) == CONTENT[1000:6000]
    with reader.open_stream(blob) as stream:
        assert isinstance(stream, io.BufferedReader)
        assert stream.read() == CONTENT
    with pytest.raises(RegistryError, match="does not lie in"):
        reader.read_range(blob, SIZE - 1, 2, deadline=soon())
    with pytest.raises(RegistryError, match="the file ends before"):
        reader.read_range(FileBlob(str(file), 6, SIZE + 100), SIZE, 50, deadline=soon())
    with pytest.raises(RegistryError, match="No such file"):
        reader.read_range(FileBlob(str(tmp_path / "gone"), 0, 9), 0, 1, deadline=soon())


def test_blobs_of_an_index_are_located_by_the_image_it_names(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    digest = layout.blob(CONTENT)
    layout.tag(layout.image(layer_tar("a", b"a")), "v1")
    found = locate_blob(f"oci:{layout.path}:v1", digest, SIZE)
    assert isinstance(found, FileBlob)
    assert found.size == SIZE
    packed = layout.pack(tmp_path / "packed.tar")
    found = locate_blob(f"oci-archive:{packed}:v1", digest, SIZE)
    assert isinstance(found, FileBlob)
    with open(found.path, "rb") as file:
        file.seek(found.offset)
        assert file.read(SIZE) == CONTENT
    with pytest.raises(NotFoundError, match="expected 5 bytes"):
        locate_blob(f"oci:{layout.path}:v1", digest, 5)
    with pytest.raises(NotFoundError, match="missing"):
        locate_blob(f"oci:{layout.path}:v1", "sha256:" + "0" * 64, 5)
    remote = locate_blob("ubuntu", digest, SIZE, ("https://x.io/y",))
    assert isinstance(remote, RegistryBlob)
    assert remote.urls == ("https://x.io/y",)


def wait_until(condition: object) -> None:
    """Polls with a deadline that only a hanging test reaches."""
    assert callable(condition)
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)

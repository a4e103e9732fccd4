"""The quickstart's own registry, as other clients see it."""

from __future__ import annotations

import http.client
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from clipshim.errors import UsageError
from clipshim.registry.embedded_server import EmbeddedRegistry
from tests.unit.registry.layouts import Layout, layer_tar, some_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOB = some_bytes(10_000)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "layout")
    layout.tag(layout.image(layer_tar("a", b"a")))
    return layout


@pytest.fixture
def registry(layout: Layout) -> Iterator[EmbeddedRegistry]:
    with EmbeddedRegistry({"a/b": str(layout.path)}) as registry:
        yield registry


def get(
    registry: EmbeddedRegistry, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(registry.address, timeout=120)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        names = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, names, answer.read()
    finally:
        connection.close()


def test_ranges(registry: EmbeddedRegistry, layout: Layout) -> None:
    path = f"/v2/a/b/blobs/{layout.blob(BLOB)}"
    assert get(registry, path)[2] == BLOB
    status, headers, body = get(registry, path, Range="bytes=10-19")
    assert (status, body, headers["content-range"]) == (206, BLOB[10:20], "bytes 10-19/10000")
    assert get(registry, path, Range="bytes=9990-")[2] == BLOB[9990:]
    assert get(registry, path, Range="bytes=9990-99999")[2] == BLOB[9990:]
    assert get(registry, path, Range="bytes=10000-10001")[0] == 416
    status, headers, body = get(registry, path, "HEAD")
    assert (status, headers["content-length"], body) == (200, "10000", b"")
    assert registry.bytes_sent == 10_000 + 10 + 10 + 10


@pytest.mark.parametrize(
    "path",
    [
        "/", "/v2/x/manifests/latest", "/v2/a/b/blobs/sha256:../../index.json",
        "/v2/a/b/blobs/../../../etc/passwd", "/v2/a/b/blobs/sha256:" + "0" * 64,
        "/v2/a/b/manifests/sha256:" + "0" * 64, "/v2/a/b/tags/list",
    ],
)  # fmt: skip
def test_what_it_does_not_have_is_404(registry: EmbeddedRegistry, path: str) -> None:
    assert get(registry, path)[0] == 404


def test_pings_and_pushes(registry: EmbeddedRegistry) -> None:
    assert get(registry, "/v2/")[0] == 200
    assert get(registry, "/v2/a/b/blobs/uploads/", "POST")[0] == 501


def test_it_listens_on_loopback_only(layout: Layout) -> None:
    with pytest.raises(UsageError, match="loopback"):
        EmbeddedRegistry({"a": str(layout.path)}, host="0.0.0.0")


def test_it_runs_as_a_program(layout: Layout, tmp_path: Path) -> None:
    port_file = tmp_path / "address"
    with subprocess.Popen(
        [
            sys.executable, "-m", "clipshim.registry.embedded_server", str(layout.path), "demo",
            "--port-file", str(port_file),
        ],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            name = process.stdout.readline().strip()
            assert name == f"{port_file.read_text()}/demo"
            connection = http.client.HTTPConnection(port_file.read_text(), timeout=120)
            deadline = time.monotonic() + 120
            connection.request("GET", "/v2/")
            assert connection.getresponse().status == 200
            assert time.monotonic() < deadline
            connection.close()
        finally:
            process.kill()

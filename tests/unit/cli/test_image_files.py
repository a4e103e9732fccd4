"""Single files of an image, read through its index: links stay inside, bytes are verified."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO

import pytest
import zstandard

from clipshim.cli import image_files, inspect_command
from clipshim.cli.image_files import ImageFiles
from clipshim.cli.inspect_command import describe_file
from clipshim.errors import ClipError, DigestError, IndexFormatError, NotFoundError, UsageError
from clipshim.index.builder import BuildOptions, build_index
from clipshim.index.model import open_index
from clipshim.index.tree_check import sound_tree
from clipshim.registry.access import RegistryAccess
from clipshim.registry.sources import LayerDescriptor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PASSWD = b"root:x:0:0::/:/bin/sh\n"
LARGE = bytes(range(256)) * 2048  # 512 KiB: more than one span at the closest spacing
LINKS = {
    "etc/passwd": "../../../../real/passwd",
    "absolute": "/real/passwd",
    "chain": "absolute",
    "loop": "loop",
    "dir": "real",
    "nowhere": "/no/such",
}


class OneLayer:
    """An image of one plain layer, as build_index wants it."""

    reference = "localhost/test:1"
    platform = "linux/amd64"

    def __init__(self, layer: bytes, *, zstd: bool = False) -> None:
        diff_id = f"sha256:{hashlib.sha256(layer).hexdigest()}"
        self._layer = zstandard.compress(layer) if zstd else layer
        digest = f"sha256:{hashlib.sha256(self._layer).hexdigest()}"
        kind = "application/vnd.oci.image.layer.v1.tar" + ("+zstd" if zstd else "")
        self.layers = [LayerDescriptor(digest, len(self._layer), kind)]
        self.config_raw = json.dumps(
            {"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": [diff_id]}}
        ).encode()
        self.manifest_raw = b"{}"
        self.manifest_digest = f"sha256:{hashlib.sha256(self.manifest_raw).hexdigest()}"

    @contextmanager
    def open_layer(self, i: int) -> Iterator[BinaryIO]:
        """The layer's bytes."""
        assert i == 0
        yield io.BytesIO(self._layer)


def layer() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in (("real/passwd", PASSWD), ("large", LARGE), ("empty", b"")):
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.uid, info.gid, info.mtime = len(content), 0o640, 1, 2, 3
            archive.addfile(info, io.BytesIO(content))
        for name, target in LINKS.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def index_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "index.clip"
    build_index(OneLayer(layer()), path, BuildOptions(embed=True, spacing=64 << 10))
    return path


@pytest.fixture
def files(index_path: Path) -> Iterator[ImageFiles]:
    with open_index(index_path) as index, ImageFiles(index, RegistryAccess()) as opened:
        yield opened


@pytest.mark.parametrize(
    "path",
    ["/real/passwd", "etc/passwd", "/etc/../etc/passwd", "/absolute", "/chain", "/dir/passwd"],
)
def test_links_lead_to_files_inside_of_the_image(files: ImageFiles, path: str) -> None:
    assert files.read(path) == PASSWD


@pytest.mark.parametrize(
    "path", ["/no/such", "/loop", "/nowhere", "/real", "/real/passwd/more", "/", ""]
)
def test_what_is_no_file_is_none(files: ImageFiles, path: str) -> None:
    assert files.read(path) is None


def test_a_file_of_several_spans_is_put_together(files: ImageFiles) -> None:
    assert files.read("/large") == LARGE
    assert files.read("/empty") == b""


def test_of_one_large_frame_no_more_is_fetched_than_leads_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = random.Random(1).randbytes(4 << 20)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in (("first", PASSWD), ("large", noise), ("last", PASSWD)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    source = OneLayer(buffer.getvalue(), zstd=True)
    path = tmp_path / "frame.clip"
    build_index(source, path, BuildOptions(embed=True, spacing=64 << 10))
    monkeypatch.setattr(image_files, "PIECE_BYTES", 100_000)
    fetched = []
    fetch = ImageFiles._fetch

    def count(self: ImageFiles, layer: int, start: int, length: int) -> bytes:
        fetched.append(length)
        return fetch(self, layer, start, length)

    monkeypatch.setattr(ImageFiles, "_fetch", count)
    with open_index(path) as index, ImageFiles(index, RegistryAccess()) as files:
        assert len(index.span_table(0).group(0)) > 10
        assert files.read("/first") == PASSWD
        assert sum(fetched) < 1 << 20
        assert max(fetched) == 100_000
        assert files.read("/last") == PASSWD


def test_a_file_larger_than_expected_is_refused(files: ImageFiles) -> None:
    with pytest.raises(UsageError, match="larger than 100"):
        files.read("/large", limit=100)


def test_entries_carry_their_attributes(files: ImageFiles) -> None:
    entry = files.entry("/etc/passwd")
    assert entry is not None
    assert (entry.mode & 0o7777, entry.uid, entry.gid, entry.mtime_ns) == (0o640, 1, 2, 3 * 10**9)
    directory = files.entry("/real")
    assert directory is not None
    assert directory.content == b""
    assert files.is_directory("/dir")
    assert not files.is_directory("/etc/passwd")


@pytest.mark.parametrize(
    ("path", "way"),
    [
        ("/dir", ["/dir", "/real"]),
        ("/real/../dir/", ["/real", "/dir"]),
        ("/dir/passwd", ["/dir", "/real"]),
        ("/real/none/deeper", ["/real"]),
        ("/nowhere/x", ["/nowhere"]),
        ("/loop", ["/loop"]),
        ("/../..", []),
        ("/large", []),
    ],
)
def test_the_way_to_a_directory_names_its_links(
    files: ImageFiles, path: str, way: list[str]
) -> None:
    assert sorted(files.way(path)) == sorted(way)


def test_what_is_below_a_directory_is_all_of_it_or_nothing(files: ImageFiles) -> None:
    found = files.below("/real", limit=len(PASSWD))
    assert found is not None
    assert {name: entry.content for name, entry in found.items()} == {"/real/passwd": PASSWD}
    assert files.below("/real", limit=len(PASSWD) - 1) is None
    everything = files.below("/", limit=1 << 20)
    assert everything is not None
    assert everything["/etc/passwd"].content == b"../../../../real/passwd"
    assert everything["/large"].content == LARGE
    assert files.below("/large", limit=1 << 20) == {}


def test_bytes_that_are_not_the_indexed_ones_are_refused(
    files: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(_layer: int, _start: int, length: int) -> bytes:
        return bytes(length)

    monkeypatch.setattr(files, "_fetch", fetch)
    with pytest.raises(DigestError, match="expected digest"):
        files.read("/real/passwd")


def test_a_span_is_fetched_once(files: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[Any, ...]] = []
    original = files._fetch

    def fetch(layer: int, start: int, length: int) -> bytes:
        fetched.append((layer, start))
        return original(layer, start, length)

    monkeypatch.setattr(files, "_fetch", fetch)
    for _ in range(3):
        files.read("/real/passwd")
    assert len(fetched) == len(set(fetched))


def use_all(files: ImageFiles) -> None:
    """What bundles and stubs do with an image."""
    for path in ("/real/passwd", "/chain", "/large", "/empty", "/", "/loop"):
        files.entry(path)
        files.way(path)
        files.is_directory(path)
    files.below("/", limit=1 << 20)


def test_a_damaged_tree_is_a_clear_error_and_never_a_traceback(
    index_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = random.Random(7)
    refused = 0
    with open_index(index_path) as index:
        tree = index.tree()
        for _ in range(400):
            damaged = bytearray(tree)
            for _ in range(choose.randrange(1, 4)):
                damaged[choose.randrange(1024, len(damaged))] = choose.randrange(256)
            monkeypatch.setattr(type(index), "tree", lambda _self, tree=bytes(damaged): tree)
            try:
                with ImageFiles(index, RegistryAccess()) as files:
                    use_all(files)
                for path in ("/real", "/real/passwd", "/large", "/loop"):
                    try:
                        describe_file(index, sound_tree(index), path)
                    except NotFoundError:
                        continue
            except ClipError:
                refused += 1
    assert refused > 100


def test_a_tree_that_leads_out_of_its_layer_is_refused_before_anything_is_read(
    index_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_index(index_path) as index:
        small = replace(index.layers[0], size=index.layers[0].size - 512)
        monkeypatch.setattr(index, "layers", [small])
        with pytest.raises(IndexFormatError, match="tree"):
            ImageFiles(index, RegistryAccess())


def test_a_file_of_endless_spans_is_not_listed(
    index_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_command, "MAX_LISTED_SPANS", 2)
    with open_index(index_path) as index:
        tree = sound_tree(index)
        assert describe_file(index, tree, "/real/passwd")["extents"]
        with pytest.raises(IndexFormatError, match="not listed"):
            describe_file(index, tree, "/large")

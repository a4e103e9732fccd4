"""The container format: what is written comes back, what was tampered with does not."""

from __future__ import annotations

import hashlib
import os
import random
import struct
from typing import TYPE_CHECKING

import pytest
import zstandard

from clipshim.errors import IndexFormatError, NotFoundError
from clipshim.index.clip_format import ClipFile, write_clip
from tests.unit.index.samples import Stream

if TYPE_CHECKING:
    from pathlib import Path

HEADER = struct.Struct("<8sIIQ32s")
ROW = struct.Struct("<24sQQQB7x32s")
IMAGE = b'{"a": 1}' * 50
WINDOWS = bytes(range(256)) * 20
BLOB = b"compressed layer" * 10_000


def write(path: Path) -> str:
    return write_clip(
        path,
        [("image", IMAGE, "zstd"), ("windows", WINDOWS, "none"), ("blob.0", Stream(BLOB), "none")],
    )


def read_all(path: Path) -> None:
    with ClipFile.open(path) as clip:
        clip.section("image")
        clip.section("windows")
        clip.verify("blob.0")


def forge(path: Path, rows: list[tuple[bytes, int, int, int, int, bytes]], body: bytes) -> Path:
    """A file whose table says what the test wants, with right checksums."""
    table = b"".join(ROW.pack(*row) for row in rows)
    size = HEADER.size + len(table) + len(body)
    header = HEADER.pack(b"CLIPIDX\n", 1, len(rows), size, hashlib.sha256(table).digest())
    path.write_bytes(header + table + body)
    return path


@pytest.mark.parametrize("size", [1, 5000, 3_000_000])
def test_a_section_read_in_pieces_is_the_same(tmp_path: Path, size: int) -> None:
    tree = random.Random(1).randbytes(size // 3) + bytes(size - size // 3)
    path = tmp_path / "a.clip"
    for compression in ("zstd", "none"):
        write_clip(path, [("tree", tree, compression)])
        with ClipFile.open(path) as clip:
            pieces = list(clip.pieces("tree"))
            assert b"".join(pieces) == tree == clip.section("tree")
            assert max(map(len, pieces)) <= 1 << 20
            assert clip.unpacked_bytes == size


def test_a_section_in_pieces_is_verified_before_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.clip"
    write_clip(path, [("tree", random.Random(1).randbytes(3_000_000), "none")])
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with ClipFile.open(path) as clip, pytest.raises(IndexFormatError, match="sha256"):
        next(clip.pieces("tree"))


@pytest.mark.parametrize("declared", [2_999_999, 3_000_001])
def test_a_section_in_pieces_has_the_size_that_the_table_says(
    tmp_path: Path, declared: int
) -> None:
    stored = zstandard.compress(random.Random(1).randbytes(3_000_000))
    row = (b"tree", HEADER.size + ROW.size, len(stored), declared, 1, _sha(stored))
    path = forge(tmp_path / "a.clip", [row], stored)
    with ClipFile.open(path) as clip, pytest.raises(IndexFormatError, match="expected"):
        for _ in clip.pieces("tree"):
            pass


def _sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def test_sections_come_back(tmp_path: Path) -> None:
    digest = write(tmp_path / "a.clip")
    with ClipFile.open(tmp_path / "a.clip") as clip:
        assert clip.names == ("image", "windows", "blob.0")
        assert clip.section("image") == IMAGE
        assert clip.section("windows") == WINDOWS
        entry = clip.entry("blob.0")
        assert clip.pread(entry.offset, entry.stored_size) == BLOB
        clip.verify("blob.0")
        assert clip.digest() == digest
    assert digest == "sha256:" + hashlib.sha256((tmp_path / "a.clip").read_bytes()).hexdigest()


def test_the_head_of_a_section_is_read_alone(tmp_path: Path) -> None:
    big = os.urandom(1 << 20) + bytes(1 << 20)
    write_clip(tmp_path / "a.clip", [("tree", big, "zstd"), ("windows", WINDOWS, "none")])
    with ClipFile.open(tmp_path / "a.clip") as clip:
        for size in (1, 1000, 300_000):
            assert clip.head("tree", size) == big[:size]
        assert clip.head("windows", 10) == WINDOWS[:10]
        assert clip.head("windows", 1 << 20) == WINDOWS


def test_the_same_sections_give_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a.clip") == write(tmp_path / "b.clip")


def test_an_fd_stays_the_callers(tmp_path: Path) -> None:
    write(tmp_path / "a.clip")
    fd = os.open(tmp_path / "a.clip", os.O_RDONLY)
    try:
        with ClipFile.open(fd) as clip:
            assert clip.section("image") == IMAGE
        os.fstat(fd)
    finally:
        os.close(fd)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    class Broken:
        def read(self, size: int, /) -> bytes:
            raise RuntimeError(size)

    with pytest.raises(RuntimeError):
        write_clip(tmp_path / "a.clip", [("blob.0", Broken(), "none")])
    assert list(tmp_path.iterdir()) == []


def test_a_write_replaces_the_file_whole(tmp_path: Path) -> None:
    (tmp_path / "a.clip").write_bytes(b"before")
    write(tmp_path / "a.clip")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.clip"]
    assert (tmp_path / "a.clip").stat().st_mode & 0o777 == 0o644


def test_what_is_not_there_or_not_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        ClipFile.open(tmp_path / "missing")
    with pytest.raises(IndexFormatError, match="not a regular file"):
        ClipFile.open(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(IndexFormatError, match="not a regular file"):
        ClipFile.open(tmp_path / "fifo")


@pytest.mark.parametrize("size", [0, 1, 55, 56, 100, 319, 320, 400])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    write(tmp_path / "a.clip")
    os.truncate(tmp_path / "a.clip", size)
    with pytest.raises(IndexFormatError):
        ClipFile.open(tmp_path / "a.clip")


def test_bytes_after_the_end_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.clip")
    with open(tmp_path / "a.clip", "ab") as file:
        file.write(b"x")
    with pytest.raises(IndexFormatError):
        ClipFile.open(tmp_path / "a.clip")


def test_another_version_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.clip")
    data = bytearray((tmp_path / "a.clip").read_bytes())
    data[8] = 2
    (tmp_path / "a.clip").write_bytes(data)
    with pytest.raises(IndexFormatError, match="version 1, got 2"):
        ClipFile.open(tmp_path / "a.clip")


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.clip"
    write(path)
    good = path.read_bytes()
    rng = random.Random(7)
    places = [*range(340), *rng.sample(range(340, len(good)), 60)]
    for place in places:
        data = bytearray(good)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(IndexFormatError):
            read_all(path)


@pytest.mark.parametrize(
    ("name", "offset", "stored", "raw", "code"),
    [
        (b"image", 0, 4, 4, 0),  # into the header
        (b"image", 145, 3, 3, 0),  # a gap
        (b"image", 144, 1 << 63, 1 << 63, 0),  # far beyond the end
        (b"image", 144, 3, 3, 0),  # a byte that is no section's
        (b"image", 144, 4, 5, 0),
        (b"image", 144, 4, 4, 7),
        (b"../image", 144, 4, 4, 0),
        (b"Image", 144, 4, 4, 0),
        (b"", 144, 4, 4, 0),
        (b"a\0b", 144, 4, 4, 0),
    ],
)
def test_a_lying_table_is_refused(
    tmp_path: Path, name: bytes, offset: int, stored: int, raw: int, code: int
) -> None:
    path = forge(tmp_path / "f", [(name, offset, stored, raw, code, bytes(32))], b"body")
    with pytest.raises(IndexFormatError):
        ClipFile.open(path)


def test_sections_may_not_overlap_or_repeat(tmp_path: Path) -> None:
    start = HEADER.size + 2 * ROW.size
    same = (b"image", start, 4, 4, 0, bytes(32))
    with pytest.raises(IndexFormatError):
        ClipFile.open(forge(tmp_path / "f", [same, (b"tree", start, 4, 4, 0, bytes(32))], b"body"))
    twice = [same, (b"image", start + 4, 4, 4, 0, bytes(32))]
    with pytest.raises(IndexFormatError, match="two sections"):
        ClipFile.open(forge(tmp_path / "f", twice, b"bodybody"))


def test_what_compresses_too_well_is_stored_as_it_is(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.clip", [("tree", bytes(64 << 20), "zstd"), ("spans", b"", "zstd")])
    with ClipFile.open(tmp_path / "a.clip") as clip:
        assert clip.section("tree") == bytes(64 << 20)
        assert clip.section("spans") == b""


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    bomb = zstandard.compress(bytes(64 << 20))
    digest = hashlib.sha256(bomb).digest()
    rows = [(b"tree", HEADER.size + ROW.size, len(bomb), 64 << 20, 1, digest)]
    with pytest.raises(IndexFormatError, match="contradict"):
        ClipFile.open(forge(tmp_path / "f", rows, bomb))


def test_a_large_section_that_claims_to_unpack_to_little_is_not_read(tmp_path: Path) -> None:
    """A sparse file of terabytes is small on the disk, and not when it is read."""
    start, size = HEADER.size + ROW.size, 1 << 20
    path = forge(tmp_path / "f", [(b"image", start, size, 1000, 1, bytes(32))], bytes(size))
    with pytest.raises(IndexFormatError, match="contradict"):
        ClipFile.open(path)


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_what_cannot_be_compressed_comes_back(tmp_path: Path, size: int) -> None:
    noise = random.Random(5).randbytes(size)
    write_clip(tmp_path / "a.clip", [("tree", noise, "zstd")])
    with ClipFile.open(tmp_path / "a.clip") as clip:
        assert clip.section("tree") == noise


@pytest.mark.parametrize("rest", [b"x", bytes(8), zstandard.compress(b"more")])
def test_bytes_after_a_sections_frame_are_refused(tmp_path: Path, rest: bytes) -> None:
    stored = zstandard.compress(IMAGE) + rest
    digest = hashlib.sha256(stored).digest()
    rows = [(b"image", HEADER.size + ROW.size, len(stored), len(IMAGE), 1, digest)]
    with (
        ClipFile.open(forge(tmp_path / "f", rows, stored)) as clip,
        pytest.raises(IndexFormatError, match="zstd"),
    ):
        clip.section("image")


@pytest.mark.parametrize("declared", [1, 1000, (1 << 20) - 1])
def test_a_section_that_unpacks_to_another_size_is_refused(tmp_path: Path, declared: int) -> None:
    bomb = zstandard.compress(bytes(64 << 20))
    start = HEADER.size + ROW.size
    digest = hashlib.sha256(bomb).digest()
    path = forge(tmp_path / "f", [(b"tree", start, len(bomb), declared, 1, digest)], bomb)
    with pytest.raises(IndexFormatError), ClipFile.open(path) as clip:
        clip.section("tree")


def test_a_section_over_its_limit_is_not_even_read(tmp_path: Path) -> None:
    start = HEADER.size + ROW.size
    size = 17 << 20
    path = forge(tmp_path / "f", [(b"image", start, size, size, 0, bytes(32))], bytes(size))
    with ClipFile.open(path) as clip, pytest.raises(IndexFormatError, match="at most"):
        clip.section("image")


def test_a_section_over_its_limit_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(IndexFormatError, match="at most"):
        write_clip(tmp_path / "a.clip", [("image", bytes((16 << 20) + 1), "none")])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.clip")
    with ClipFile.open(tmp_path / "a.clip") as clip, pytest.raises(IndexFormatError, match="tree"):
        clip.section("tree")

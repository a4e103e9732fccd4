"""Layers, gzip and zstd streams and an image source for the index tests, all made by code."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import zlib
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import zstandard
from hypothesis import HealthCheck, settings
from isal import igzip, isal_zlib

from clipshim.registry.sources import LayerDescriptor
from tests.support import tar_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

GZIP_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"

# the same examples at each run, and no time limits: a loaded machine must not fail a test
steady = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=30,
    suppress_health_check=list(HealthCheck),
)


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def text(size: int, seed: int = 1) -> bytes:
    """Compressible bytes, with references over all distances, and some that are not."""
    rng = random.Random(seed)
    words = [bytes(rng.choices(range(97, 123), k=rng.randint(2, 9))) for _ in range(2000)]
    made = bytearray()
    while len(made) < size:
        made += b" ".join(rng.choices(words, k=3000))
        made += rng.randbytes(rng.randint(0, 3000))
        made += bytes([rng.randrange(256)]) * rng.randint(0, 5000)
    return bytes(made[:size])


def tar(seed: int, count: int = 12, *, largest: int = 60_000) -> bytes:
    """A layer with files that differ by seed."""
    rng = random.Random(seed)
    members = [tar_layers.directory(f"dir{seed}")]
    for number in range(count):
        data = text(rng.randint(0, largest), seed * 100 + number)
        members.append(tar_layers.member(f"dir{seed}/file{number}", data))
    return tar_layers.layer(*members)


def deflate(data: bytes, level: int = 6, *, flush_every: int = 0, mode: int = 0) -> bytes:
    """A gzip member, on request with a flush of `mode` after so many bytes."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, 31)
    step = flush_every or max(len(data), 1)
    parts = []
    for start in range(0, len(data), step):
        parts.append(compressor.compress(data[start : start + step]))
        if flush_every:
            parts.append(compressor.flush(mode))
    return b"".join([*parts, compressor.flush()])


def members(data: bytes, size: int, make: Callable[[bytes], bytes]) -> bytes:
    """Several members, each of `size` bytes of the data."""
    return b"".join(make(data[start : start + size]) for start in range(0, len(data), size))


def _isal(data: bytes) -> bytes:
    compressor = isal_zlib.compressobj(2, isal_zlib.DEFLATED, 31)
    return bytes(compressor.compress(data) + compressor.flush())


GZIP_WAYS: dict[str, Callable[[bytes], bytes]] = {
    "level 0": lambda data: deflate(data, 0),
    "level 1": lambda data: deflate(data, 1),
    "level 6": deflate,
    "level 9": lambda data: deflate(data, 9),
    "full flushes": lambda data: deflate(data, flush_every=30_011, mode=zlib.Z_FULL_FLUSH),
    "sync flushes": lambda data: deflate(data, flush_every=7_001, mode=zlib.Z_SYNC_FLUSH),
    "members": lambda data: members(data, 50_021, deflate),
    "tiny members": lambda data: members(data, 997, lambda part: deflate(part, 9)),
    "isal": _isal,
    "isal members": lambda data: members(data, 120_001, lambda part: igzip.compress(part, 1)),
    "zero padding": lambda data: deflate(data) + bytes(512),
    "trailing garbage": lambda data: deflate(data) + b"not gzip at all",
}


def _skippable(content: bytes) -> bytes:
    return b"\x5e\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content


def zstd(data: bytes, *, size_known: bool = True, checksum: bool = False) -> bytes:
    """One frame."""
    compressor = zstandard.ZstdCompressor(
        level=3, write_content_size=size_known, write_checksum=checksum
    ).compressobj(size=len(data) if size_known else -1)
    return compressor.compress(data) + compressor.flush()


ZSTD_WAYS: dict[str, Callable[[bytes], bytes]] = {
    "one frame": zstd,
    "one frame of unknown size": lambda data: zstd(data, size_known=False, checksum=True),
    "frames": lambda data: members(data, 90_001, zstd),
    "small frames": lambda data: members(data, 5_003, zstd),
    "frames and skippable ones": lambda data: (
        _skippable(b"first")
        + members(data, 70_001, lambda part: zstd(part) + _skippable(b"x" * 99))
    ),
    "frames of unknown size": lambda data: members(
        data, 40_009, lambda part: zstd(part, size_known=False)
    ),
}


class Stream(io.BytesIO):
    """A blob whose reads are short now and then, as those of sockets are."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            return super().read(size)
        return super().read(min(size, 1 + (self.tell() * 7919 + 50_000) % 100_003))


class Source:
    """An image whose layers are bytes in memory."""

    reference = "registry.example/app:1"
    manifest_digest = sha256(b"manifest")
    platform = "linux/amd64"
    manifest_raw = b"{}"

    def __init__(
        self, blobs: Iterable[bytes], tars: Iterable[bytes], media_type: str = GZIP_TYPE
    ) -> None:
        self.blobs = list(blobs)
        self.layers = [LayerDescriptor(sha256(blob), len(blob), media_type) for blob in self.blobs]
        diff_ids = [sha256(data) for data in tars]
        self.config_raw = json.dumps({"os": "linux", "rootfs": {"diff_ids": diff_ids}}).encode()
        self.opened: list[int] = []

    def open_layer(self, i: int) -> contextlib.AbstractContextManager[BinaryIO]:
        self.opened.append(i)
        return contextlib.closing(Stream(self.blobs[i]))


class Sample(NamedTuple):
    """An image in every encoding."""

    tars: list[bytes]
    blobs: list[bytes]

    def source(self) -> Source:
        return Source(self.blobs, self.tars)


def every_encoding() -> Sample:
    """One layer for each way to store one."""
    makers = [lambda data: data, *GZIP_WAYS.values(), *ZSTD_WAYS.values()]
    tars = [tar(number) for number in range(len(makers))]
    return Sample(tars, [make(data) for make, data in zip(makers, tars, strict=True)])

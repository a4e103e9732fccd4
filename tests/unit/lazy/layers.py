"""Layers made by code, and sources that misbehave on purpose."""

from __future__ import annotations

import gzip
import hashlib
import random
import threading
from typing import TYPE_CHECKING, Literal

import zstandard

from clipshim.errors import RegistryError
from clipshim.index.model import LayerInfo, layer_key
from clipshim.index.span_table import Span, SpanKind, SpanTable

if TYPE_CHECKING:
    from collections.abc import Callable

Form = Literal["plain", "gzip", "zstd", "one-frame"]
SPAN = 64 << 10


class MadeLayer:
    """A layer, its blob and its span table."""

    def __init__(
        self,
        size: int,
        *,
        form: Form = "gzip",
        span: int = SPAN,
        seed: int = 1,
        window_log: int | None = None,
    ) -> None:
        # Compressible, and different in every place.
        words = random.Random(seed).randbytes(16 << 10)
        parts = [words[(i * 37) % 9000 :][:4000] + b"%016d" % i for i in range(size // 4000 + 1)]
        self.data = b"".join(parts)[:size]
        pieces = [self.data[i : i + span] for i in range(0, size, span)]
        blob = bytearray()
        spans = []
        offset = 0
        kind: SpanKind = {  # type: ignore[assignment]
            "plain": "plain",
            "gzip": "gzip-start",
            "zstd": "zstd-frame",
            "one-frame": "zstd-frame",
        }[form]
        whole = _one_frame(self.data, window_log) if form == "one-frame" else b""
        for piece in pieces:
            if form == "one-frame":
                start, stored, skip = 0, whole, offset
                blob = bytearray(whole)
            else:
                start, skip = len(blob), 0
                if form == "gzip":
                    stored = gzip.compress(piece, 1, mtime=0)
                elif form == "zstd":
                    stored = zstandard.ZstdCompressor().compress(piece)
                else:
                    stored = piece
                blob += stored
            digest = hashlib.sha256(piece).digest()
            spans.append(Span(offset, len(piece), start, len(stored), 0, None, digest, kind, skip))
            offset += len(piece)
        self.blob = bytes(blob)
        compression: Literal["none", "gzip", "zstd"] = "zstd"
        if form in ("plain", "gzip"):
            compression = "none" if form == "plain" else "gzip"
        self.table = SpanTable(compression, size, len(self.blob), spans)
        diff_id = "sha256:" + hashlib.sha256(self.data).hexdigest()
        self.info = LayerInfo(
            diff_id=diff_id,
            blob_digest="sha256:" + hashlib.sha256(self.blob).hexdigest(),
            media_type="application/vnd.oci.image.layer.v1.tar",
            blob_size=len(self.blob),
            size=size,
            compression=compression,
            urls=(),
            key=layer_key(diff_id, self.table.pack()),
        )


def _one_frame(data: bytes, window_log: int | None) -> bytes:
    if window_log is None:
        return zstandard.ZstdCompressor().compress(data)
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


class MadeSource:
    """A source that counts, waits, fails or lies as it is told."""

    def __init__(
        self, layer: MadeLayer, *, name: str = "registry.test/image", service: str = "registry.test"
    ) -> None:
        self.name = name
        self.service = service
        self.layer = layer
        self.requests: list[tuple[int, int]] = []
        self.before: Callable[[int], None] | None = None  # gets the start, in the fetch thread
        self.error: Exception | None = None
        self.lie = False
        self.distrusted = 0
        self.gate: threading.Event | None = None
        self.silent: threading.Event | None = None  # till then; those in a hurry do not wait
        self.waited = 0
        self._lock = threading.Lock()

    def fetch(self, start: int, length: int, deadline: float, *, hurried: bool = False) -> bytes:
        with self._lock:
            self.requests.append((start, length))
        if self.silent and hurried:
            raise RegistryError("no byte came")
        if self.silent:
            self.waited += 1
            assert self.silent.wait(60)
        if self.gate is not None:
            assert self.gate.wait(60)
        if self.before is not None:
            self.before(start)
        if self.error is not None:
            raise self.error
        data = bytearray(self.layer.blob[start : start + length])
        if self.lie:
            data[len(data) // 2] ^= 0x40
        return bytes(data)

    def window(self, span: Span) -> bytes | None:
        return None

    def distrust(self) -> None:
        self.distrusted += 1

    @property
    def fetched_bytes(self) -> int:
        return sum(length for _, length in self.requests)

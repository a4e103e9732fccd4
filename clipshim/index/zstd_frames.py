"""One pass over a zstd stream: its uncompressed bytes, and the ranges that decode on their own.

zstd cannot resume inside a frame, so a range is one frame, or several small ones in a row. A
layer of one frame is one range: whoever reads from it decodes the whole range once, streaming, and
keeps all spans of the group. Frames are followed by their block headers (RFC 8878 section 3.1),
because the library does not say where in its input a frame ended.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, BinaryIO, Final, cast

import zstandard

from clipshim.errors import LayerError
from clipshim.index.gzip_checkpoints import Range
from clipshim.index.span_decode import ZSTD_MAX_WINDOW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_SKIPPABLE: Final = b"\x2a\x4d\x18"  # after one byte from 0x50 to 0x5f
_INPUT = 128 << 10
_OUTPUT = 256 << 10
_RLE_BLOCK = 1
_RESERVED_BLOCK = 3


def is_zstd(head: bytes) -> bool:
    """Whether a stream that starts with `head` (4 bytes or more) is zstd."""
    return head.startswith(ZSTD_MAGIC) or _is_skippable(head)


def _is_skippable(head: bytes) -> bool:
    return len(head) >= 4 and head[0] >> 4 == 5 and head[1:4] == _SKIPPABLE


def scan_zstd(
    read: Callable[[int], bytes], spacing: int, label: str
) -> Iterator[memoryview | Range]:
    """Yields the uncompressed bytes in chunks, and each Range after the last chunk of it.

    `read(n)` gives the compressed stream and is called to its end. Raises LayerError, which names
    `label`, for what zstd would refuse.
    """
    source = _Input(read, label)
    start = made = 0
    while magic := source.take(4):
        at = source.position - len(magic)
        if _is_skippable(magic):
            source.skip(struct.unpack("<I", source.take_all(4))[0])
            if not made:
                start = source.position
            continue
        if magic != ZSTD_MAGIC:
            raise LayerError(f"{label}: not a sound zstd stream at {at}: no frame starts there")
        frame = _Frame(source, magic)
        # a large frame does not join the small ones before it: they would have to wait for it
        if made and (frame.content_size is None or frame.content_size >= spacing // 2):
            yield Range("zstd-frame", start, at - start, 0, None)
            start, made = at, 0
        for chunk in frame.decoded():
            made += len(chunk)
            yield memoryview(chunk)
        if made >= spacing // 2 or (made and source.position - start > 4 * spacing):
            yield Range("zstd-frame", start, source.position - start, 0, None)
            made = 0
        if not made:
            start = source.position
    if made:
        yield Range("zstd-frame", start, source.position - start, 0, None)


class _Input:
    """The compressed stream with a position, in pieces of exact sizes."""

    def __init__(self, read: Callable[[int], bytes], label: str) -> None:
        self._read = read
        self.label = label
        self._buffer = b""
        self._at = 0
        self.position = 0

    def some(self, size: int) -> bytes:
        """1 to `size` bytes, or b"" at the end."""
        if self._at >= len(self._buffer):
            self._buffer, self._at = self._read(_INPUT), 0
        part = self._buffer[self._at : self._at + size]
        self._at += len(part)
        self.position += len(part)
        return part

    def take(self, size: int) -> bytes:
        """`size` bytes, or fewer at the end."""
        part = self.some(size)
        while 0 < len(part) < size:
            more = self.some(size - len(part))
            if not more:
                break
            part += more
        return part

    def take_all(self, size: int) -> bytes:
        """`size` bytes. Raises LayerError if the stream ends before."""
        part = self.take(size) if size else b""
        if len(part) < size:
            raise LayerError(
                f"{self.label}: zstd stream ends too early, after {self.position} bytes"
            )
        return part

    def skip(self, size: int) -> None:
        """Passes over `size` bytes. Raises LayerError if the stream ends before."""
        while size:
            size -= len(self.take_all(min(size, _INPUT)))


class _Frame:
    """The bytes of one frame as a file for the decoder, and what they decode to."""

    def __init__(self, source: _Input, magic: bytes) -> None:
        self._source = source
        descriptor = source.take_all(1)
        flags = descriptor[0]
        single_segment = flags >> 5 & 1
        rest_size = (0 if single_segment else 1) + (0, 1, 2, 4)[flags & 3]
        size_size = (single_segment, 2, 4, 8)[flags >> 6]
        rest = source.take_all(rest_size + size_size)
        self.content_size: int | None = None
        if size_size:
            self.content_size = int.from_bytes(rest[rest_size:], "little")
            self.content_size += 256 if size_size == 2 else 0
        self._ready = [magic + descriptor + rest]
        self._left = 0  # bytes of the current block
        self._last = False
        self._checksum = 4 if flags & 4 else 0
        self._ended = False

    def decoded(self) -> Iterator[bytes]:
        label, at = self._source.label, self._source.position
        decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW)
        file = cast("BinaryIO", self)  # only its read() is used
        try:
            with decompressor.stream_reader(file, read_size=_INPUT, closefd=False) as reader:
                while chunk := reader.read(_OUTPUT):
                    yield chunk
        except zstandard.ZstdError as exc:
            raise LayerError(f"{label}: not a sound zstd frame at {at}: {exc}") from exc
        if self.read(1):
            raise LayerError(f"{label}: not a sound zstd frame at {at}: it ends twice")

    def read(self, size: int) -> bytes:
        """Up to `size` bytes of the frame, b"" at its end."""
        parts: list[bytes] = []
        while size > 0:
            if self._ready:
                part = self._ready.pop()
                if len(part) > size:
                    self._ready.append(part[size:])
                    part = part[:size]
            elif self._left:
                part = self._source.some(min(self._left, size))
                if not part:
                    self._source.take_all(1)  # raises: the stream ends here
                self._left -= len(part)
            elif self._ended:
                break
            else:
                self._next_block()
                continue
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _next_block(self) -> None:
        if self._last:
            self._ended = True
            self._left = self._checksum
            return
        raw = self._source.take_all(3)
        header = int.from_bytes(raw, "little")
        self._last = bool(header & 1)
        kind, size = header >> 1 & 3, header >> 3
        if kind == _RESERVED_BLOCK:
            raise LayerError(
                f"{self._source.label}: not a sound zstd frame at {self._source.position}: "
                "reserved block type"
            )
        self._left = 1 if kind == _RLE_BLOCK else size
        self._ready.append(raw)

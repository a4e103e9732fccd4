"""Decoding one span, or the group of spans that share a compressed range, from its bytes.

Never produces more than was asked for, so that a hostile blob cannot fill the memory; does not
verify digests: the caller has them.

A gzip range starts at a checkpoint, usually in the middle of a byte. No library lets Python
insert single bits, so the decoder is fed empty deflate blocks first, which yield nothing, whose
number of bits brings it to the right place in a byte, with the range's first bits put into the
last byte of the prefix. After the end of a gzip member (8 bytes of trailer, RFC 1952 section 2.2)
the next one starts afresh.
"""

from __future__ import annotations

import contextlib
import itertools
import zlib
from typing import TYPE_CHECKING, BinaryIO, Final, cast

import zstandard
from isal import isal_zlib

from clipshim.errors import SpanDecodeError
from clipshim.index.span_table import MAX_SPAN_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from contextlib import AbstractContextManager

    from clipshim.index.span_table import SpanKind

    Chunk = bytes | memoryview
    Decoded = Generator[bytes, None, None]
    WindowTaker = Callable[[int], AbstractContextManager[None]]

GZIP_MAGIC: Final = b"\x1f\x8b"
# As the zstd command line: larger windows need an explicit flag there too.
ZSTD_MAX_WINDOW: Final = 128 << 20
# What nearly all compressors use at their usual levels; a decoder's memory grows up to the window.
SMALL_WINDOW: Final = 8 << 20
_ZSTD_HEADER: Final = 18  # RFC 8878 section 3.1.1: magic and a frame header of 14 bytes at most
_PIECE = 64 << 10
_TRAILER = 8
_ERRORS: Final = cast("tuple[type[Exception], ...]", (isal_zlib.error, zlib.error))

# Non-final deflate blocks without content, as (number of bits, bits with the first one lowest).
_FIXED = (10, 0b0000000_01_0)  # RFC 1951: BFINAL 0, BTYPE 01, the end of block code 0000000


def _empty_dynamic_block() -> tuple[int, int]:
    """A dynamic block (RFC 1951 section 3.2.7) with complete codes, of an odd number of bits."""
    fields = [(1, 0), (2, 2), (5, 0), (5, 1), (4, 15)]  # not final, 257 + 2 codes, 19 lengths
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)
    fields += [(3, 1 if symbol in (1, 18) else 0) for symbol in order]
    one, zeros = (1, 0), (1, 1)  # the codes of "length 1" and of "11 to 138 zeros"
    # literal 0 and the end of block have length 1, and so have both distances
    fields += [one, zeros, (7, 138 - 11), zeros, (7, 117 - 11), one, one, one]
    fields.append((1, 1))  # end of block
    total = value = 0
    for width, field in fields:
        value |= field << total
        total += width
    return total, value


def _prefixes() -> dict[int, bytes]:
    """For each number of bits that is left of a first byte, the blocks to feed before them."""
    dynamic = _empty_dynamic_block()
    found: dict[int, bytes] = {}
    for start, count in itertools.product(((0, 0), dynamic), range(4)):
        total, value = start
        for _ in range(count):
            value |= _FIXED[1] << total
            total += _FIXED[0]
        if total % 8:
            found[8 - total % 8] = value.to_bytes((total + 7) // 8, "little")
    return found


_PREFIX: Final = _prefixes()


def decode_span(
    kind: SpanKind,
    bits: int,
    window: bytes | None,
    compressed: bytes,
    size: int,
    skip: int = 0,
) -> bytes:
    """The `size` bytes of a span that start `skip` bytes into its compressed range.

    `bits`, `window` (up to 32 KiB) and `compressed` are those of the range.
    Raises SpanDecodeError if they do not give that many bytes.
    """
    sizes = [min(MAX_SPAN_SIZE, skip - start) for start in range(0, skip, MAX_SPAN_SIZE)]
    *_, span = decode_group(kind, bits, window, (compressed,), [*sizes, size])
    return span


def decode_group(
    kind: SpanKind,
    bits: int,
    window: bytes | None,
    chunks: Iterable[Chunk],
    sizes: Sequence[int],
    *,
    large_window: WindowTaker | None = None,
) -> Decoded:
    """The spans of a group one by one, from their compressed range in chunks of any size.

    Holds about one span, one chunk and, of zstd, a window of up to SMALL_WINDOW in memory; a larger
    one only in the block that `large_window` gives for its size. Reads no more chunks than it
    needs, and can be abandoned (closed) after any span. Raises SpanDecodeError.
    """
    if any(not 0 < size <= MAX_SPAN_SIZE for size in sizes):
        raise SpanDecodeError(f"spans of {sizes!r} bytes cannot be decoded")
    if kind == "plain":
        return _plain(chunks, sizes)
    if kind == "zstd-frame":
        return _zstd(chunks, sizes, large_window)
    return _gzip(kind, bits, window, chunks, sizes)


def _plain(chunks: Iterable[Chunk], sizes: Sequence[int]) -> Decoded:
    source = _Chunks(chunks)
    for size in sizes:
        span = source.read_whole(size)
        if len(span) != size:
            raise SpanDecodeError(f"expected {size} bytes, got {len(span)}")
        yield bytes(span)  # a view would keep all of its chunk


def _zstd(
    chunks: Iterable[Chunk], sizes: Sequence[int], large_window: WindowTaker | None
) -> Decoded:
    source = _ByteChunks(chunks)
    # What was made is all that a window can hold, so the size that a small range's frames declare
    # does not matter. A range that makes more is one frame, which begins where it begins.
    limit, needed = ZSTD_MAX_WINDOW, 0
    if sum(sizes) > SMALL_WINDOW:
        window = _window_size(source.peek(_ZSTD_HEADER))
        limit = max(window, SMALL_WINDOW)
        needed = min(window, sum(sizes)) if window > SMALL_WINDOW else 0
    with large_window(needed) if needed and large_window else contextlib.nullcontext():
        yield from _zstd_frames(source, sizes, limit)


def _window_size(head: bytes) -> int:
    try:
        size = int(zstandard.get_frame_parameters(head).window_size)
    except zstandard.ZstdError as exc:
        raise SpanDecodeError(f"zstd: {exc}") from exc
    if size > ZSTD_MAX_WINDOW:
        raise SpanDecodeError(f"zstd: a window of {size} bytes, at most {ZSTD_MAX_WINDOW} may be")
    return size


def _zstd_frames(source: _Chunks, sizes: Sequence[int], max_window: int) -> Decoded:
    decompressor = zstandard.ZstdDecompressor(max_window_size=max_window)
    file = cast("BinaryIO", source)  # only its read() is used
    with decompressor.stream_reader(
        file, read_size=_PIECE, read_across_frames=True, closefd=False
    ) as reader:
        for size in sizes:
            parts, missing = [], size
            while missing:
                try:
                    part = reader.read(missing)
                except zstandard.ZstdError as exc:
                    raise SpanDecodeError(f"zstd: {exc}") from exc
                if not part:
                    raise SpanDecodeError(f"zstd: expected {size} bytes, got {size - missing}")
                parts.append(part)
                missing -= len(part)
            yield parts[0] if len(parts) == 1 else b"".join(parts)


def _gzip(
    kind: SpanKind,
    bits: int,
    window: bytes | None,
    chunks: Iterable[Chunk],
    sizes: Sequence[int],
) -> Decoded:
    stream = GzipRange(kind, bits, window, chunks)
    for size in sizes:
        span = stream.read(size)
        if len(span) != size:
            raise SpanDecodeError(f"gzip: expected {size} bytes, got {len(span)}")
        yield span


class GzipRange:
    """A reader of what a gzip range decodes to."""

    def __init__(
        self, kind: SpanKind, bits: int, window: bytes | None, chunks: Iterable[Chunk]
    ) -> None:
        """See decode_group. Raises SpanDecodeError for bits that cannot be."""
        self._source = _Chunks(chunks)
        self._input: Chunk = b""
        self._full = False  # the decoder may hold output back although its input is empty
        if kind == "gzip-start":
            self._decoder = isal_zlib.decompressobj(31)
            self._raw = False
            return
        self._raw = True
        self._decoder = (
            isal_zlib.decompressobj(-15, zdict=window) if window else isal_zlib.decompressobj(-15)
        )
        if not bits:
            return
        prefix = _PREFIX.get(bits)
        first = self._source.read_whole(1)
        if prefix is None or not first:
            raise SpanDecodeError(f"gzip: no range with {bits} bits of its first byte")
        self._input = prefix[:-1] + bytes([prefix[-1] | (first[0] >> (8 - bits) << (8 - bits))])

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end of the range. Raises SpanDecodeError."""
        parts: list[bytes] = []
        while size:
            if not self._input and not self._full:
                self._input = self._source.read(_PIECE) if parts else self._source.read_all(size)
                if not self._input:
                    break
            try:
                part = self._decoder.decompress(self._input, size)
            except _ERRORS as exc:
                raise SpanDecodeError(f"gzip: {exc}") from exc
            self._full = len(part) == size
            size -= len(part)
            if part:
                parts.append(part)
            if self._decoder.eof:
                self._full = False
                if not self._next_member():
                    break
            else:
                self._input = self._decoder.unconsumed_tail
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _next_member(self) -> bool:
        """Goes on behind the end of a gzip member; False if no other one follows."""
        rest = self._decoder.unused_data
        needed = _TRAILER if self._raw else 0
        while len(rest) < needed + len(GZIP_MAGIC):
            more = self._source.read(_PIECE)
            if not more:
                break
            rest += more
        if rest[needed : needed + len(GZIP_MAGIC)] != GZIP_MAGIC:
            self._input = b""
            self._source.exhaust()
            return False
        self._input = rest[needed:]
        self._decoder = isal_zlib.decompressobj(31)
        self._raw = False
        return True


class _Chunks:
    """Chunks as a file: `read` gives what is at hand, `read_whole` all that was asked for."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._chunks = iter(chunks)
        self._chunk: Chunk = b""
        self._position = 0

    def read(self, size: int = _PIECE) -> Chunk:
        while self._position >= len(self._chunk):
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._chunk, self._position = chunk, 0
        part = self._chunk[self._position : self._position + size]
        self._position += len(part)
        return part

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, which are to be read again; fewer only at the end."""
        head = bytes(self.read_whole(size))
        self._chunk, self._position = b"".join((head, self._chunk[self._position :])), 0
        return head

    def read_all(self, wanted: int) -> Chunk:
        """The rest of a chunk if `wanted` bytes of output need about that much, else a piece."""
        return self.read(max(wanted + _PIECE, _PIECE))

    def read_whole(self, size: int) -> Chunk:
        parts = []
        while size:
            part = self.read(size)
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def exhaust(self) -> None:
        self._chunks = iter(())
        self._chunk, self._position = b"", 0


class _ByteChunks(_Chunks):
    """The same for a decoder that takes nothing but bytes."""

    def read(self, size: int = _PIECE) -> bytes:
        return bytes(super().read(size))

"""One pass over a gzip stream: its uncompressed bytes, and places where decoding can resume.

Uses libz through ctypes, because only it tells where deflate blocks end (Z_BLOCK) and hands out
the window (inflateGetDictionary). Keeps no more than a few chunks in memory, whatever the
stream's size. What becomes of the bytes and the ranges is builder.py's.
"""

from __future__ import annotations

import ctypes
import sys
from array import array
from typing import TYPE_CHECKING, Final, NamedTuple

import zstandard

from clipshim.errors import LayerError, SpanDecodeError
from clipshim.index.span_decode import GZIP_MAGIC, GzipRange
from clipshim.index.span_table import MAX_WINDOW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from clipshim.index.span_table import SpanKind

_INPUT = 128 << 10
_OUTPUT = 256 << 10
# A range ends at the next block after that many compressed bytes even if it yields little.
_MAX_COMPRESSED = 4 << 20
_MAX_HEAD = 64 << 10

Z_NO_FLUSH = 0  # zlib.h
Z_BLOCK = 5
Z_OK = 0
Z_STREAM_END = 1
Z_BUF_ERROR = -5
_GZIP_ONLY = 16 + 15  # inflateInit2: gzip wrapper, 32 KiB window
_AT_BLOCK_END = 128  # inflate's data_type
_IN_LAST_BLOCK = 64


class _ZStream(ctypes.Structure):
    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


def _load() -> ctypes.CDLL:
    libz = ctypes.CDLL("libz.so.1")
    stream = ctypes.POINTER(_ZStream)
    libz.zlibVersion.restype = ctypes.c_char_p
    libz.inflateInit2_.argtypes = (stream, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
    libz.inflate.argtypes = (stream, ctypes.c_int)
    libz.inflateReset.argtypes = (stream,)
    libz.inflateEnd.argtypes = (stream,)
    libz.inflateGetDictionary.argtypes = (
        stream,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_uint),
    )
    return libz


class Range(NamedTuple):
    """Compressed bytes that decode on their own; said when all of its uncompressed bytes were."""

    kind: SpanKind
    compressed_offset: int  # the byte that holds the first bit
    compressed_size: int
    bits: int  # as in Span
    window: bytes | None  # up to 32 KiB before it; only for gzip-mid
    head: bytes = b""  # gzip-mid: the range's first bytes, as a rule enough to decode head_size
    head_size: int = 0  # uncompressed bytes, at most 32 KiB


def scan_gzip(
    read: Callable[[int], bytes], spacing: int, label: str
) -> Iterator[memoryview | Range]:
    """Yields the uncompressed bytes in chunks, and each Range after the last chunk of it.

    `read(n)` gives the compressed stream and is called to its end; a chunk is the receiver's to
    keep. Several members are one stream; what follows the last one and does not look like gzip is
    ignored, as gzip does. Raises LayerError, which names `label`, for what gzip would refuse.
    """
    scanner = _Scanner(read, spacing, label)
    try:
        yield from scanner.run()
    finally:
        scanner.close()


class _Scanner:
    def __init__(self, read: Callable[[int], bytes], spacing: int, label: str) -> None:
        try:
            self._libz = _load()
        except (OSError, AttributeError) as exc:
            raise LayerError(
                f"{label}: cannot use libz.so.1: {exc}", hint="install zlib1g 1.2.8 or later"
            ) from exc
        self._read, self._spacing, self._label = read, spacing, label
        self._stream = _ZStream()
        self._input = b""
        self._input_at = 0  # offset in the blob of self._input
        self._address: ctypes.c_char_p | None = None
        result = self._libz.inflateInit2_(
            self._stream, _GZIP_ONLY, self._libz.zlibVersion(), ctypes.sizeof(_ZStream)
        )
        if result != Z_OK:
            raise LayerError(f"{label}: cannot start libz: error {result}")
        # the range that is being made
        self._kind: SpanKind = "gzip-start"
        self._start = self._bits = self._made = 0
        self._window: bytes | None = None
        self._head: list[bytes] = []
        self._head_from = -1  # where in self._input the head goes on; -1: it is complete
        self._head_size = 0
        self._last_byte = b""  # of the input before self._input

    def close(self) -> None:
        self._libz.inflateEnd(self._stream)

    @property
    def _position(self) -> int:
        """Offset in the blob of the next byte that inflate will take."""
        return self._input_at + len(self._input) - int(self._stream.avail_in)

    def run(self) -> Iterator[memoryview | Range]:
        stream = self._stream
        buffer = bytearray()
        while True:
            # whole buffers first; then block by block, to stop at the first end of one
            wanted = min(_OUTPUT, self._spacing - self._made)
            overdue = wanted <= 0
            wanted = wanted if wanted > 0 else _OUTPUT
            if len(buffer) != wanted:  # else it is left from a member that yielded nothing
                buffer = bytearray(wanted)
            out = (ctypes.c_char * len(buffer)).from_buffer(buffer)
            stream.next_out, stream.avail_out = ctypes.addressof(out), len(buffer)
            result = Z_OK
            while stream.avail_out and result != Z_STREAM_END:
                if not stream.avail_in and not self._refill():
                    raise LayerError(
                        f"{self._label}: gzip stream ends too early, after {self._position} bytes"
                    )
                overdue = overdue or self._position - self._start > _MAX_COMPRESSED
                result = self._libz.inflate(stream, Z_BLOCK if overdue else Z_NO_FLUSH)
                if result not in (Z_OK, Z_STREAM_END, Z_BUF_ERROR):
                    self._damaged(result)
                if overdue and self._at_checkpoint():
                    break
            count = len(buffer) - stream.avail_out
            del out  # a bytearray cannot be handed on while ctypes exports it
            self._made += count
            if self._made >= MAX_WINDOW:
                self._finish_head()
            if count:
                yield memoryview(buffer)[:count]
                buffer = bytearray()
            if result == Z_STREAM_END:
                ended = self._position
                if not self._next_member():
                    if self._made:
                        yield self._range(ended)
                    return
                # a start of its own costs no window, so it may come early
                if self._made >= self._spacing // 2:
                    yield self._range(ended)
                if not self._made or self._made >= self._spacing // 2:
                    self._begin("gzip-start", ended, 0, None)
            elif overdue and self._at_checkpoint():
                if self._made:
                    yield self._range(self._position)
                bits = stream.data_type & 7
                start = self._position - (1 if bits else 0)
                self._begin("gzip-mid", start, bits, self._dictionary())

    def _at_checkpoint(self) -> bool:
        return int(self._stream.data_type) & (_AT_BLOCK_END | _IN_LAST_BLOCK) == _AT_BLOCK_END

    def _range(self, end: int) -> Range:
        self._finish_head()
        size = end - self._start
        return Range(
            self._kind,
            self._start,
            size,
            self._bits,
            self._window,
            b"".join(self._head)[:_MAX_HEAD],
            self._head_size,
        )

    def _begin(self, kind: SpanKind, start: int, bits: int, window: bytes | None) -> None:
        self._kind, self._start, self._bits, self._window = kind, start, bits, window
        self._made = 0
        self._head.clear()
        self._head_from, self._head_size = -1, 0
        if window is None:
            return
        at = start - self._input_at
        if at < 0:  # the byte that is shared was the last one of the input before
            self._head.append(self._last_byte)
            at = 0
        self._head_from = at

    def _finish_head(self) -> None:
        if self._head_from >= 0:
            end = len(self._input) - int(self._stream.avail_in)
            self._head.append(self._input[self._head_from : end])
            self._head_from, self._head_size = -1, min(self._made, MAX_WINDOW)

    def _refill(self) -> bool:
        if self._head_from >= 0:
            self._head.append(self._input[self._head_from :])
            self._head_from = 0
        if self._input:
            self._last_byte = self._input[-1:]
        self._input_at += len(self._input)
        self._input = self._read(_INPUT)
        self._address = ctypes.c_char_p(self._input)
        self._stream.next_in = ctypes.cast(self._address, ctypes.c_void_p)
        self._stream.avail_in = len(self._input)
        return bool(self._input)

    def _next_member(self) -> bool:
        """Whether another member follows; if none does, reads the stream to its end."""
        self._finish_head()  # no member can refer to the one before it
        rest = self._input[len(self._input) - int(self._stream.avail_in) :]
        while len(rest) < len(GZIP_MAGIC):
            more = self._read(_INPUT)
            if not more:
                break
            rest += more
        self._input_at = self._position
        self._input = rest
        self._last_byte = b""
        if not rest.startswith(GZIP_MAGIC):
            while self._read(_INPUT):
                pass
            return False
        self._address = ctypes.c_char_p(rest)
        self._stream.next_in = ctypes.cast(self._address, ctypes.c_void_p)
        self._stream.avail_in = len(rest)
        self._libz.inflateReset(self._stream)
        return True

    def _dictionary(self) -> bytes:
        window = ctypes.create_string_buffer(MAX_WINDOW)
        size = ctypes.c_uint(0)
        if self._libz.inflateGetDictionary(self._stream, window, ctypes.byref(size)) != Z_OK:
            raise LayerError(f"{self._label}: libz gives no window at byte {self._position}")
        return window.raw[: size.value]

    def _damaged(self, result: int) -> None:
        text = (self._stream.msg or b"").decode("ascii", "replace") or f"error {result}"
        raise LayerError(f"{self._label}: not a sound gzip stream at {self._position}: {text}")


# Windows in which a byte tells where it lies: one by the place modulo 255, one by the place
# divided by 255, each plus 1, so that neither byte is 0.
_ROW: Final = 255
_ZEROS: Final = bytes(MAX_WINDOW)
_COLUMNS: Final = bytes(place % _ROW + 1 for place in range(MAX_WINDOW))
_ROWS: Final = bytes(place // _ROW + 1 for place in range(MAX_WINDOW))
_PLACES: Final = array("H", bytes(2 << 16))  # by both bytes as one native integer
for _place in range(MAX_WINDOW):
    _PLACES[int.from_bytes((_COLUMNS[_place], _ROWS[_place]), sys.byteorder)] = _place


def pack_window(piece: Range) -> bytes:
    """The window of a range as an index stores it; b"" if decoding does not need it.

    Bytes that the range does not refer to become zeros, of which zstd makes next to nothing.
    """
    if not piece.window:
        return b""
    window = piece.window.rjust(MAX_WINDOW, b"\0")
    places = _places_needed(piece)
    if places is not None:
        sparse = bytearray(MAX_WINDOW)
        for place in places:
            sparse[place] = window[place]
        window = bytes(sparse)
    window = window.lstrip(b"\0")
    if not window:
        return b""
    return zstandard.ZstdCompressor(level=9, write_checksum=False).compress(window)


def _places_needed(piece: Range) -> Iterable[int] | None:
    """The places in the 32 KiB window that the range refers to; None: not known.

    Found by decoding the first 32 KiB with windows that tell places apart: further on nothing can
    refer to the window itself (RFC 1951: distances end at 32 KiB). What is not the same as with a
    window of zeros comes from the window, and the difference is its place. The work is in a few
    calls that handle all bytes, since this is done for every checkpoint.
    """
    size = piece.head_size
    outputs = []
    try:
        for marks in (_ZEROS, _COLUMNS, _ROWS):
            output = GzipRange("gzip-mid", piece.bits, marks, (piece.head,)).read(size)
            if len(output) != size:
                return None
            outputs.append(int.from_bytes(output, "little"))
    except SpanDecodeError:
        return None
    zeros, columns, rows = outputs
    column_marks = (columns ^ zeros).to_bytes(size, "little").translate(None, b"\0")
    row_marks = (rows ^ zeros).to_bytes(size, "little").translate(None, b"\0")
    pairs = bytearray(2 * len(column_marks))
    pairs[::2], pairs[1::2] = column_marks, row_marks
    return map(_PLACES.__getitem__, set(memoryview(pairs).cast("H")))

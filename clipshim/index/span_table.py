"""The spans of one layer: what to fetch for which bytes, how to decode them, and their digests.

Held as packed columns; a Span object is made when one is asked for. Knows no files and decodes
nothing: span_decode.py does.

Spans follow each other from 0 to the layer's end. Usually each has compressed bytes of its own.
Where decoding can resume only rarely (one large zstd frame, one huge deflate block) several
spans in a row share one compressed range and are a *group*: `skip` says how many decoded bytes
of the range come before the span.

Packed, little endian: header "<4sBBHIQQ" (magic, version, compression, 0, count, layer size,
blob size), then one column after the other: uncompressed size (8 bytes each), compressed offset
(8), compressed size (8), stored window size (4), bits (1), kind (1), sha256 (32). Offsets are
sums: of sizes for spans, of window sizes for windows, which are relative to the layer's own part
of the windows section. So the packed table depends on the layer alone, not on the image.
"""

from __future__ import annotations

import bisect
import itertools
import struct
import sys
from array import array
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from clipshim.errors import IndexFormatError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LayerCompression = Literal["none", "gzip", "zstd"]
SpanKind = Literal["gzip-mid", "gzip-start", "zstd-frame", "plain"]

# A span is decoded and verified in memory before a byte of it is served.
MAX_SPAN_SIZE: Final = 32 << 20
# Bytes of a range that a reader must be ready to hold; zstd frames may be longer and are streamed.
MAX_GZIP_RANGE: Final = 256 << 20
MAX_LAYER_SIZE: Final = 1 << 42
# Each span costs a reader about 100 bytes of memory, whatever its size. The builder's are 32 KiB
# at the least, but for the last ones of ranges.
MIN_MEAN_SPAN: Final = 4096
FEW_SPANS: Final = 1024  # that may be of any size
MAX_WINDOW: Final = 32768
# A window of 32 KiB that zstd could not make smaller, with room for its frame.
MAX_STORED_WINDOW: Final = MAX_WINDOW + 1024

_HEADER = struct.Struct("<4sBBHIQQ")
_MAGIC = b"SPAN"
_VERSION = 1
_ROW_SIZE = 8 + 8 + 8 + 4 + 1 + 1 + 32
_CONTINUES = 0x80  # in the kind column: the span shares the range of the one before it
_KINDS: Final[tuple[SpanKind, ...]] = ("gzip-mid", "gzip-start", "zstd-frame", "plain")
_COMPRESSIONS: Final[tuple[LayerCompression, ...]] = ("none", "gzip", "zstd")
_ALLOWED: Final[dict[LayerCompression, frozenset[SpanKind]]] = {
    "none": frozenset({"plain"}),
    "gzip": frozenset({"gzip-mid", "gzip-start"}),
    "zstd": frozenset({"zstd-frame"}),
}
assert array("I").itemsize == 4
assert array("Q").itemsize == 8


class Span(NamedTuple):
    """One span. Offsets and sizes in bytes."""

    uncompressed_offset: int
    uncompressed_size: int
    compressed_offset: int  # the byte of the blob that holds the first bit needed
    compressed_size: int  # of the range that decoding needs
    bits: int  # high bits of the range's first byte that belong to it; 0: all of them
    window: tuple[int, int] | None  # offset in the layer's part of the windows section, size
    digest: bytes  # sha256 of the uncompressed bytes
    kind: SpanKind
    skip: int  # decoded bytes of the range before the span; 0 unless it is in a group


class SpanTable:
    """The spans of one layer, as a sequence."""

    __slots__ = (
        "_bits", "_csizes", "_digests", "_kinds", "_leaders", "_offsets", "_starts",
        "_window_offsets", "_window_sizes", "blob_size", "compression", "size",
    )  # fmt: skip

    def __init__(
        self, compression: LayerCompression, size: int, blob_size: int, spans: Iterable[Span]
    ) -> None:
        """Makes a table from spans, which must be sound: `unpack` checks, this does not."""
        self.compression: LayerCompression = compression
        self.size = size
        self.blob_size = blob_size
        sizes, self._starts, self._csizes = array("Q"), array("Q"), array("Q")
        self._window_sizes = array("I")
        self._bits, self._kinds, digests = bytearray(), bytearray(), bytearray()
        for span in spans:
            sizes.append(span.uncompressed_size)
            self._starts.append(span.compressed_offset)
            self._csizes.append(span.compressed_size)
            first = not span.skip
            self._window_sizes.append(span.window[1] if span.window and first else 0)
            self._bits.append(span.bits)
            self._kinds.append(_KINDS.index(span.kind) | (0 if first else _CONTINUES))
            digests += span.digest
        self._digests = bytes(digests)
        self._sum_up(sizes)

    def _sum_up(self, sizes: array[int]) -> None:
        self._offsets = array("Q", itertools.accumulate(sizes, initial=0))
        self._window_offsets = array("Q", itertools.accumulate(self._window_sizes, initial=0))
        self._leaders = array("I")  # the first span of each span's group
        leader = 0
        for i, kind in enumerate(self._kinds):
            leader = leader if kind & _CONTINUES else i
            self._leaders.append(leader)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Span:
        if i < 0:
            i += len(self)
        if not 0 <= i < len(self):
            raise IndexError(i)
        leader = self._leaders[i]
        window_size = self._window_sizes[leader]
        offset = self._offsets[i]
        return Span(
            offset,
            self._offsets[i + 1] - offset,
            self._starts[i],
            self._csizes[i],
            self._bits[i],
            (self._window_offsets[leader], window_size) if window_size else None,
            self._digests[32 * i : 32 * i + 32],
            _KINDS[self._kinds[leader]],
            offset - self._offsets[leader],
        )

    def __iter__(self) -> Iterator[Span]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpanTable) and self.pack() == other.pack()

    __hash__ = None  # type: ignore[assignment]

    @property
    def windows_size(self) -> int:
        """Size of the layer's part of the windows section."""
        return self._window_offsets[-1]

    def find(self, offset: int) -> int:
        """The number of the span that holds the byte at `offset` of the layer.

        Raises IndexError outside of the layer.
        """
        if not 0 <= offset < self.size:
            raise IndexError(offset)
        return bisect.bisect_right(self._offsets, offset) - 1

    def group(self, i: int) -> range:
        """The numbers of the spans that share the compressed range of span `i`, with it."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        end = i + 1
        while end < len(self) and self._kinds[end] & _CONTINUES:
            end += 1
        return range(self._leaders[i], end)

    def pack(self) -> bytes:
        """The table as bytes; equal tables give equal bytes."""
        sizes = array("Q", map(int.__sub__, self._offsets[1:], self._offsets[:-1]))
        columns = [_little(a) for a in (sizes, self._starts, self._csizes, self._window_sizes)]
        header = _HEADER.pack(
            _MAGIC,
            _VERSION,
            _COMPRESSIONS.index(self.compression),
            0,
            len(self),
            self.size,
            self.blob_size,
        )
        return b"".join([header, *columns, self._bits, self._kinds, self._digests])

    @classmethod
    def unpack(
        cls,
        data: bytes,
        compression: LayerCompression,
        size: int,
        blob_size: int,
        windows_size: int,
        *,
        label: str = "layer",
    ) -> SpanTable:
        """The table in `data`, checked against what the index says of its layer.

        Raises IndexFormatError for every contradiction.
        """
        if not 0 <= size <= MAX_LAYER_SIZE or not 0 <= blob_size <= MAX_LAYER_SIZE:
            raise IndexFormatError(f"{label}: size {size} or {blob_size} is out of range")
        if len(data) < _HEADER.size:
            raise IndexFormatError(f"{label}: span table is cut off")
        magic, version, code, zero, count, its_size, its_blob_size = _HEADER.unpack_from(data)
        if (magic, version, zero) != (_MAGIC, _VERSION, 0):
            raise IndexFormatError(f"{label}: not a span table")
        told = (code, its_size, its_blob_size)
        if told != (_COMPRESSIONS.index(compression), size, blob_size):
            raise IndexFormatError(f"{label}: span table is of another layer")
        if len(data) != _HEADER.size + count * _ROW_SIZE:
            raise IndexFormatError(f"{label}: span table has the wrong size for {count} spans")
        if count > FEW_SPANS and size < count * MIN_MEAN_SPAN:
            raise IndexFormatError(
                f"{label}: expected spans of {MIN_MEAN_SPAN} bytes on average, got {count} of"
                f" {size // count}",
                hint="index the image again: clipshim index IMAGE",
            )
        table = cls(compression, size, blob_size, ())
        position = _HEADER.size

        def column(width: int) -> bytes:
            nonlocal position
            position += width * count
            return data[position - width * count : position]

        sizes = _from_little("Q", column(8))
        table._starts = _from_little("Q", column(8))
        table._csizes = _from_little("Q", column(8))
        table._window_sizes = _from_little("I", column(4))
        table._bits = bytearray(column(1))
        table._kinds = bytearray(column(1))
        table._digests = column(32)
        # first of all: a sum beyond 64 bits would be an OverflowError below
        if count and not 0 < min(sizes) <= max(sizes) <= MAX_SPAN_SIZE:
            raise IndexFormatError(f"{label}: span of less than 1 or over {MAX_SPAN_SIZE} bytes")
        table._sum_up(sizes)
        if table._offsets[-1] != size:
            raise IndexFormatError(
                f"{label}: expected spans of {size} bytes, got {table._offsets[-1]}"
            )
        if table.windows_size != windows_size:
            raise IndexFormatError(
                f"{label}: expected windows of {table.windows_size} bytes, got {windows_size}"
            )
        table._check_rows(label)
        return table

    def _check_rows(self, label: str) -> None:
        """Refuses ranges out of the blob, out of order, overlapping, or of the wrong kind."""
        allowed = _ALLOWED[self.compression]
        start, end, raw_kind = 0, 0, -1
        for i, span_kind in enumerate(self._kinds):
            where = f"{label}: span {i}"
            if (span_kind & ~_CONTINUES) >= len(_KINDS):
                raise IndexFormatError(f"{where}: unknown kind {span_kind}")
            kind = _KINDS[span_kind & ~_CONTINUES]
            if kind not in allowed:
                raise IndexFormatError(f"{where}: kind {kind} in a {self.compression} layer")
            offset, csize = self._starts[i], self._csizes[i]
            bits, window = self._bits[i], self._window_sizes[i]
            if csize == 0 or offset + csize > self.blob_size:
                raise IndexFormatError(
                    f"{where}: bytes {offset} to {offset + csize} of a blob of {self.blob_size}"
                )
            if span_kind & _CONTINUES:
                same = (offset, offset + csize, span_kind & ~_CONTINUES) == (start, end, raw_kind)
                if not same or bits != self._bits[i - 1] or window or kind == "plain":
                    raise IndexFormatError(f"{where}: continues a range that is another one")
                continue
            # the byte that holds the end of one deflate block and the start of the next is shared
            if offset < end - (1 if bits else 0):
                raise IndexFormatError(f"{where}: overlaps the range before it")
            if kind == "gzip-mid":
                if bits > 7 or window > MAX_STORED_WINDOW or csize > MAX_GZIP_RANGE:
                    raise IndexFormatError(f"{where}: bits, window or range out of bounds")
            elif bits or window:
                raise IndexFormatError(f"{where}: bits or window without a checkpoint")
            if kind == "plain" and not (
                offset == self._offsets[i] and csize == self._offsets[i + 1] - offset
            ):
                raise IndexFormatError(f"{where}: plain bytes that lie elsewhere")
            start, end, raw_kind = offset, offset + csize, span_kind


def _little(column: array[int]) -> bytes:
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return column.tobytes()


def _from_little(typecode: Literal["Q", "I"], data: bytes) -> array[int]:
    column = array(typecode, data)
    if sys.byteorder == "big":
        column.byteswap()
    return column

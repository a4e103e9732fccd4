"""Which spans to fetch ahead of a layer's reads. Decides only.

A layer is read by several streams at once, files of different places. A stream that reads every
byte, as `cat` or a copy does, runs ahead by as much as it has read. One that leaves bytes out, as
a program does that is being loaded, jumps on before long: it runs ahead by a quarter of it only,
so that what is fetched in vain stays in proportion. An isolated read costs no more than its span.

Beside the streams there are neighbourhoods: files that are used together were packed together, as
the modules of a language are, and a program that starts asks for them in an order that nobody can
foresee, one after the other. Once a good part of a neighbourhood has been read, the rest comes too.

Reads that a profile foretold teach nothing: it knows what else will be read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

STREAMS = 8
LONGEST = 32
BATCH = 8  # spans that are asked for together once a stream is long
DENSE = 0.9  # of the bytes that a stream has passed, to count as reading everything
# Measured with the starts of programs: 5 of 16 takes a third of the waiting away and fetches an
# eighth more; 4 of 16 gains little for twice that.
NEIGHBOURS = 16
KNOWN_NEIGHBOURS = 5


class _Stream:
    __slots__ = ("ahead", "begin", "first", "last", "read")

    def __init__(self, first: int, last: int, begin: int, read: int) -> None:
        self.first = first  # the span that it began with
        self.last = last  # the span that was read last
        self.ahead = last + 1  # the first span that was not asked for ahead
        self.begin = begin  # its first byte
        self.read = read  # bytes

    def window(self, end: int) -> int:
        """How many spans after the last one ought to be under way, having got to byte `end`."""
        length = self.last + 1 - self.first
        if self.read >= DENSE * (end - self.begin):
            return min(LONGEST, length)
        return min(LONGEST, max(1, length // 4))


class Readahead:
    """The streams of one layer."""

    def __init__(self, spans: int) -> None:
        self._spans = spans
        self._read = bytearray(spans)  # 1 for each span that was read
        self._foretold: set[int] = set()
        self._streams: list[_Stream] = []  # least recently used first

    def foretell(self, spans: Iterable[int]) -> None:
        """These spans will be read, and are fetched by somebody who knows it."""
        self._foretold.update(spans)

    def advance(self, first: int, last: int, offset: int, size: int) -> list[int]:
        """Notes a read of `size` bytes in the spans `first` to `last`; returns what to fetch ahead.

        Spans that were read or asked for before may be among it.
        """
        if first in self._foretold and last in self._foretold:
            return []
        ahead = list(self._advance_stream(first, last, offset, size))
        for span in range(first, last + 1):
            if not self._read[span]:
                self._read[span] = 1
                ahead += self._neighbours(span)
        return ahead

    def _neighbours(self, span: int) -> range:
        """The neighbourhood of a span if enough of it was read, the last span just now."""
        start = span - span % NEIGHBOURS
        stop = min(start + NEIGHBOURS, self._spans)
        known = self._read.count(1, start, stop)
        return range(start, stop) if known == KNOWN_NEIGHBOURS else range(0)

    def _advance_stream(self, first: int, last: int, offset: int, size: int) -> range:
        """The kernel's own readahead may send the reads of one stream out of order."""
        for stream in self._streams:
            if stream.last - 1 <= first <= stream.ahead:
                break
        else:
            self._streams.append(_Stream(first, last, offset, size))
            del self._streams[:-STREAMS]
            return range(0)
        self._streams.remove(stream)
        self._streams.append(stream)
        stream.first = min(stream.first, first)
        stream.begin = min(stream.begin, offset)
        stream.read += size
        if last <= stream.last:
            return range(0)
        stream.last = last
        stream.ahead = max(stream.ahead, last + 1)
        window = stream.window(offset + size)
        # not span by span, so that requests stay large
        if stream.ahead - last - 1 > window - min(BATCH, max(1, window // 4)):
            return range(0)
        wanted = range(stream.ahead, max(stream.ahead, min(self._spans, last + 1 + window)))
        stream.ahead = wanted.stop
        return wanted

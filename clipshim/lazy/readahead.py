"""Which spans to fetch ahead of a layer's reads. Decides only.

A layer is read by several streams at once, files of different places. A stream that goes on runs
ahead by up to half of what it has read, so that what is fetched in vain stays in proportion; an
isolated read costs no more than its own span.
"""

from __future__ import annotations

STREAMS = 8
LONGEST = 32


class _Stream:
    __slots__ = ("ahead", "first", "last")

    def __init__(self, first: int, last: int) -> None:
        self.first = first  # the span that it began with
        self.last = last  # the span that was read last
        self.ahead = last + 1  # the first span that was not asked for ahead


class Readahead:
    """The streams of one layer."""

    def __init__(self, spans: int) -> None:
        self._spans = spans
        self._streams: list[_Stream] = []  # least recently used first

    def advance(self, first: int, last: int) -> range:
        """Notes a read of the spans `first` to `last`; returns the spans to fetch ahead."""
        for stream in self._streams:
            if stream.last <= first <= stream.ahead and last >= stream.last:
                break
        else:
            self._streams.append(_Stream(first, last))
            del self._streams[:-STREAMS]
            return range(0)
        self._streams.remove(stream)
        self._streams.append(stream)
        if last == stream.last:
            return range(0)
        stream.last = last
        stream.ahead = max(stream.ahead, last + 1)
        window = min(LONGEST, max(1, (last + 1 - stream.first) // 2))
        # asked for again when a quarter of it was used, so that requests stay large
        if stream.ahead - last - 1 > window - max(1, window // 4):
            return range(0)
        wanted = range(stream.ahead, max(stream.ahead, min(self._spans, last + 1 + window)))
        stream.ahead = wanted.stop
        return wanted

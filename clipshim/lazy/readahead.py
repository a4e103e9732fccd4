"""Which spans to fetch ahead of a layer's reads. Decides only.

A layer is read by several streams at once, files of different places. Reads that go on
where a stream has been let it run ahead, from the CERTAIN-th span on and up to LONGEST spans; an
isolated read costs no more than its own span.
"""

from __future__ import annotations

STREAMS = 8
LONGEST = 8
# Of spans entered one after the other. Most programs and libraries end within two spans: starting
# Python fetched 4 % less than with 1, and long files are as fast.
CERTAIN = 2


class _Stream:
    __slots__ = ("ahead", "last", "steps", "window")

    def __init__(self, last: int) -> None:
        self.last = last  # the span that was read last
        self.ahead = last + 1  # the first span that was not asked for ahead
        self.window = 0
        self.steps = 0


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
            self._streams.append(_Stream(last))
            del self._streams[:-STREAMS]
            return range(0)
        self._streams.remove(stream)
        self._streams.append(stream)
        if last == stream.last:
            return range(0)
        stream.last = last
        stream.steps += 1
        stream.ahead = max(stream.ahead, last + 1)
        # asked for again when half of what is ahead was used: the next fetch is under way in time
        if stream.window and stream.ahead - last - 1 > stream.window // 2:
            return range(0)
        if stream.steps < CERTAIN:
            return range(0)
        stream.window = min(LONGEST, max(1, stream.window * 2))
        end = min(self._spans, last + 1 + stream.window)
        wanted = range(stream.ahead, max(end, stream.ahead))
        stream.ahead = wanted.stop
        return wanted

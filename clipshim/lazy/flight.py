"""Flights: one fetch of a span, shared by all who wait for it; and runs of adjacent spans.

Not for what happens in a fetch (span_fetch.py) nor for who starts one (layer_reader.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import trio

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clipshim.errors import ClipError
    from clipshim.index.span_table import SpanTable
    from clipshim.lazy.fetching import Ticket

RUN_BYTES = 4 << 20  # compressed bytes of a ranged request
RUN_SPANS = 8
GAP_BYTES = 64 << 10  # between two ranges, fetched along rather than asked for separately


class Flight:
    """The way of one span to its readers. Ends exactly once, with data, stored, or an error."""

    __slots__ = ("data", "error", "event", "span", "stored", "ticket", "waiters")

    def __init__(self, span: int, ticket: Ticket) -> None:
        self.span = span
        self.ticket = ticket
        self.event = trio.Event()
        self.waiters = 0
        self.data: bytes | None = None  # only for those who wait
        self.stored = False
        self.error: ClipError | None = None

    def land(self, data: bytes | None, *, stored: bool) -> None:
        """The span was verified; it is in the store if `stored`."""
        self.data = data if self.waiters else None
        self.stored = stored
        self.event.set()

    def fail(self, error: ClipError) -> None:
        """The span cannot be had now."""
        self.error = error
        self.event.set()


class Part(NamedTuple):
    """One group of spans: they share a compressed range of the blob."""

    spans: range
    start: int
    end: int


def parts_of(table: SpanTable, spans: Iterable[int]) -> list[Part]:
    """The groups that hold these spans, in order, each once."""
    parts: list[Part] = []
    for span in sorted(spans):
        if parts and span in parts[-1].spans:
            continue
        group = table.group(span)
        entry = table[group.start]
        start = entry.compressed_offset
        parts.append(Part(group, start, start + entry.compressed_size))
    return parts


def runs_of(parts: Iterable[Part]) -> list[list[Part]]:
    """Neighbours that are worth one request together."""
    runs: list[list[Part]] = []
    for part in parts:
        run = runs[-1] if runs else None
        if (
            run
            and len(run) < RUN_SPANS
            and part.spans.start == run[-1].spans.stop
            and part.start - run[-1].end <= GAP_BYTES
            and part.end - run[0].start <= RUN_BYTES
        ):
            run.append(part)
        else:
            runs.append([part])
    return runs

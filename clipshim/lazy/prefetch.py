"""Fetches spans before somebody asks for them: a profile in its order, or whole layers.

Whoever waits for a span goes first (fetching.py), so a prefetch costs a reader at most the fetch
that is under way. Cancel it by its scope. Not for deciding what and when: the caller does.
"""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING

import trio

from clipshim.errors import ClipError
from clipshim.lazy.flight import RUN_SPANS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from clipshim.lazy.layer_reader import LayerReader

log = logging.getLogger(__name__)

PARALLEL = 4
# Entries of the order within which neighbours are looked for: they are fetched at about the same
# time anyway, and one request for both costs half as much.
TOGETHER = 32


async def prefetch(readers: Sequence[LayerReader | None], order: Iterable[tuple[int, int]]) -> int:
    """Fetches (layer number, span) in order; `readers` by layer number. Returns how many came.

    Stops at the first error, which is logged: what is really needed will be asked for anyway.
    """
    batches = _batches(readers, order)
    came = 0
    failed: ClipError | None = None

    async def work() -> None:
        nonlocal came, failed
        for reader, spans in batches:
            if failed is not None:
                return
            try:
                await reader.fetch_spans(spans)
            except ClipError as exc:
                failed = exc
                return
            came += len(spans)

    async with trio.open_nursery() as nursery:
        for _ in range(PARALLEL):
            nursery.start_soon(work)
    if failed is not None:
        log.warning("prefetch stopped after %d spans: %s", came, failed)
    return came


def everything(readers: Sequence[LayerReader | None]) -> Iterator[tuple[int, int]]:
    """The order that fetches all layers whole, the last and usually smallest ones first."""
    for number in range(len(readers) - 1, -1, -1):
        reader = readers[number]
        if reader is not None:
            yield from ((number, span) for span in range(len(reader.table)))


def _batches(
    readers: Sequence[LayerReader | None], order: Iterable[tuple[int, int]]
) -> Iterator[tuple[LayerReader, list[int]]]:
    """Neighbours in their layer together, so that they share a request; else as the order says."""
    entries = iter(order)
    while chunk := list(itertools.islice(entries, TOGETHER)):
        yield from _batches_of(readers, sorted(set(chunk)))


def _batches_of(
    readers: Sequence[LayerReader | None], order: Iterable[tuple[int, int]]
) -> Iterator[tuple[LayerReader, list[int]]]:
    for number, entries in itertools.groupby(order, key=lambda entry: entry[0]):
        reader = readers[number] if number < len(readers) else None
        if reader is None:
            continue
        batch: list[int] = []
        for _, span in entries:
            if span >= len(reader.table) or reader.stored.has(span):
                continue
            if batch and (span != batch[-1] + 1 or len(batch) >= RUN_SPANS):
                yield reader, batch
                batch = []
            batch.append(span)
        if batch:
            yield reader, batch

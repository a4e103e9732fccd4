"""One attempt to fetch a run of spans: ranged request, decoding, verification, storing.

Runs in a thread. A range that is longer than one request is fetched in pieces while it is
decoded, so memory holds a piece and a span, whatever the size of a zstd frame.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clipshim.errors import ClipError, DigestError, LayerError, SpanDecodeError
from clipshim.index.span_decode import SMALL_WINDOW, decode_group
from clipshim.lazy.flight import RUN_BYTES
from clipshim.lazy.stored_layer import StoreFullError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from clipshim.index.span_table import SpanTable
    from clipshim.lazy.flight import Part
    from clipshim.lazy.span_source import SpanSource
    from clipshim.lazy.stored_layer import StoredLayer
    from clipshim.lazy.window_memory import WindowMemory

log = logging.getLogger(__name__)

SLOWEST_LINK = 64 << 10  # bytes a second


@dataclass(slots=True)
class Attempt:
    """What an attempt came to. `bad` spans were refused; `cause` is why the fetch itself failed."""

    bad: dict[int, LayerError] = field(default_factory=dict)
    cause: ClipError | None = None
    hurried: bool = False
    requests: int = 0
    fetched_bytes: int = 0


def attempt_s(length: int, deadline_s: float) -> float:
    """How long one attempt may take, of the deadline that a reader has.

    Only a part, so that a dead registry is known as such while readers still wait and the next
    ones need not find out for themselves; more for long ranges, for the sake of slow links.
    """
    return min(deadline_s, deadline_s / 4 + length / SLOWEST_LINK)


def memory_needed(table: SpanTable, run: list[Part]) -> int:
    """An upper bound of what an attempt holds at a time."""
    compressed = min(run[-1].end - run[0].start, RUN_BYTES)
    largest = max(table[span].uncompressed_size for part in run for span in part.spans)
    window = 0
    if table[run[0].spans.start].kind == "zstd-frame":  # more than this: window_memory.py
        window = min(SMALL_WINDOW, max(_decoded_size(table, part) for part in run))
    return compressed + 2 * largest + window


def _decoded_size(table: SpanTable, part: Part) -> int:
    first, last = table[part.spans.start], table[part.spans.stop - 1]
    end = last.uncompressed_offset + last.uncompressed_size
    return end - first.uncompressed_offset


def fetch_run(
    source: SpanSource,
    table: SpanTable,
    stored: StoredLayer,
    run: list[Part],
    wanted: set[int],
    land: Callable[[int, bytes, bool], None],
    deadline_s: float,
    windows: WindowMemory,
    hurried: bool = False,
) -> Attempt:
    """Fetches the `wanted` spans of a run; `land` gets each as soon as it was verified.

    `deadline_s` is what a reader has; long ranges take several requests. `hurried`: see SpanSource.
    Never raises for what sources and disks do.
    """
    attempt = Attempt(hurried=hurried)
    whole: memoryview | None = None
    start = run[0].start
    try:
        if run[-1].end - start <= RUN_BYTES:
            whole = memoryview(_fetch(source, start, run[-1].end - start, deadline_s, attempt))
        for part in run:
            chunks: Iterable[bytes | memoryview]
            if whole is None:
                chunks = _pieces(source, part, deadline_s, attempt)
            else:
                chunks = (whole[part.start - start : part.end - start],)
            _decode_part(source, table, stored, part, chunks, wanted, land, attempt, windows)
    except ClipError as exc:
        attempt.cause = exc
    except OSError as exc:
        attempt.cause = LayerError(f"{source.name}: {exc}")
    return attempt


def _fetch(
    source: SpanSource, start: int, length: int, deadline_s: float, attempt: Attempt
) -> bytes:
    attempt.requests += 1
    deadline = time.monotonic() + attempt_s(length, deadline_s)
    hurried = attempt.hurried and not attempt.fetched_bytes
    data = source.fetch(start, length, deadline, hurried=hurried)
    if len(data) != length:
        raise LayerError(f"{source.name}: bytes {start}+{length}: got {len(data)} bytes")
    attempt.fetched_bytes += length
    return data


def _pieces(source: SpanSource, part: Part, deadline_s: float, attempt: Attempt) -> Iterator[bytes]:
    position = part.start
    while position < part.end:
        length = min(RUN_BYTES, part.end - position)
        yield _fetch(source, position, length, deadline_s, attempt)
        position += length


def _decode_part(
    source: SpanSource,
    table: SpanTable,
    stored: StoredLayer,
    part: Part,
    chunks: Iterable[bytes | memoryview],
    wanted: set[int],
    land: Callable[[int, bytes, bool], None],
    attempt: Attempt,
    windows: WindowMemory,
) -> None:
    needed = [span for span in part.spans if span in wanted]
    if not needed:
        return
    leader = table[part.spans.start]
    spans = range(part.spans.start, needed[-1] + 1)
    pending = set(needed)
    try:
        window = source.window(leader)
        sizes = [table[span].uncompressed_size for span in spans]
        group = decode_group(
            leader.kind, leader.bits, window, chunks, sizes, large_window=windows.taken
        )
        # an error's traceback would keep it alive, and the memory that it took
        with contextlib.closing(group) as decoded:
            for span, data in zip(spans, decoded, strict=True):
                if span not in pending:
                    continue
                digest = hashlib.sha256(data).digest()
                if digest != table[span].digest:
                    raise DigestError(
                        f"layer {stored.key}: span {span}: expected digest"
                        f" {table[span].digest.hex()}, got {digest.hex()} from {source.name}"
                    )
                pending.discard(span)
                land(span, data, _store(stored, span, data))
    except (DigestError, SpanDecodeError) as exc:
        # what follows in the same range comes from the same bad bytes
        attempt.bad.update(dict.fromkeys(pending, exc))


def _store(stored: StoredLayer, span: int, data: bytes) -> bool:
    if stored.has(span):
        return True
    try:
        stored.put(span, data)
    except StoreFullError:
        return False
    except (ClipError, OSError) as exc:
        log.error("layer %s: span %d cannot be stored: %s", stored.key, span, exc)
        return False
    return True

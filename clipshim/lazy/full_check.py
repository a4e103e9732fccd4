"""Makes a layer complete: fetches what is missing, then checks the whole against its diff ID.

Only then is the layer marked complete, so `complete` means: this is the layer that the image's
configuration names, not merely what an index said of it.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

import trio

from clipshim.errors import ClipError, DigestError, StoreError
from clipshim.lazy.flight import RUN_SPANS

if TYPE_CHECKING:
    from collections.abc import Callable

    from clipshim.lazy.layer_reader import LayerReader

log = logging.getLogger(__name__)

PARALLEL = 4
ROUNDS = 3  # a span that was evicted while the rest was fetched is fetched again


async def complete_layer(
    reader: LayerReader, progress: Callable[[int, int], None] | None = None
) -> None:
    """Returns when the layer is whole, checked, on the disk and marked so.

    `progress` is called with (bytes of the layer that are here, its size). Raises DigestError if
    the layer is not the one it should be (then all of it is thrown away), StoreError if there is
    no room for it, and what the fetches raise.
    """
    stored = reader.stored
    if stored.is_complete:
        await trio.lowlevel.checkpoint()
        return
    for _ in range(ROUNDS):
        await _fetch_missing(reader, progress)
        if all(stored.has(span) for span in range(len(reader.table))):
            break
    else:
        raise StoreError(
            f"layer {reader.layer.diff_id}: not all of its {reader.size} bytes stay in the store",
            hint="make room on its file system, or raise cache_bytes",
        )
    digest = await trio.to_thread.run_sync(_hash, reader)
    if digest != reader.layer.diff_id:
        await trio.to_thread.run_sync(
            stored.reset, f"expected {reader.layer.diff_id}, got {digest}"
        )
        raise DigestError(
            f"layer {reader.layer.diff_id}: expected that digest, got {digest}",
            hint="the index is wrong about this layer: make it anew",
        )
    await trio.to_thread.run_sync(stored.mark_complete)


async def _fetch_missing(reader: LayerReader, progress: Callable[[int, int], None] | None) -> None:
    missing = [span for span in range(len(reader.table)) if not reader.stored.has(span)]
    batches = iter([missing[i : i + RUN_SPANS] for i in range(0, len(missing), RUN_SPANS)])
    here = reader.size - sum(reader.table[span].uncompressed_size for span in missing)

    failed: ClipError | None = None

    async def work() -> None:
        nonlocal here, failed
        for spans in batches:
            if progress is not None:
                progress(here, reader.size)
            try:
                await reader.fetch_spans(spans)
            except ClipError as exc:
                failed = exc
            if failed is not None:
                return
            here += sum(reader.table[span].uncompressed_size for span in spans)

    async with trio.open_nursery() as nursery:
        for _ in range(PARALLEL):
            nursery.start_soon(work)
    if failed is not None:
        raise failed
    if progress is not None:
        progress(here, reader.size)


def _hash(reader: LayerReader) -> str:
    digest = hashlib.sha256()
    for piece in reader.stored.iterate(0, reader.size):
        digest.update(piece)
    return f"sha256:{digest.hexdigest()}"

"""The layer store on a file system that is really full."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

import pytest
import trio

from clipshim.lazy.fetching import Fetching
from clipshim.lazy.layer_reader import LayerReader
from clipshim.lazy.layer_store import LayerStore
from clipshim.settings import Settings
from tests.unit.lazy.layers import MadeLayer, MadeSource

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
MNT_DETACH = 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    libc = ctypes.CDLL(None, use_errno=True)
    target = tmp_path / "small"
    target.mkdir()
    if libc.mount(b"small", bytes(target), b"tmpfs", 0, b"size=4m"):
        raise OSError(ctypes.get_errno(), "mount")
    yield target
    libc.umount2(bytes(target), MNT_DETACH)


async def read_all(reader: LayerReader, layer: MadeLayer) -> None:
    for offset in range(0, layer.info.size, 100_000):
        data = bytes(await reader.read(offset, 100_000))
        assert data == layer.data[offset : offset + 100_000]


@pytest.mark.parametrize("form", ["gzip", "one-frame"])
def test_reads_go_on_while_the_disk_is_full_and_caching_when_it_is_not(
    small_disk: Path, form: str
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(3 * MIB))
    layer = MadeLayer(3 * MIB, form=form)  # type: ignore[arg-type]
    source = MadeSource(layer)

    async def main() -> None:
        store = LayerStore(str(small_disk / "layers"), limit_bytes=1 << 30)
        async with trio.open_nursery() as nursery:
            fetching = Fetching(nursery, Settings({"memory_bytes": 4 * MIB}))
            stored = store.open(layer.info, layer.table)
            reader = LayerReader(layer.info, layer.table, stored, fetching)
            reader.add_source(source)
            await read_all(reader, layer)
            assert reader.statistics.uncached_spans or store.statistics().evicted_bytes
            assert not all(stored.has(span) for span in range(len(layer.table)))
            ballast.unlink()
            while not all(stored.has(span) for span in range(len(layer.table))):
                await read_all(reader, layer)  # what memory still holds is not fetched
                fetching.recent.clear()
            requests = len(source.requests)
            await read_all(reader, layer)
            assert len(source.requests) == requests
            nursery.cancel_scope.cancel()
        store.close()

    trio.run(main)


def test_the_store_leaves_the_free_space_it_was_told_to(small_disk: Path) -> None:
    layer = MadeLayer(3 * MIB)

    async def main() -> None:
        store = LayerStore(str(small_disk / "layers"), limit_bytes=1 << 30, min_free_bytes=2 * MIB)
        async with trio.open_nursery() as nursery:
            fetching = Fetching(nursery, Settings())
            stored = store.open(layer.info, layer.table)
            reader = LayerReader(layer.info, layer.table, stored, fetching)
            reader.add_source(MadeSource(layer))
            await read_all(reader, layer)
            nursery.cancel_scope.cancel()
        state = os.statvfs(small_disk)
        # eight fetches at a time may pass the check together
        assert state.f_bavail * state.f_frsize >= 2 * MIB - 8 * 65536
        assert store.statistics().used_bytes > 0
        store.close()

    trio.run(main)

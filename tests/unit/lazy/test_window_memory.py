"""Memory for large zstd windows: bounded for all together, and always given back."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import trio

from clipshim.errors import ClipError, LayerError
from clipshim.index.span_decode import SMALL_WINDOW
from clipshim.lazy.fetching import Fetching
from clipshim.lazy.flight import parts_of, runs_of
from clipshim.lazy.layer_reader import LayerReader
from clipshim.lazy.layer_store import LayerStore
from clipshim.lazy.span_fetch import memory_needed
from clipshim.lazy.window_memory import WindowMemory
from clipshim.settings import Settings
from tests.unit.lazy.layers import MadeLayer, MadeSource

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def test_never_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = WindowMemory(100)
    held = most = 0
    lock = threading.Lock()

    def work(size: int) -> None:
        nonlocal held, most
        for _ in range(50):
            with memory.taken(size):
                with lock:
                    held += min(size, 100)
                    most = max(most, held)
                with lock:
                    held -= min(size, 100)

    threads = [threading.Thread(target=work, args=(size,)) for size in (10, 40, 60, 100, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < most <= 100
    assert memory.free == 100


def test_waiting_ends_in_an_error_that_says_why() -> None:
    memory = WindowMemory(100, patience_s=0.0)
    with memory.taken(60):
        with pytest.raises(LayerError, match="zstd window of 50 bytes"), memory.taken(50):
            pass
        with memory.taken(40):
            assert memory.free == 0
    assert memory.free == 100


def test_the_usual_window_belongs_to_what_a_fetch_needs() -> None:
    small = MadeLayer(MIB, form="zstd")
    large = MadeLayer(20 * MIB, form="one-frame", span=MIB)
    plain = MadeLayer(MIB, form="plain")
    need = {}
    for name, layer in (("small", small), ("large", large), ("plain", plain)):
        run = runs_of(parts_of(layer.table, [0]))[0]
        need[name] = memory_needed(layer.table, run) - 2 * layer.table[0].uncompressed_size
        need[name] -= min(run[-1].end - run[0].start, 4 << 20)
    assert need == {"small": 64 << 10, "large": SMALL_WINDOW, "plain": 0}


@pytest.mark.parametrize("lie", [False, True])
def test_a_layer_with_a_large_window_is_read_and_leaves_no_memory_taken(
    tmp_path: Path, lie: bool
) -> None:
    layer = MadeLayer(20 * MIB, form="one-frame", span=MIB, window_log=24)
    source = MadeSource(layer)
    source.lie = lie
    taken: list[int] = []

    async def main() -> None:
        store = LayerStore(str(tmp_path / "layers"), limit_bytes=1 << 30)
        async with trio.open_nursery() as nursery:
            fetching = Fetching(nursery, Settings({"fetch_deadline_s": 60.0}))
            memory = fetching.windows
            take = memory.taken

            def note(size: int) -> object:
                taken.append(size)
                return take(size)

            memory.taken = note  # type: ignore[method-assign,assignment]
            stored = store.open(layer.info, layer.table)
            reader = LayerReader(layer.info, layer.table, stored, fetching)
            reader.add_source(source)
            if lie:
                with pytest.raises(ClipError):
                    await reader.read(19 * MIB, 100)
            else:
                assert bytes(await reader.read(19 * MIB, 100)) == layer.data[19 * MIB :][:100]
            assert set(taken) == {16 * MIB}
            with trio.fail_after(60):
                while memory.free != memory.total:
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        store.close()

    trio.run(main)

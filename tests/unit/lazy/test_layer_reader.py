"""Reads of a layer: right bytes, one fetch for many readers, failures that stay where they are."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from clipshim.errors import AuthError, ClipError, DigestError, PolicyError, RegistryError
from clipshim.lazy import layer_reader
from clipshim.lazy.fetching import Fetching
from clipshim.lazy.layer_reader import LayerReader
from clipshim.lazy.layer_store import LayerStore
from clipshim.settings import Settings
from tests.unit.lazy.layers import SPAN, Form, MadeLayer, MadeSource

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

MIB = 1 << 20


def make_settings(**values: object) -> Settings:
    return Settings({"fetch_deadline_s": 60.0, **values})


@contextlib.asynccontextmanager
async def reading(
    path: Path,
    layer: MadeLayer,
    *sources: MadeSource,
    settings: Settings | None = None,
    store: LayerStore | None = None,
) -> AsyncIterator[LayerReader]:
    """A reader of a layer with a store of its own."""
    store = store or LayerStore(str(path / "layers"), limit_bytes=1 << 30)
    async with trio.open_nursery() as nursery:
        fetching = Fetching(nursery, settings or make_settings())
        reader = LayerReader(layer.info, layer.table, store.open(layer.info, layer.table), fetching)
        for source in sources:
            reader.add_source(source)
        yield reader
        nursery.cancel_scope.cancel()
    store.close()


@pytest.mark.parametrize("form", ["plain", "gzip", "zstd", "one-frame"])
def test_random_ranges_are_the_layers_bytes(tmp_path: Path, form: Form) -> None:
    layer = MadeLayer(3 * MIB + 12345, form=form)
    source = MadeSource(layer)

    async def main() -> None:
        chance = random.Random(4)
        async with reading(tmp_path, layer, source) as reader:
            for _ in range(100):
                offset = chance.randrange(layer.info.size + 100)
                size = chance.choice([1, 4096, 100_000, 1 << 20])
                data = bytes(await reader.read(offset, size))
                assert data == layer.data[offset : offset + size]

    trio.run(main)


def test_a_second_reader_process_finds_everything_in_the_store(tmp_path: Path) -> None:
    layer = MadeLayer(2 * MIB)

    async def main(source: MadeSource) -> None:
        async with reading(tmp_path, layer, source) as reader:
            for offset in range(0, layer.info.size, 100_000):
                data = bytes(await reader.read(offset, 100_000))
                assert data == layer.data[offset : offset + 100_000]

    first, second = MadeSource(layer), MadeSource(layer)
    trio.run(main, first)
    trio.run(main, second)
    assert first.requests
    assert not second.requests


def test_concurrent_readers_of_a_span_cause_one_request(tmp_path: Path) -> None:
    layer = MadeLayer(MIB)
    source = MadeSource(layer)
    source.gate = threading.Event()

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader, trio.open_nursery() as readers:

            async def read(offset: int) -> None:
                assert bytes(await reader.read(offset, 100)) == layer.data[offset : offset + 100]

            for i in range(200):
                readers.start_soon(read, 2 * SPAN + i * 13)
            await trio.testing.wait_all_tasks_blocked()
            assert source.gate is not None
            source.gate.set()
        assert len(source.requests) == 1

    trio.run(main)


def test_a_cancelled_reader_does_not_harm_the_others(tmp_path: Path) -> None:
    layer = MadeLayer(MIB)
    source = MadeSource(layer)
    source.gate = threading.Event()

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader, trio.open_nursery() as readers:
            scope = trio.CancelScope()

            async def impatient() -> None:
                with scope:
                    await reader.read(0, 100)

            async def patient() -> None:
                assert bytes(await reader.read(50, 100)) == layer.data[50:150]

            readers.start_soon(impatient)
            await trio.testing.wait_all_tasks_blocked()
            readers.start_soon(patient)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert source.gate is not None
            source.gate.set()
        assert len(source.requests) == 1

    trio.run(main)


@pytest.mark.parametrize("form", ["plain", "gzip", "one-frame"])
def test_wrong_bytes_are_never_served_nor_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form
) -> None:
    monkeypatch.setattr(layer_reader, "RETRY_PAUSE_S", 0.001)
    layer = MadeLayer(MIB, form=form)
    source = MadeSource(layer)
    source.lie = True

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader:
            wrong = 0
            for offset in range(0, layer.info.size, SPAN):
                try:
                    data = bytes(await reader.read(offset, SPAN))
                except ClipError:
                    wrong += 1
                else:
                    assert data == layer.data[offset : offset + SPAN]
            assert wrong
            assert reader.statistics.verify_failures
            assert reader.statistics.read_errors == wrong
            source.lie = False
            for offset in range(0, layer.info.size, SPAN):
                data = bytes(await reader.read(offset, SPAN))
                assert data == layer.data[offset : offset + SPAN]

    trio.run(main)


def test_another_source_helps_out_when_one_lies(tmp_path: Path) -> None:
    layer = MadeLayer(MIB)
    liar, honest = MadeSource(layer), MadeSource(layer, name="mirror", service="mirror")
    liar.lie = True

    async def main() -> None:
        async with reading(tmp_path, layer, liar, honest) as reader:
            assert bytes(await reader.read(0, MIB)) == layer.data
            assert reader.statistics.read_errors == 0
            assert reader.statistics.verify_failures

    trio.run(main)


def test_a_silent_registry_is_not_waited_for_when_another_one_has_the_layer(
    tmp_path: Path,
) -> None:
    layer = MadeLayer(4 * MIB)
    dead = MadeSource(layer, service="dead.test")
    dead.silent = threading.Event()
    alive = MadeSource(layer, service="alive.test")

    async def main() -> None:
        async with reading(tmp_path, layer, dead, alive) as reader:
            async with trio.open_nursery() as readers:
                for span in range(0, 64, 2):
                    readers.start_soon(reader.read, span * SPAN, 10)
            assert reader.statistics.read_errors == 0
            assert len(dead.requests) <= 8  # the slots, until the first of them knew
            assert dead.waited == 0

    trio.run(main)


def test_a_registry_whose_slots_are_taken_is_not_waited_for_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_reader, "PATIENCE_S", 0.05)
    layer = MadeLayer(4 * MIB)
    dead = MadeSource(layer, service="dead.test")
    dead.gate = gate = threading.Event()
    alive = MadeSource(layer, service="alive.test")

    async def main() -> None:
        async with reading(tmp_path, layer, dead) as reader, trio.open_nursery() as readers:
            for span in range(0, 40, 2):
                readers.start_soon(reader.read, span * SPAN, 10)
            with trio.fail_after(60):
                while len(dead.requests) < 8:
                    await trio.sleep(0.01)
            reader.add_source(alive)
            assert bytes(await reader.read(60 * SPAN, 10)) == layer.data[60 * SPAN :][:10]
            assert len(dead.requests) == 8
            gate.set()

    trio.run(main)


def test_slow_registries_get_their_time_when_there_is_no_faster_one(tmp_path: Path) -> None:
    layer = MadeLayer(MIB)
    one, other = MadeSource(layer, service="one.test"), MadeSource(layer, service="other.test")
    one.silent, other.silent = threading.Event(), threading.Event()
    other.silent.set()  # it answers who waits

    async def main() -> None:
        async with reading(tmp_path, layer, one, other) as reader:
            for span in range(0, 16, 2):
                assert bytes(await reader.read(span * SPAN, 10)) == layer.data[span * SPAN :][:10]
            assert len(one.requests) == 1
            assert other.waited == len(other.requests)

    trio.run(main)


@pytest.mark.parametrize("lies", [1, 2, 4, 9])
def test_some_lies_are_made_good_by_asking_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lies: int
) -> None:
    monkeypatch.setattr(layer_reader, "RETRY_PAUSE_S", 0.001)
    layer = MadeLayer(SPAN, form="plain")
    source = MadeSource(layer)

    def lie_so_often(_: int) -> None:
        source.lie = len(source.requests) <= lies

    source.before = lie_so_often

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader:
            assert bytes(await reader.read(0, 100)) == layer.data[:100]
            assert source.distrusted == lies

    trio.run(main)


def test_a_refusal_is_an_error_at_once_and_not_asked_for_again_by_each_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_reader, "FAIL_FAST_S", 3600.0)
    layer = MadeLayer(MIB)
    source = MadeSource(layer)
    source.error = AuthError("denied")

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader:
            for _ in range(5):
                with pytest.raises(AuthError):
                    await reader.read(0, 100)
            assert len(source.requests) == 1
            # an image that may read it is mounted
            reader.add_source(MadeSource(layer, name="registry.test/other"))
            assert bytes(await reader.read(0, 100)) == layer.data[:100]

    trio.run(main)


def test_a_refusal_fades(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_reader, "FAIL_FAST_S", 0.0)
    layer = MadeLayer(MIB)
    source = MadeSource(layer)
    source.error = AuthError("denied")

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader:
            with pytest.raises(AuthError):
                await reader.read(0, 100)
            source.error = None
            assert bytes(await reader.read(0, 100)) == layer.data[:100]

    trio.run(main)


def test_a_read_over_many_small_spans_is_right(tmp_path: Path) -> None:
    layer = MadeLayer(300_000, form="plain", span=512)
    source = MadeSource(layer)

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader:
            assert bytes(await reader.read(100, 250_000)) == layer.data[100:250_100]

    trio.run(main)


def test_a_read_survives_a_registry_that_comes_back(tmp_path: Path) -> None:
    layer = MadeLayer(MIB)
    source = MadeSource(layer)
    source.error = RegistryError("connection refused")

    def come_back(_: int) -> None:
        if len(source.requests) > 6:
            source.error = None

    source.before = come_back

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader:
            assert bytes(await reader.read(1000, 100)) == layer.data[1000:1100]
            assert reader.statistics.fetch_failures >= 6

    trio.run(main)


def test_the_deadline_ends_a_read_with_the_cause(tmp_path: Path) -> None:
    layer = MadeLayer(MIB)
    source = MadeSource(layer)
    source.error = RegistryError("connection refused")

    async def main() -> None:
        settings = make_settings(fetch_deadline_s=1.0)
        async with reading(tmp_path, layer, source, settings=settings) as reader:
            with pytest.raises(RegistryError, match="connection refused"):
                await reader.read(0, 100)

    trio.run(main)


def test_a_dead_registry_gets_few_requests_from_many_readers(tmp_path: Path) -> None:
    layer = MadeLayer(4 * MIB)
    source = MadeSource(layer)
    source.error = RegistryError("connection refused")

    async def main() -> None:
        settings = make_settings(fetch_deadline_s=2.0)
        async with reading(tmp_path, layer, source, settings=settings) as reader:
            failures = 0

            async def read(offset: int) -> None:
                nonlocal failures
                try:
                    await reader.read(offset, 10)
                except RegistryError:
                    failures += 1

            async with trio.open_nursery() as readers:
                for i in range(60):
                    readers.start_soon(read, i * SPAN)
            assert failures == 60
            # eight slots until the breaker opens, then single attempts
            assert len(source.requests) <= 40

    trio.run(main)


def test_a_dead_registry_stalls_neither_the_store_nor_another_registry(tmp_path: Path) -> None:
    dead_layer, layer = MadeLayer(4 * MIB, seed=2), MadeLayer(MIB, seed=3)
    dead = MadeSource(dead_layer, service="dead.test")
    alive = MadeSource(layer, service="alive.test")
    dead_layer_span = 5

    async def main() -> None:
        store = LayerStore(str(tmp_path / "layers"), limit_bytes=1 << 30)
        async with trio.open_nursery() as nursery:
            fetching = Fetching(nursery, make_settings(memory_bytes=16 << 20))
            stalled = LayerReader(
                dead_layer.info,
                dead_layer.table,
                store.open(dead_layer.info, dead_layer.table),
                fetching,
            )
            stalled.add_source(dead)
            await stalled.fetch_spans([dead_layer_span])
            dead.gate = threading.Event()
            for i in range(50):
                if i != dead_layer_span:
                    nursery.start_soon(stalled.read, i * SPAN, 10)
            await trio.testing.wait_all_tasks_blocked()
            at = dead_layer_span * SPAN
            assert bytes(await stalled.read(at, 10)) == dead_layer.data[at : at + 10]
            other = LayerReader(
                layer.info, layer.table, store.open(layer.info, layer.table), fetching
            )
            other.add_source(alive)
            assert bytes(await other.read(0, MIB)) == layer.data
            dead.gate.set()
            nursery.cancel_scope.cancel()
        store.close()

    trio.run(main)


def test_sequential_reads_are_fetched_ahead_in_larger_requests(tmp_path: Path) -> None:
    layer = MadeLayer(4 * MIB)
    source = MadeSource(layer)

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader:
            for offset in range(0, layer.info.size, 32768):
                data = bytes(await reader.read(offset, 32768))
                assert data == layer.data[offset : offset + 32768]
            assert len(source.requests) < len(layer.table) // 2 + 8
            assert source.fetched_bytes <= layer.info.blob_size

    trio.run(main)


def test_an_isolated_read_fetches_only_its_span(tmp_path: Path) -> None:
    layer = MadeLayer(4 * MIB)
    source = MadeSource(layer)

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader:
            await reader.read(40 * SPAN + 5, 10)
            await reader.read(3 * SPAN + 5, 10)
            with trio.fail_after(60):
                while reader.statistics.fetched_spans < 2:  # counted after the reader has its bytes
                    await trio.sleep(0.01)
            assert len(source.requests) == 2
            assert reader.statistics.fetched_spans == 2

    trio.run(main)


def test_without_room_on_the_disk_spans_are_served_from_memory(tmp_path: Path) -> None:
    layer = MadeLayer(2 * MIB)
    source = MadeSource(layer)
    store = LayerStore(str(tmp_path / "layers"), limit_bytes=5 * SPAN)
    store.make_room = lambda need=0: 0  # type: ignore[method-assign]

    async def main() -> None:
        async with reading(tmp_path, layer, source, store=store) as reader:
            for offset in range(0, layer.info.size, 100_000):
                data = bytes(await reader.read(offset, 100_000))
                assert data == layer.data[offset : offset + 100_000]
            assert reader.statistics.uncached_spans
            assert store.statistics().full
            assert store.statistics().used_bytes <= 5 * SPAN

    trio.run(main)


def test_memory_stays_bounded_with_many_readers(tmp_path: Path) -> None:
    layer = MadeLayer(16 * MIB, span=1 << 20)
    source = MadeSource(layer)
    held: list[int] = []

    async def main() -> None:
        settings = make_settings(memory_bytes=8 << 20, parallel_fetches=32)
        async with reading(tmp_path, layer, source, settings=settings) as reader:
            pool = reader._fetching.memory
            source.before = lambda _: held.append(pool.total - pool.free)

            async def read(offset: int) -> None:
                assert bytes(await reader.read(offset, 10)) == layer.data[offset : offset + 10]

            async with trio.open_nursery() as readers:
                for i in range(160):
                    readers.start_soon(read, i * 100_000)
            while pool.free != pool.total:  # the last fetch ends after its last span has landed
                await trio.sleep(0.01)
        assert 0 < max(held) <= pool.total

    trio.run(main)


def test_a_layer_whose_source_comes_late_is_read(tmp_path: Path) -> None:
    layer = MadeLayer(MIB)

    async def main() -> None:
        async with reading(tmp_path, layer) as reader, trio.open_nursery() as readers:

            async def read() -> None:
                assert bytes(await reader.read(0, 10)) == layer.data[:10]

            readers.start_soon(read)
            await trio.testing.wait_all_tasks_blocked(0.01)
            reader.add_source(MadeSource(layer))

    trio.run(main)


def test_digest_errors_name_layer_span_and_both_digests(tmp_path: Path) -> None:
    layer = MadeLayer(SPAN, form="plain")
    source = MadeSource(layer)
    source.lie = True

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader:
            expected = layer.table[0].digest.hex()
            with pytest.raises(DigestError, match=f"span 0: expected digest {expected}, got "):
                await reader.read(0, 10)

    trio.run(main)


def test_a_disk_that_fails_to_read_is_made_good_by_fetching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = MadeLayer(MIB)
    source = MadeSource(layer)

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader:
            assert bytes(await reader.read(100, 50)) == layer.data[100:150]

            def fail(*_: object, **__: object) -> bytearray:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            with monkeypatch.context() as patch:
                patch.setattr(reader.stored, "_pread", fail)
                assert bytes(await reader.read(100, 50)) == layer.data[100:150]
            assert len(source.requests) == 2

    trio.run(main)


def test_memory_is_given_back_once_after_fetches(tmp_path: Path) -> None:
    layer = MadeLayer(MIB)

    async def main() -> None:
        async with reading(tmp_path, layer, MadeSource(layer)) as reader:
            fetching = reader._fetching
            assert not fetching.return_memory()
            await reader.read(0, MIB)
            while not fetching.return_memory():  # until the last fetch has ended
                await trio.sleep(0.01)
            assert not fetching.return_memory()

    trio.run(main)


def test_without_a_source_readers_get_the_reason_and_do_not_wait(tmp_path: Path) -> None:
    layer = MadeLayer(MIB)

    async def main() -> None:
        async with reading(tmp_path, layer) as reader:
            reader.without_source = PolicyError("this registry is not allowed")
            with pytest.raises(PolicyError, match="not allowed"):
                await reader.read(0, 100)
            reader.add_source(MadeSource(layer))
            assert bytes(await reader.read(0, 100)) == layer.data[:100]

    trio.run(main)

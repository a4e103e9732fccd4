"""The layer store on real files: what survives which crash, what leaves when room is short."""

from __future__ import annotations

import errno
import os
import random
import stat
import threading
from typing import TYPE_CHECKING

import pytest

from clipshim.errors import StoreError
from clipshim.lazy.layer_store import LayerStore
from clipshim.lazy.stored_layer import StoredLayer, StoreFullError
from tests.unit.lazy.layers import SPAN, MadeLayer

if TYPE_CHECKING:
    from pathlib import Path

SPANS = 16


@pytest.fixture
def layer() -> MadeLayer:
    return MadeLayer(SPANS * SPAN - 1000)


def open_store(path: Path, *, limit: int = 1 << 30, boot_id: str = "boot-1") -> LayerStore:
    return LayerStore(str(path / "layers"), limit_bytes=limit, boot_id=boot_id)


def span_bytes(layer: MadeLayer, span: int) -> bytes:
    entry = layer.table[span]
    start = entry.uncompressed_offset
    return layer.data[start : start + entry.uncompressed_size]


def put(stored: StoredLayer, layer: MadeLayer, *spans: int) -> None:
    for span in spans:
        stored.put(span, span_bytes(layer, span))


def read_span(stored: StoredLayer, layer: MadeLayer, span: int) -> bytes | None:
    data = stored.read(span * SPAN, len(span_bytes(layer, span)))
    return None if data is None else bytes(data)


def blocks(stored: StoredLayer) -> int:
    return os.stat(stored.data_path).st_blocks * 512


def test_what_was_put_is_read_and_nothing_else(tmp_path: Path, layer: MadeLayer) -> None:
    stored = open_store(tmp_path).open(layer.info, layer.table)
    put(stored, layer, 2, 3, SPANS - 1)
    assert read_span(stored, layer, 2) == span_bytes(layer, 2)
    assert bytes(stored.read(2 * SPAN + 5, SPAN) or b"") == layer.data[2 * SPAN + 5 :][:SPAN]
    assert stored.read(SPAN, 2 * SPAN) is None
    assert stored.missing(0, 5 * SPAN) == [0, 1, 4]
    tail = stored.read(layer.info.size - 10, 100)
    assert bytes(tail or b"") == layer.data[-10:]
    assert bytes(stored.read(layer.info.size, 10) or b"") == b""


def test_files_are_for_their_owner_only(tmp_path: Path, layer: MadeLayer) -> None:
    store = open_store(tmp_path)
    stored = store.open(layer.info, layer.table)
    put(stored, layer, 0)
    store.sync()
    assert stat.S_IMODE(os.stat(store.directory).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(stored.directory).st_mode) == 0o700
    for name in os.listdir(stored.directory):
        assert stat.S_IMODE(os.stat(f"{stored.directory}/{name}").st_mode) == 0o600


def test_opening_makes_nothing_and_gives_one_object(tmp_path: Path, layer: MadeLayer) -> None:
    store = open_store(tmp_path)
    stored = store.open(layer.info, layer.table)
    assert store.open(layer.info, layer.table) is stored
    assert os.listdir(store.directory) == []


def test_a_killed_process_loses_nothing(tmp_path: Path, layer: MadeLayer) -> None:
    first = open_store(tmp_path).open(layer.info, layer.table)
    put(first, layer, 1, 5)  # neither synced nor closed
    again = open_store(tmp_path).open(layer.info, layer.table)
    assert [span for span in range(SPANS) if again.has(span)] == [1, 5]
    assert read_span(again, layer, 5) == span_bytes(layer, 5)


def test_after_a_host_reset_unsynced_spans_are_checked_again(
    tmp_path: Path, layer: MadeLayer
) -> None:
    first = open_store(tmp_path).open(layer.info, layer.table)
    put(first, layer, 1, 5)
    with open(first.data_path, "r+b") as file:  # what a lost page looks like
        file.seek(5 * SPAN + 4096)
        file.write(bytes(4096))
    store = open_store(tmp_path, boot_id="boot-2")
    again = store.open(layer.info, layer.table)
    assert read_span(again, layer, 1) is None
    assert again.is_suspect(1)
    assert again.is_suspect(5)
    assert again.verify_suspect(1)
    assert not again.verify_suspect(5)
    assert read_span(again, layer, 1) == span_bytes(layer, 1)
    assert read_span(again, layer, 5) is None
    assert not again.is_suspect(5)
    statistics = store.statistics()
    assert (statistics.suspects_good, statistics.suspects_bad) == (1, 1)


def test_a_second_reset_does_not_launder_suspects(tmp_path: Path, layer: MadeLayer) -> None:
    put(open_store(tmp_path).open(layer.info, layer.table), layer, 1, 5)
    second = open_store(tmp_path, boot_id="boot-2").open(layer.info, layer.table)
    put(second, layer, 7)
    second.sync()
    third = open_store(tmp_path, boot_id="boot-2").open(layer.info, layer.table)
    assert third.is_suspect(1)
    assert third.is_suspect(5)


def test_synced_spans_are_trusted_after_a_reset(tmp_path: Path, layer: MadeLayer) -> None:
    store = open_store(tmp_path)
    put(store.open(layer.info, layer.table), layer, 1, 5)
    store.sync()
    again = open_store(tmp_path, boot_id="boot-2").open(layer.info, layer.table)
    assert again.has(1)
    assert again.has(5)


def test_a_change_after_a_sync_takes_the_trust_back(tmp_path: Path, layer: MadeLayer) -> None:
    store = open_store(tmp_path)
    stored = store.open(layer.info, layer.table)
    put(stored, layer, 1)
    store.sync()
    put(stored, layer, 2)
    again = open_store(tmp_path, boot_id="boot-2").open(layer.info, layer.table)
    assert again.is_suspect(1)
    assert again.is_suspect(2)


def test_a_complete_layer_is_trusted_and_whole(tmp_path: Path, layer: MadeLayer) -> None:
    stored = open_store(tmp_path).open(layer.info, layer.table)
    put(stored, layer, *range(SPANS))
    stored.mark_complete()
    again = open_store(tmp_path, boot_id="boot-2").open(layer.info, layer.table)
    assert again.is_complete
    assert bytes(again.read(0, layer.info.size) or b"") == layer.data


def test_a_layer_with_gaps_cannot_be_marked_complete(tmp_path: Path, layer: MadeLayer) -> None:
    stored = open_store(tmp_path).open(layer.info, layer.table)
    put(stored, layer, *range(SPANS - 1))
    with pytest.raises(StoreError):
        stored.mark_complete()


def test_an_evicted_complete_layer_is_complete_no_more(tmp_path: Path, layer: MadeLayer) -> None:
    stored = open_store(tmp_path).open(layer.info, layer.table)
    put(stored, layer, *range(SPANS))
    stored.mark_complete()
    assert stored.evict([3]) == SPAN
    again = open_store(tmp_path, boot_id="boot-2").open(layer.info, layer.table)
    assert not again.is_complete
    assert not again.has(3)
    assert read_span(again, layer, 3) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path / "data", 100),
        lambda path: os.truncate(path / "spans", 10),
        lambda path: (path / "spans").write_bytes((path / "spans").read_bytes() + b"\1"),
        lambda path: (path / "spans").write_bytes(b"x" * 26),
        lambda path: (path / "data").unlink(),
    ],
)
def test_a_corrupt_layer_is_started_anew(
    tmp_path: Path, layer: MadeLayer, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    stored = open_store(tmp_path).open(layer.info, layer.table)
    put(stored, layer, 0, 1)
    assert callable(damage)
    damage(tmp_path / "layers" / layer.info.key)
    again = open_store(tmp_path).open(layer.info, layer.table)
    assert not again.has(0)
    put(again, layer, 1)
    assert read_span(again, layer, 1) == span_bytes(layer, 1)


def test_a_data_file_that_is_a_link_is_not_followed(tmp_path: Path, layer: MadeLayer) -> None:
    stored = open_store(tmp_path).open(layer.info, layer.table)
    put(stored, layer, 0)
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(layer.info.size))
    os.unlink(stored.data_path)
    os.symlink(victim, stored.data_path)
    again = open_store(tmp_path).open(layer.info, layer.table)
    if again.has(0):
        with pytest.raises(OSError, match="symbolic links"):
            again.read(0, 10)
    assert victim.read_bytes() == bytes(layer.info.size)


def test_the_limit_evicts_idle_layers_first_then_old_spans(tmp_path: Path) -> None:
    layers = [MadeLayer(SPANS * SPAN, seed=seed) for seed in range(3)]
    store = open_store(tmp_path, limit=2 * SPANS * SPAN)
    idle = store.open(layers[0].info, layers[0].table)
    put(idle, layers[0], *range(SPANS))
    store.release(layers[0].info.key)
    busy = store.open(layers[1].info, layers[1].table)
    put(busy, layers[1], *range(SPANS))
    more = store.open(layers[2].info, layers[2].table)
    put(more, layers[2], *range(4))
    assert layers[0].info.key not in set(store.keys())
    assert not os.path.exists(idle.directory)
    assert all(busy.has(span) for span in range(SPANS))
    read_span(busy, layers[1], 0)
    put(more, layers[2], *range(4, SPANS))
    spare = MadeLayer(SPANS * SPAN, seed=9)
    put(store.open(spare.info, spare.table), spare, 0, 1)
    assert store.statistics().used_bytes <= store.limit_bytes
    assert busy.has(0)  # used a moment ago
    assert not busy.has(1)
    assert blocks(busy) < SPANS * SPAN


def test_pinned_layers_keep_everything(tmp_path: Path) -> None:
    pinned, other = MadeLayer(SPANS * SPAN, seed=1), MadeLayer(SPANS * SPAN, seed=2)
    store = open_store(tmp_path, limit=SPANS * SPAN)
    stored = store.open(pinned.info, pinned.table)
    put(stored, pinned, *range(SPANS))
    store.pin(pinned.info.key)
    with pytest.raises(StoreFullError):
        put(store.open(other.info, other.table), other, 0)
    store.release(pinned.info.key)
    assert all(stored.has(span) for span in range(SPANS))
    assert store.remove(pinned.info.key) == 0
    store.unpin(pinned.info.key)
    assert store.remove(pinned.info.key) == SPANS * SPAN
    assert not os.path.exists(stored.directory)


def test_a_released_layer_is_found_again(tmp_path: Path, layer: MadeLayer) -> None:
    store = open_store(tmp_path)
    put(store.open(layer.info, layer.table), layer, 3)
    used = store.statistics().used_bytes
    store.release(layer.info.key)
    assert store.statistics().open_layers == 0
    assert store.statistics().used_bytes == used
    again = store.open(layer.info, layer.table)
    assert read_span(again, layer, 3) == span_bytes(layer, 3)
    assert store.statistics().used_bytes == used


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_store_full_and_frees_what_it_took(
    number: int, tmp_path: Path, layer: MadeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a quota, which statvfs does not show: what is old leaves, so that space comes back."""
    store = open_store(tmp_path)
    stored = store.open(layer.info, layer.table)
    put(stored, layer, 0, 2)
    store.sync()
    pwrite = os.pwrite

    def full(fd: int, data: memoryview, offset: int) -> int:
        if len(data) < 100:  # a byte of the bitmap, whose block is there already
            return pwrite(fd, data, offset)
        raise OSError(number, os.strerror(number))

    def nothing_new(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("clipshim.lazy.stored_layer.os.pwrite", full)
        patch.setattr("clipshim.lazy.layer_files.os.write", nothing_new)
        with pytest.raises(StoreFullError):
            put(stored, layer, 1)
    assert [stored.has(span) for span in range(3)] == [False] * 3
    assert (store.statistics().used_bytes, store.statistics().full) == (0, 1)
    assert blocks(stored) == 0
    put(stored, layer, 1)
    assert read_span(stored, layer, 1) == span_bytes(layer, 1)
    again = open_store(tmp_path, boot_id="boot-2").open(layer.info, layer.table)
    assert [again.is_suspect(span) for span in range(3)] == [False, True, False]
    assert again.verify_suspect(1)
    store.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_files_that_cannot_be_made_are_store_full(
    number: int, tmp_path: Path, layer: MadeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    stored = store.open(layer.info, layer.table)
    written = 0

    def full(fd: int, data: memoryview) -> int:
        nonlocal written
        written += 1
        if written % 2:
            return real(fd, data[:5])  # the last bytes that went in
        raise OSError(number, os.strerror(number))

    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr("clipshim.lazy.layer_files.os.write", full)
        for _ in range(3):
            with pytest.raises(StoreFullError):
                put(stored, layer, 1)
    assert store.statistics().used_bytes == 0
    put(stored, layer, 1)
    assert read_span(stored, layer, 1) == span_bytes(layer, 1)
    store.release(layer.info.key)
    assert read_span(store.open(layer.info, layer.table), layer, 1) == span_bytes(layer, 1)
    store.close()


def test_a_span_that_was_not_committed_does_not_exist(tmp_path: Path, layer: MadeLayer) -> None:
    store = open_store(tmp_path)
    stored = store.open(layer.info, layer.table)
    with stored.writing(4) as writer:
        writer.write(span_bytes(layer, 4)[:100])
    assert not stored.has(4)
    assert store.statistics().used_bytes == 0
    with stored.writing(4) as writer:
        writer.write(span_bytes(layer, 4)[:100])
        with pytest.raises(StoreError):
            writer.commit()
    assert not stored.has(4)


def test_a_write_that_a_reset_overtook_does_not_count(tmp_path: Path, layer: MadeLayer) -> None:
    store = open_store(tmp_path)
    stored = store.open(layer.info, layer.table)
    put(stored, layer, 1)
    with stored.writing(4) as writer:
        writer.write(span_bytes(layer, 4))
        stored.reset("for the test")
        put(stored, layer, 2)  # the files exist again
        with pytest.raises(StoreFullError):
            writer.commit()
    assert [span for span in range(SPANS) if stored.has(span)] == [2]
    assert store.statistics().used_bytes == SPAN


def test_a_closed_layer_has_nothing_and_takes_nothing(tmp_path: Path, layer: MadeLayer) -> None:
    store = open_store(tmp_path)
    straggler = store.open(layer.info, layer.table)
    put(straggler, layer, 1)
    store.release(layer.info.key)
    stored = store.open(layer.info, layer.table)
    assert stored is not straggler
    assert read_span(straggler, layer, 1) is None
    with pytest.raises(StoreFullError):
        put(straggler, layer, 2)
    straggler.reset("for the test")
    assert read_span(stored, layer, 1) == span_bytes(layer, 1)
    assert not stored.has(2)


def test_reads_during_evictions_are_right_or_missing(tmp_path: Path) -> None:
    layer = MadeLayer(SPANS * SPAN)
    stored = open_store(tmp_path).open(layer.info, layer.table)
    put(stored, layer, *range(SPANS))
    stop = threading.Event()
    wrong: list[int] = []

    def read() -> None:
        chance = random.Random(threading.get_ident())
        while not stop.is_set():
            span = chance.randrange(SPANS)
            data = read_span(stored, layer, span)
            if data is not None and data != span_bytes(layer, span):
                wrong.append(span)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    chance = random.Random(5)
    for _ in range(150):
        span = chance.randrange(SPANS)
        stored.evict([span])
        put(stored, layer, span)
    stop.set()
    for thread in threads:
        thread.join(120)
    assert not wrong
    assert all(stored.has(span) for span in range(SPANS))


def test_few_descriptors_serve_many_layers(tmp_path: Path) -> None:
    layers = [MadeLayer(SPAN, seed=seed) for seed in range(20)]
    store = LayerStore(str(tmp_path / "layers"), limit_bytes=1 << 30, max_open=4)
    stored = [store.open(layer.info, layer.table) for layer in layers]
    for _ in range(2):
        for item, layer in zip(stored, layers, strict=True):
            if not item.has(0):
                put(item, layer, 0)
            assert read_span(item, layer, 0) == layer.data
            assert len(store.files) <= 4
    store.close()


def test_keys_that_are_paths_are_refused(tmp_path: Path, layer: MadeLayer) -> None:
    import dataclasses

    store = open_store(tmp_path)
    for key in ("../escape", "a/b", "", ".", ".."):
        with pytest.raises(StoreError):
            store.open(dataclasses.replace(layer.info, key=key), layer.table)


def test_leftovers_without_data_are_swept(tmp_path: Path) -> None:
    (tmp_path / "layers" / "abc-def").mkdir(parents=True)
    store = open_store(tmp_path)
    assert store.keys() == []
    assert os.listdir(store.directory) == []


def test_an_eviction_that_fails_keeps_no_span_from_being_put_again(
    tmp_path: Path, layer: MadeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    stored = store.open(layer.info, layer.table)
    put(stored, layer, 0, 1)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("clipshim.lazy.layer_files.os.pwrite", broken)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            stored.evict([0, 1])
    stored.evict([0, 1])
    put(stored, layer, 0, 1)
    assert read_span(stored, layer, 0) == span_bytes(layer, 0)
    assert store.statistics().used_bytes == 2 * SPAN
    store.close()


def test_a_span_that_cannot_be_taken_back_is_put_later(
    tmp_path: Path, layer: MadeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of descriptors while a write is undone."""
    store = open_store(tmp_path)
    stored = store.open(layer.info, layer.table)
    put(stored, layer, 0)

    def none_left(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def write_half() -> None:
        with monkeypatch.context() as patch, stored.writing(1) as writer:
            writer.write(b"half")
            store.files.close()
            patch.setattr("clipshim.lazy.open_files.os.open", none_left)
            writer.commit()

    with pytest.raises(StoreError, match="missing"):
        write_half()
    assert store.statistics().used_bytes == SPAN
    put(stored, layer, 1)
    assert read_span(stored, layer, 1) == span_bytes(layer, 1)
    store.close()

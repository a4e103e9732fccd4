"""Prefetch, completing layers and profiles."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING

import pytest
import trio

from clipshim.errors import DigestError, RegistryError, StoreError
from clipshim.lazy.full_check import complete_layer
from clipshim.lazy.layer_store import LayerStore
from clipshim.lazy.prefetch import TOGETHER, everything, prefetch
from clipshim.lazy.profile import (
    EMPTY,
    FORGET_AFTER,
    MAX_ENTRIES,
    Profile,
    load_profile,
    merge,
    parse_entries,
    record_start,
    within,
)
from tests.unit.lazy.layers import SPAN, MadeLayer, MadeSource
from tests.unit.lazy.test_layer_reader import MIB, reading

if TYPE_CHECKING:
    from pathlib import Path

IMAGE = "0123456789abcdef"


def test_prefetch_follows_the_order_and_joins_neighbours(tmp_path: Path) -> None:
    layer = MadeLayer(2 * MIB)
    source = MadeSource(layer)

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader:
            order = [(0, 9), (0, 4), (7, 1), (0, 5), (0, 10_000), (0, 3), (0, 4)]
            assert await prefetch([reader], order) == 4
            assert [span for span in range(32) if reader.stored.has(span)] == [3, 4, 5, 9]
            assert len(source.requests) == 2
            assert reader.statistics.ahead_spans == 4
            assert await prefetch([reader], order) == 0

    trio.run(main)


def test_prefetch_brings_later_what_is_needed_much_later(tmp_path: Path) -> None:
    layer = MadeLayer(8 * MIB)
    source = MadeSource(layer)

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader:
            last = len(layer.table) - 1
            order = [(0, span) for span in range(last, 0, -2)]
            await prefetch([reader], order)
            first = [start for start, _ in source.requests[: TOGETHER // 2]]
            assert min(first) > layer.table[last - 2 * TOGETHER].compressed_offset

    trio.run(main)


def test_prefetch_of_everything_makes_all_reads_local(tmp_path: Path) -> None:
    layer = MadeLayer(2 * MIB)
    source = MadeSource(layer)

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader:
            assert await prefetch([reader, None], everything([reader, None])) == len(layer.table)
            requests = len(source.requests)
            for offset in range(0, layer.info.size, 300_000):
                data = bytes(await reader.read(offset, 300_000))
                assert data == layer.data[offset : offset + 300_000]
            assert len(source.requests) == requests

    trio.run(main)


def test_prefetch_stops_quietly_at_a_dead_registry(tmp_path: Path) -> None:
    layer = MadeLayer(2 * MIB)
    source = MadeSource(layer)
    source.error = RegistryError("connection refused")

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader:
            assert await prefetch([reader], everything([reader])) == 0
            assert len(source.requests) <= 8

    trio.run(main)


def test_a_completed_layer_is_whole_checked_and_marked(tmp_path: Path) -> None:
    layer = MadeLayer(2 * MIB + 77)
    source = MadeSource(layer)
    seen: list[tuple[int, int]] = []

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader:
            await reader.read(SPAN * 3, 10)
            await complete_layer(reader, lambda done, total: seen.append((done, total)))
            assert reader.stored.is_complete
            assert seen[-1] == (layer.info.size, layer.info.size)
            assert source.fetched_bytes == layer.info.blob_size
            assert os.path.exists(f"{reader.stored.directory}/complete")
            await complete_layer(reader)
        with open(reader.stored.data_path, "rb") as file:
            assert file.read() == layer.data

    trio.run(main)


def test_a_layer_that_is_not_its_diff_id_is_thrown_away(tmp_path: Path) -> None:
    layer = MadeLayer(MIB)
    layer.info = dataclasses.replace(layer.info, diff_id="sha256:" + "0" * 64)

    async def main() -> None:
        async with reading(tmp_path, layer, MadeSource(layer)) as reader:
            with pytest.raises(DigestError):
                await complete_layer(reader)
            assert not reader.stored.is_complete
            assert not any(reader.stored.has(span) for span in range(len(layer.table)))

    trio.run(main)


def test_a_layer_larger_than_the_cache_cannot_be_completed(tmp_path: Path) -> None:
    layer = MadeLayer(MIB)
    store = LayerStore(str(tmp_path / "layers"), limit_bytes=4 * SPAN)

    async def main() -> None:
        async with reading(tmp_path, layer, MadeSource(layer), store=store) as reader:
            with pytest.raises(StoreError):
                await complete_layer(reader)

    trio.run(main)


def test_completing_says_why_the_registry_failed(tmp_path: Path) -> None:
    layer = MadeLayer(MIB)
    source = MadeSource(layer)
    source.error = RegistryError("connection refused")

    async def main() -> None:
        async with reading(tmp_path, layer, source) as reader:
            with pytest.raises(RegistryError, match="connection refused"):
                await complete_layer(reader)

    trio.run(main)


def test_a_profile_keeps_the_order_of_the_last_start() -> None:
    profile = merge(EMPTY, [(0, 5), (1, 2), (0, 5)])
    assert profile.spans == [(0, 5), (1, 2)]
    profile = merge(profile, [(1, 2), (3, 3)])
    assert profile.spans == [(1, 2), (3, 3), (0, 5)]
    assert profile.missed == [0, 0, 1]
    assert profile.starts == 2


def test_a_profile_forgets_what_starts_no_longer_touch() -> None:
    profile = merge(EMPTY, [(0, 1), (0, 2)])
    for _ in range(FORGET_AFTER):
        profile = merge(profile, [(0, 1)])
    assert profile.spans == [(0, 1)]


def test_a_profile_is_bounded() -> None:
    profile = merge(EMPTY, [(0, span) for span in range(MAX_ENTRIES + 50)])
    assert len(merge(profile, [(1, span) for span in range(MAX_ENTRIES)]).spans) == MAX_ENTRIES


def test_profiles_survive_on_disk(tmp_path: Path) -> None:
    directory = str(tmp_path / "profiles")
    assert load_profile(directory, IMAGE) == EMPTY
    record_start(directory, IMAGE, [(0, 1), (2, 3)])
    record_start(directory, IMAGE, [(2, 3)])
    assert load_profile(directory, IMAGE) == Profile([(2, 3), (0, 1)], [0, 1], 2)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"version": 2}',
        '{"version": 1, "spans": [[0]], "missed": [0], "starts": 1}',
        '{"version": 1, "spans": [[0, 1]], "missed": [], "starts": 1}',
        json.dumps({"version": 1, "spans": [[0, True]], "missed": [0], "starts": 1}),
    ],
)
def test_a_damaged_profile_is_no_profile(tmp_path: Path, content: str) -> None:
    (tmp_path / f"{IMAGE}.json").write_text(content)
    assert load_profile(str(tmp_path), IMAGE) == EMPTY


def test_image_ids_that_are_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image ID"):
        load_profile(str(tmp_path), "../x")


def test_entries_of_a_profile_are_checked() -> None:
    assert parse_entries([[0, 1], [2, 3]]) == [(0, 1), (2, 3)]
    bad: object
    for bad in (None, {}, [[1]], [["0", 1]], [[-1, 0]], [[0, 1.5]], [3]):
        with pytest.raises(ValueError, match="expected"):
            parse_entries(bad)
    assert within([(0, 1), (0, 9), (1, 0), (5, 0)], [2, 1]) == [(0, 1), (1, 0)]

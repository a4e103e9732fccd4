"""zstd layers: frames become ranges, and each decodes alone."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from clipshim.errors import ClipError, LayerError, SpanDecodeError
from clipshim.index.gzip_checkpoints import Range
from clipshim.index.span_decode import decode_group, decode_span
from clipshim.index.zstd_frames import is_zstd, scan_zstd
from tests.unit.index.samples import ZSTD_WAYS, Stream, members, steady, text, zstd

if TYPE_CHECKING:
    from collections.abc import Iterator

SPACING = 64 << 10
DATA = text(700_000)


def scan(blob: bytes) -> list[tuple[Range, bytes]]:
    found, made = [], bytearray()
    for event in scan_zstd(Stream(blob).read, SPACING, "layer 0"):
        if isinstance(event, Range):
            found.append((event, bytes(made)))
            made.clear()
        else:
            made += event
    assert not made
    return found


def check(blob: bytes, data: bytes) -> list[tuple[Range, bytes]]:
    found = scan(blob)
    assert b"".join(made for _, made in found) == data
    end = 0
    for piece, made in found:
        assert piece.compressed_offset >= end
        end = piece.compressed_offset + piece.compressed_size
        compressed = blob[piece.compressed_offset : end]
        assert decode_span("zstd-frame", 0, None, compressed, len(made)) == made
        sizes = [50_000] * (len(made) // 50_000) or [len(made)]
        chunks = [compressed[at : at + 777] for at in range(0, len(compressed), 777)]
        spans = b"".join(decode_group("zstd-frame", 0, None, chunks, sizes))
        assert spans == made[: sum(sizes)]
    return found


@pytest.mark.parametrize("way", ZSTD_WAYS)
def test_every_range_decodes_alone(way: str) -> None:
    blob = ZSTD_WAYS[way](DATA)
    assert is_zstd(blob[:4])
    check(blob, DATA)


def test_one_frame_is_one_range_and_many_are_many() -> None:
    assert len(check(zstd(DATA), DATA)) == 1
    assert len(check(members(DATA, 90_001, zstd), DATA)) == 8
    small = check(members(DATA, 5_003, zstd), DATA)
    assert 8 <= len(small) <= 22


def test_a_large_frame_does_not_join_small_ones() -> None:
    large = text(300_000, 2)
    found = check(zstd(b"small") + zstd(large), b"small" + large)
    assert [len(made) for _, made in found] == [5, 300_000]


def test_all_header_variants_are_followed() -> None:
    data = b""
    blob = b""
    for size in (0, 1, 255, 256, 65_791, 65_792, 300_000):
        for known in (True, False):
            for checksum in (True, False):
                blob += zstd(text(size), size_known=known, checksum=checksum)
                data += text(size)
    blob += zstandard.ZstdCompressor(level=19).compress(bytes(5_000_000))  # blocks of one byte
    check(blob, data + bytes(5_000_000))


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 20, 1000])
def test_a_truncated_stream_is_refused(cut: int) -> None:
    blob = zstd(DATA, checksum=True)
    for part in (blob[:cut], blob[:-cut]):
        with pytest.raises(LayerError, match="layer 0: "):
            scan(part)


def test_a_damaged_stream_is_refused_or_harmless() -> None:
    blob = zstd(DATA, checksum=True)
    rng = random.Random(5)
    refused = 0
    for place in rng.sample(range(len(blob)), 40):
        damaged = bytearray(blob)
        damaged[place] ^= 0x55
        try:
            made = scan(bytes(damaged))
        except LayerError:
            refused += 1
        else:
            assert b"".join(part for _, part in made) == DATA
    assert refused > 30


def test_what_follows_the_last_frame_must_be_a_frame() -> None:
    with pytest.raises(LayerError, match="no frame starts there"):
        scan(zstd(DATA) + b"garbage")


def test_a_frame_that_needs_too_large_a_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    blob = compressor.compress(DATA) + compressor.flush()
    with pytest.raises(LayerError):
        scan(blob)
    with pytest.raises(SpanDecodeError):
        decode_span("zstd-frame", 0, None, blob, 1000)


def test_a_bomb_yields_no_more_than_was_asked_for() -> None:
    bomb = zstd(bytes(100_000_000))
    assert decode_span("zstd-frame", 0, None, bomb, 1000) == bytes(1000)


@steady
@given(
    blob=st.binary(max_size=500),
    start=st.sampled_from(
        [b"", b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd\x00\x58", b"\x50\x2a\x4d\x18"]
    ),
)
def test_any_bytes_give_ranges_or_an_error(blob: bytes, start: bytes) -> None:
    try:
        scan(start + blob)
    except ClipError:
        return


def large_window(data: bytes, window_log: int) -> bytes:
    """One frame that wants a window of 2 ** window_log bytes, whatever it holds."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=window_log, write_content_size=False
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    ("size", "window_log", "taken"),
    [
        (1 << 20, 27, []),  # no more can be needed than is decoded
        (9 << 20, 23, []),
        (9 << 20, 24, [9 << 20]),
        (20 << 20, 24, [16 << 20]),
    ],
)
def test_memory_for_large_windows_is_asked_for_and_given_back(
    size: int, window_log: int, taken: list[int]
) -> None:
    blob = large_window(text(1 << 20) * (size >> 20), window_log)
    asked, held = [], []

    @contextlib.contextmanager
    def take(amount: int) -> Iterator[None]:
        asked.append(amount)
        held.append(amount)
        try:
            yield
        finally:
            held.remove(amount)

    sizes = [1 << 20] * (size >> 20)
    group = decode_group("zstd-frame", 0, None, [blob[:5], blob[5:]], sizes, large_window=take)
    assert next(group) == text(1 << 20)
    assert held == taken
    group.close()
    assert held == []
    assert b"".join(decode_group("zstd-frame", 0, None, [blob], sizes, large_window=take)) == text(
        1 << 20
    ) * (size >> 20)
    assert asked == taken * 2
    assert held == []


def test_a_frame_behind_the_first_cannot_ask_for_more_than_it_did() -> None:
    data = text(1 << 20) * 10
    blob = large_window(data, 21) + large_window(data, 25)
    spans = decode_group("zstd-frame", 0, None, [blob], [1 << 20] * 20)
    with pytest.raises(SpanDecodeError, match="memory"):
        list(spans)


def test_a_window_beyond_all_bounds_is_refused() -> None:
    blob = large_window(b"x", 28)
    with pytest.raises(SpanDecodeError, match="window of 268435456"):
        list(decode_group("zstd-frame", 0, None, [blob], [1 << 20] * 20))

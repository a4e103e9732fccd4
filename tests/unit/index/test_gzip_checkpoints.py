"""Every range that the scanner finds decodes alone to the bytes it stands for."""

from __future__ import annotations

import gzip
import hashlib
import random
import subprocess
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from clipshim.errors import ClipError, LayerError, SpanDecodeError
from clipshim.index.gzip_checkpoints import Range, pack_window, scan_gzip
from clipshim.index.span_decode import decode_group, decode_span
from tests.unit.index.samples import GZIP_WAYS, Stream, deflate, steady, text

SPACING = 64 << 10
DATA = text(700_000)


def scan(blob: bytes, spacing: int = SPACING) -> list[tuple[Range, bytes]]:
    """Each range with what the scanner said it decodes to."""
    found, made = [], bytearray()
    for event in scan_gzip(Stream(blob).read, spacing, "layer 0"):
        if isinstance(event, Range):
            found.append((event, bytes(made)))
            made.clear()
        else:
            made += event
    assert not made
    return found


def unpacked(stored: bytes) -> bytes:
    if not stored:
        return bytes(32768)
    return zstandard.decompress(stored, max_output_size=32768).rjust(32768, b"\0")


def check(blob: bytes, data: bytes, spacing: int = SPACING) -> list[tuple[Range, bytes]]:
    found = scan(blob, spacing)
    assert b"".join(made for _, made in found) == data
    end = 0
    for piece, made in found:
        assert piece.compressed_offset >= end - (1 if piece.bits else 0)
        end = piece.compressed_offset + piece.compressed_size
        assert end <= len(blob)
        window = unpacked(pack_window(piece))
        compressed = blob[piece.compressed_offset : end]
        assert decode_span(piece.kind, piece.bits, window, compressed, len(made)) == made
    return found


@pytest.mark.parametrize("way", GZIP_WAYS)
def test_every_range_decodes_alone(way: str) -> None:
    found = check(GZIP_WAYS[way](DATA), DATA)
    assert len(found) >= 3
    assert found[0][0].kind == "gzip-start"


def test_all_phases_of_a_byte_occur_and_decode() -> None:
    data = text(6_000_000, 3)
    found = check(deflate(data), data)
    assert {piece.bits for piece, _ in found if piece.kind == "gzip-mid"} == set(range(8))


def test_what_pigz_makes_decodes() -> None:
    blob = subprocess.run(["pigz", "-c"], input=DATA, capture_output=True, check=True).stdout
    check(blob, DATA)
    alone = subprocess.run(["pigz", "-ci"], input=DATA, capture_output=True, check=True).stdout
    check(alone, DATA)


def test_a_name_and_a_comment_in_the_header_do_not_matter() -> None:
    blob = deflate(DATA)
    header = blob[:3] + bytes([0b11100]) + blob[4:10]
    named = header + b"\x05\0extra" + b"name\0" + b"comment\0" + blob[10:]
    assert gzip.decompress(named) == DATA
    check(named, DATA)


@steady
@given(
    pieces=st.lists(
        st.tuples(
            st.integers(0, 200_000),
            st.integers(0, 9),
            st.sampled_from([0, 2, 3]),
            st.integers(0, 9),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_mix_of_members_decodes(pieces: list[tuple[int, int, int, int]]) -> None:
    data = blob = b""
    for size, level, mode, seed in pieces:
        part = text(size, seed) if seed < 7 else bytes(size)
        flush_every = 20_000 + seed if mode else 0
        blob += deflate(part, level, flush_every=flush_every, mode=mode)
        data += part
    check(blob, data)


def test_ranges_are_about_as_long_as_asked() -> None:
    found = scan(deflate(DATA))
    sizes = [len(made) for _, made in found]
    assert max(sizes) < 3 * SPACING
    assert min(sizes[:-1]) >= SPACING


def test_a_huge_block_is_one_range() -> None:
    data = bytes(8 << 20) + text(100_000)  # zeros: one deflate block of 4 MB and more
    found = check(deflate(data), data)
    piece, made = max(found, key=lambda item: len(item[1]))
    assert len(made) > 1 << 20
    compressed = deflate(data)[piece.compressed_offset :][: piece.compressed_size]
    sizes = [300_000] * (len(made) // 300_000)
    chunks = [compressed[at : at + 100] for at in range(0, len(compressed), 100)]
    window = unpacked(pack_window(piece))
    spans = list(decode_group(piece.kind, piece.bits, window, chunks, sizes))
    assert b"".join(spans) == made[: sum(sizes)]


def test_blocks_that_yield_nothing_do_not_make_a_range_long() -> None:
    empty = b"\0\0\0\xff\xff" * 2_000_000  # stored blocks of no bytes, 10 MB
    compressor = zlib.compressobj(6, zlib.DEFLATED, -15)
    start = compressor.compress(DATA) + compressor.flush(zlib.Z_FULL_FLUSH)
    end = compressor.compress(DATA) + compressor.flush()
    data = DATA + DATA
    trailer = zlib.crc32(data).to_bytes(4, "little") + len(data).to_bytes(4, "little")
    blob = b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + start + empty + end + trailer
    found = check(blob, data)
    assert max(piece.compressed_size for piece, _ in found) < 5 << 20


def test_windows_hold_only_what_is_needed() -> None:
    found = scan(deflate(DATA))
    needed = [pack_window(piece) for piece, _ in found if piece.kind == "gzip-mid"]
    whole = [zstandard.compress(piece.window) for piece, _ in found if piece.window]
    assert needed
    assert sum(map(len, needed)) < sum(map(len, whole)) / 2


def test_a_window_that_cannot_be_reduced_is_kept_whole() -> None:
    piece = Range("gzip-mid", 0, 10, 3, DATA[:32768], b"\xff" * 10, 1000)
    assert unpacked(pack_window(piece)) == DATA[:32768]


def test_empty_streams_are_empty() -> None:
    assert scan(deflate(b"")) == []
    assert scan(deflate(b"") * 3) == []


def test_empty_members_between_others_do_not_matter() -> None:
    blob = deflate(b"") * 500 + deflate(DATA) + deflate(b"") * 500 + deflate(DATA)
    check(blob + deflate(b"") * 500, DATA + DATA)


def test_what_follows_the_last_member_is_not_decoded() -> None:
    for rest in (b"\0", b"\0" * 1000, b"\x1f", b"garbage" * 1000):
        found = check(deflate(DATA) + rest, DATA)
        last = found[-1][0]
        assert last.compressed_offset + last.compressed_size == len(deflate(DATA))


@pytest.mark.parametrize("cut", [1, 2, 9, 10, 50, 1000, 100_000])
def test_a_truncated_stream_is_refused(cut: int) -> None:
    blob = deflate(DATA)
    for part in (blob[:cut], blob[:-cut]):
        with pytest.raises(LayerError, match="layer 0: "):
            scan(part)


def test_a_damaged_stream_is_refused_or_harmless() -> None:
    blob = deflate(DATA)
    rng = random.Random(5)
    refused = 0
    for place in [*range(3), *rng.sample(range(10, len(blob)), 40), len(blob) - 6]:
        damaged = bytearray(blob)
        damaged[place] ^= 0x55
        try:
            made = scan(bytes(damaged))
        except LayerError:
            refused += 1
        else:
            assert b"".join(part for _, part in made) == DATA
    assert refused > 35


def test_a_second_member_that_is_damaged_is_refused() -> None:
    with pytest.raises(LayerError):
        scan(deflate(DATA) + b"\x1f\x8b" + b"garbage" * 100)


@steady
@given(blob=st.binary(max_size=2000), start=st.sampled_from([b"", b"\x1f\x8b\x08\0\0\0\0\0\0\0"]))
def test_any_bytes_give_ranges_or_an_error(blob: bytes, start: bytes) -> None:
    try:
        total = sum(len(made) for _, made in scan(start + blob))
    except ClipError:
        return
    assert total <= 1032 * (len(blob) + 10)


@steady
@given(
    bits=st.integers(0, 9),
    window=st.one_of(st.none(), st.binary(max_size=64)),
    compressed=st.binary(max_size=500),
    size=st.integers(1, 100_000),
    kind=st.sampled_from(["gzip-mid", "gzip-start", "zstd-frame", "plain"]),
)
def test_decoding_any_bytes_gives_the_size_or_an_error(
    bits: int, window: bytes | None, compressed: bytes, size: int, kind: str
) -> None:
    try:
        made = decode_span(kind, bits, window, compressed, size)  # type: ignore[arg-type]
    except SpanDecodeError:
        return
    assert len(made) == size


def test_a_bomb_yields_no_more_than_was_asked_for() -> None:
    bomb = deflate(bytes(50_000_000))
    assert decode_span("gzip-start", 0, None, bomb, 1000) == bytes(1000)
    assert decode_span("gzip-start", 0, None, bomb, 1000, 2_000_000) == bytes(1000)
    with pytest.raises(SpanDecodeError):
        decode_span("gzip-start", 0, None, bomb, 1 << 30)


def test_a_span_in_the_middle_of_a_range_is_found_by_skipping() -> None:
    blob = deflate(DATA)
    for skip in (0, 1, 70_000, 500_000):
        assert decode_span("gzip-start", 0, None, blob, 1234, skip) == DATA[skip : skip + 1234]
    with pytest.raises(SpanDecodeError):
        decode_span("gzip-start", 0, None, blob, 1234, len(DATA) - 1000)


def test_a_wrong_window_does_not_give_the_right_bytes() -> None:
    blob = deflate(DATA)
    piece, made = next(item for item in scan(blob) if item[0].kind == "gzip-mid")
    compressed = blob[piece.compressed_offset :][: piece.compressed_size]
    wrong = decode_span("gzip-mid", piece.bits, b"?" * 32768, compressed, len(made))
    assert hashlib.sha256(wrong).digest() != hashlib.sha256(made).digest()

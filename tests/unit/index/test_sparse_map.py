"""Sparse files from map to chunks: whatever the map, the file reads as it should."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipshim.index.sparse_map import MAX_CHUNK_TABLE, checked, chunk_bits, pairs, parse_map
from tests.support.tar_layers import content, layer, member, tree_of

gaps = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 3000), st.integers(0, 40).map(lambda blocks: blocks * 512)),
        st.one_of(st.integers(1, 3000), st.integers(1, 20).map(lambda blocks: blocks * 512)),
    ),
    max_size=6,
)


@given(gaps, st.integers(0, 5000), st.sampled_from(["0.1", "1.0"]))
@settings(max_examples=150)
def test_any_sparse_file_reads_back(parts: list[tuple[int, int]], rest: int, version: str) -> None:
    expected = bytearray()
    pieces, data = [], b""
    for number, (gap, size) in enumerate(parts):
        expected += bytes(gap)
        pieces.append((len(expected), size))
        piece = bytes([65 + number]) * size
        expected += piece
        data += piece
    expected += bytes(rest)
    numbers = [str(number) for piece in pieces for number in piece]
    pax = {
        "GNU.sparse.major": version[0],
        "GNU.sparse.minor": version[2],
        "GNU.sparse.name": "file",
        "GNU.sparse.realsize": str(len(expected)),
    }
    if version == "0.1":
        pax["GNU.sparse.map"] = ",".join(numbers)
    else:
        text = "".join(f"{line}\n" for line in [str(len(pieces)), *numbers]).encode()
        data = text + bytes(-len(text) % 512) + data
    if version == "0.1" and not numbers:
        return  # an empty value takes the record back: there is no such map
    layers = [layer(member("x", data, pax=pax), member("next", b"after"))]
    image = tree_of(*layers)
    assert content(image, layers, b"file") == bytes(expected)
    assert content(image, layers, b"next") == b"after"


@pytest.mark.parametrize(
    ("size", "pieces", "offset", "bits"),
    [
        (0, [], 0, 9),
        (1, [(0, 1)], 512, 9),
        (512, [(0, 512)], 512, 9),
        (513, [(0, 513)], 512, 10),
        (5 << 30, [(0, 5 << 30)], 512, 33),
        (8192, [(4096, 4096)], 512, 12),
        (8192, [(4096, 100)], 512, None),  # what follows the piece in its block is not zeros
        (8292, [(4096, 4196)], 512, 12),
        (8192, [(100, 8092)], 512, None),
        (8192, [(4096, 4096)], 100, None),
        ((MAX_CHUNK_TABLE + 1) * 512, [(512, 512)], 512, None),
    ],
)
def test_chunks_cut_at_borders_of_pieces_only(
    size: int, pieces: list[tuple[int, int]], offset: int, bits: int | None
) -> None:
    assert chunk_bits(size, pieces, offset) == bits


def test_pieces_without_bytes_are_dropped() -> None:
    assert checked([(0, 0), (512, 10), (1000, 0)], 1000, 10) == [(512, 10)]


@pytest.mark.parametrize(
    ("pieces", "size", "payload"),
    [
        ([(0, 10), (5, 10)], 100, 20),
        ([(0, 10)], 5, 10),
        ([(0, 10)], 100, 11),
        ([(0, -1)], 100, -1),
        ([(-5, 10)], 100, 10),
    ],
)
def test_pieces_that_contradict_the_file_are_refused(
    pieces: list[tuple[int, int]], size: int, payload: int
) -> None:
    with pytest.raises(ValueError, match=r"out of order|covers"):
        checked(pieces, size, payload)


def test_a_map_is_known_when_its_last_line_is() -> None:
    text = b"2\n0\n10\n512\n20\n"
    for end in range(len(text)):
        assert parse_map(text[:end]) is None
    assert parse_map(text + bytes(500)) == [(0, 10), (512, 20)]


@pytest.mark.parametrize("numbers", [[b"1"], [b"1", b"x"], [b"", b"1"]])
def test_bad_numbers_are_refused(numbers: list[bytes]) -> None:
    with pytest.raises(ValueError, match=r"odd number|invalid literal"):
        pairs(numbers)

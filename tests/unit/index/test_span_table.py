"""Span tables: they come back as packed, find what lies where, and refuse contradictions."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipshim.errors import ClipError, IndexFormatError
from clipshim.index.span_table import (
    FEW_SPANS,
    MAX_SPAN_SIZE,
    MIN_MEAN_SPAN,
    Span,
    SpanKind,
    SpanTable,
)
from tests.unit.index.samples import steady

DIGEST = hashlib.sha256(b"").digest()


def gzip_spans() -> list[Span]:
    return [
        Span(0, 1000, 0, 400, 0, None, DIGEST, "gzip-start", 0),
        Span(1000, 500, 399, 200, 3, (0, 70), DIGEST, "gzip-mid", 0),
        Span(1500, 500, 399, 200, 3, (0, 70), DIGEST, "gzip-mid", 500),
        Span(2000, 9, 598, 20, 7, None, DIGEST, "gzip-mid", 0),
        Span(2009, 1, 700, 30, 0, (70, 5), DIGEST, "gzip-mid", 0),
    ]


def gzip_table() -> SpanTable:
    return SpanTable("gzip", 2010, 730, gzip_spans())


def reopened(table: SpanTable) -> SpanTable:
    return SpanTable.unpack(
        table.pack(), table.compression, table.size, table.blob_size, table.windows_size
    )


def test_a_table_comes_back() -> None:
    table = reopened(gzip_table())
    assert list(table) == gzip_spans()
    assert table == gzip_table()
    assert table.windows_size == 75
    assert table[-1] == gzip_spans()[-1]
    assert len(table) == 5
    with pytest.raises(IndexError):
        table[5]


def test_every_byte_of_the_layer_has_its_span() -> None:
    table = gzip_table()
    for offset in range(table.size):
        span = table[table.find(offset)]
        assert span.uncompressed_offset <= offset
        assert offset < span.uncompressed_offset + span.uncompressed_size
    for offset in (-1, table.size):
        with pytest.raises(IndexError):
            table.find(offset)


def test_spans_of_one_range_are_a_group() -> None:
    table = gzip_table()
    assert [table.group(i) for i in range(5)] == [
        range(1), range(1, 3), range(1, 3), range(3, 4), range(4, 5)
    ]  # fmt: skip


def test_an_empty_layer_has_no_spans() -> None:
    table = reopened(SpanTable("gzip", 0, 20, []))
    assert list(table) == []
    assert table.windows_size == 0


@steady
@given(
    pieces=st.lists(
        st.tuples(
            st.integers(1, MAX_SPAN_SIZE),
            st.integers(1, 1 << 20),
            st.integers(0, 100),
            st.integers(0, 3),
        ),
        max_size=40,
    )
)
def test_any_sound_zstd_table_comes_back(pieces: list[tuple[int, int, int, int]]) -> None:
    spans, offset, start = [], 0, 0
    for size, compressed_size, gap, more in pieces:
        start += gap
        skip = 0
        for _ in range(1 + more):
            digest = hashlib.sha256(str(offset).encode()).digest()
            spans.append(
                Span(offset, size, start, compressed_size, 0, None, digest, "zstd-frame", skip)
            )
            offset += size
            skip += size
        start += compressed_size
    table = reopened(SpanTable("zstd", offset, start, spans))
    assert list(table) == spans
    assert all(table.find(span.uncompressed_offset) == i for i, span in enumerate(spans))


def plain(offset: int, size: int) -> Span:
    return Span(offset, size, offset, size, 0, None, DIGEST, "plain", 0)


LIES = {
    "does not reach the end": (2010, [gzip_spans()[0]]),
    "goes beyond the end": (999, [gzip_spans()[0]]),
    "span of no bytes": (1000, [gzip_spans()[0], gzip_spans()[1]._replace(uncompressed_size=0)]),
    "huge span": (1 << 40, [gzip_spans()[0]._replace(uncompressed_size=1 << 40)]),
    "beyond the blob": (1000, [gzip_spans()[0]._replace(compressed_size=731)]),
    "starts beyond the blob": (1000, [gzip_spans()[0]._replace(compressed_offset=1 << 63)]),
    "empty range": (1000, [gzip_spans()[0]._replace(compressed_size=0)]),
    "overlap": (1500, [gzip_spans()[0], gzip_spans()[1]._replace(compressed_offset=398)]),
    "overlap of whole bytes": (1500, [gzip_spans()[0], gzip_spans()[1]._replace(bits=0)]),
    "out of order": (
        1500,
        [
            gzip_spans()[0]._replace(compressed_offset=100),
            gzip_spans()[1]._replace(compressed_offset=0, compressed_size=50),
        ],
    ),
    "nine bits": (1500, [gzip_spans()[0], gzip_spans()[1]._replace(bits=9)]),
    "huge window": (1500, [gzip_spans()[0], gzip_spans()[1]._replace(window=(0, 40_000))]),
    "bits at the start": (1000, [gzip_spans()[0]._replace(bits=1)]),
    "window at the start": (1000, [gzip_spans()[0]._replace(window=(0, 10))]),
    "zstd in gzip": (1000, [gzip_spans()[0]._replace(kind="zstd-frame")]),
    "plain in gzip": (1000, [plain(0, 730), plain(730, 270)]),
    "continues nothing": (500, [gzip_spans()[2]]),
    "continues another range": (
        1500,
        [gzip_spans()[0], gzip_spans()[2]._replace(compressed_offset=400)],
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_contradictions_are_refused(lie: str) -> None:
    size, spans = LIES[lie]
    packed = SpanTable("gzip", size, 730, spans).pack()
    windows_size = SpanTable("gzip", size, 730, spans).windows_size
    with pytest.raises(IndexFormatError, match="layer 7"):
        SpanTable.unpack(packed, "gzip", size, 730, windows_size, label="layer 7")


@pytest.mark.parametrize(
    "spans", [[plain(0, 10), plain(10, 9)._replace(compressed_offset=11)], [plain(0, 19)._replace(
        compressed_size=20)], [plain(0, 10), plain(10, 9)._replace(kind="gzip-start")]]
)  # fmt: skip
def test_plain_bytes_lie_where_they_are(spans: list[Span]) -> None:
    assert list(reopened(SpanTable("none", 19, 19, [plain(0, 10), plain(10, 9)])))
    with pytest.raises(IndexFormatError):
        reopened(SpanTable("none", 19, 20, spans))


def test_more_spans_than_the_bytes_are_worth_are_refused() -> None:
    """Each costs memory: a small index must not make a server hold millions."""

    def table(count: int, size: int) -> SpanTable:
        spans = [plain(i * size, size) for i in range(count)]
        return SpanTable("none", count * size, count * size, spans)

    assert len(reopened(table(FEW_SPANS, 1))) == FEW_SPANS
    assert len(reopened(table(FEW_SPANS + 1, MIN_MEAN_SPAN))) == FEW_SPANS + 1
    with pytest.raises(IndexFormatError, match="on average") as caught:
        reopened(table(FEW_SPANS + 1, MIN_MEAN_SPAN - 1))
    assert "clipshim index" in (caught.value.hint or "")


def test_a_table_of_another_layer_is_refused() -> None:
    packed = gzip_table().pack()
    for arguments in (("zstd", 2010, 730, 75), ("gzip", 2011, 730, 75), ("gzip", 2010, 731, 75)):
        with pytest.raises(IndexFormatError):
            SpanTable.unpack(packed, *arguments)
    for windows_size in (0, 74, 76):
        with pytest.raises(IndexFormatError, match="windows"):
            SpanTable.unpack(packed, "gzip", 2010, 730, windows_size)
    for damaged in (b"", packed[:27], packed[:-1], packed + b"\0", b"X" + packed[1:]):
        with pytest.raises(IndexFormatError):
            SpanTable.unpack(damaged, "gzip", 2010, 730, 75)


def test_any_change_is_refused_or_gives_a_sound_table() -> None:
    packed = gzip_table().pack()
    rng = random.Random(11)
    kinds: set[SpanKind] = {"gzip-mid", "gzip-start"}
    for _ in range(3000):
        damaged = bytearray(packed)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.choice([0, 1, 0x7F, 0x80, 0x81, 0xFF])
        try:
            table = SpanTable.unpack(bytes(damaged), "gzip", 2010, 730, 75)
        except ClipError:
            continue
        spans = list(table)
        assert sum(span.uncompressed_size for span in spans) == 2010
        assert all(span.compressed_offset + span.compressed_size <= 730 for span in spans)
        assert all(span.kind in kinds for span in spans)
        assert all(sum(span.window) <= 75 for span in spans if span.window)
        assert table.pack() == damaged

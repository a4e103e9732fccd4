"""Which spans are fetched ahead of which reads."""

from __future__ import annotations

import random

from clipshim.lazy.readahead import KNOWN_NEIGHBOURS, LONGEST, NEIGHBOURS, STREAMS, Readahead

SPAN = 512 << 10


class Reads:
    """Reads of one layer; `ahead` is what each of them asked for that was not asked for before."""

    def __init__(self, spans: int) -> None:
        self._readahead = Readahead(spans)
        self.foretell = self._readahead.foretell
        self.asked: set[int] = set()
        self.read: set[int] = set()

    def __call__(self, span: int, size: int = SPAN) -> list[int]:
        """Reads the first `size` bytes of a span."""
        last = span + (size - 1) // SPAN
        self.read.update(range(span, last + 1))
        wanted = self._readahead.advance(span, last, span * SPAN, size)
        ahead = sorted(set(wanted) - self.asked - self.read)
        self.asked.update(ahead)
        return ahead

    @property
    def in_vain(self) -> set[int]:
        """What was asked for and not read."""
        return self.asked - self.read


def test_isolated_reads_ask_for_nothing_ahead() -> None:
    reads = Reads(1000)

    assert [reads(span) for span in range(0, 1000, 7)] == [[]] * 143


def test_what_is_asked_in_vain_stays_in_proportion_to_what_was_read() -> None:
    for size, share in ((SPAN, 1), (SPAN // 2, 4)):
        for length in range(1, 60):
            reads = Reads(1000)
            for span in range(length):
                reads(span, size)

            assert len(reads.in_vain) <= max(1, length // share) + NEIGHBOURS - KNOWN_NEIGHBOURS


def test_a_long_file_is_asked_for_ever_further_ahead() -> None:
    for size in (SPAN, SPAN // 2):
        reads = Reads(300)
        furthest = 0
        for span in range(300):
            ahead = reads(span, size)
            assert all(span < wanted <= span + LONGEST for wanted in ahead)
            furthest = max([furthest, *(wanted - span for wanted in ahead)])

        assert reads.asked >= set(range(3, 300))
        assert furthest == LONGEST


def test_whoever_reads_everything_runs_ahead_faster_than_whoever_leaves_bytes_out() -> None:
    everything, parts = Reads(1000), Reads(1000)
    for span in range(NEIGHBOURS + 4):
        everything(span)
        parts(span, SPAN // 2)

    assert max(everything.asked) > max(parts.asked)


def test_a_read_that_comes_after_its_successor_belongs_to_the_same_stream() -> None:
    reads = Reads(1000)
    for span in (0, 1, 2):
        reads(span)
    reads(3, 2 * SPAN)
    before = max(reads.asked)

    assert reads(3) == []
    for span in (5, 6, 7, 8):
        reads(span)
    assert max(reads.asked) > before


def test_streams_of_several_files_do_not_disturb_each_other() -> None:
    reads = Reads(STREAMS * 100)
    for step in range(20):
        for stream in range(STREAMS):
            reads(stream * 100 + step)

    assert {span // 100 for span in reads.asked} == set(range(STREAMS))
    for stream in range(STREAMS):
        assert max(span for span in reads.asked if span // 100 == stream) % 100 > 20


def test_a_neighbourhood_of_which_a_part_was_read_comes_whole() -> None:
    reads = Reads(1000)
    places = [2 * NEIGHBOURS + place for place in (0, 3, 15, 9, 12)]
    for span in places[: KNOWN_NEIGHBOURS - 1]:
        assert reads(span) == []

    neighbourhood = set(range(2 * NEIGHBOURS, 3 * NEIGHBOURS))
    assert set(reads(places[KNOWN_NEIGHBOURS - 1])) == neighbourhood - set(places)


def test_a_span_that_is_read_again_and_again_says_nothing_of_its_neighbourhood() -> None:
    reads = Reads(1000)

    assert [reads(37, 4096) for _ in range(100)] == [[]] * 100


def test_reads_that_were_foretold_ask_for_nothing_and_others_do() -> None:
    reads = Reads(1000)
    reads.foretell(range(100))

    assert [reads(span) for span in range(99)] == [[]] * 99
    for span in range(100, 110):
        reads(span)
    assert reads.asked >= set(range(110, 112))


def test_a_neighbourhood_ends_where_the_layer_does() -> None:
    reads = Reads(NEIGHBOURS + 9)
    asked = [span for place in (0, 2, 4, 6, 8) for span in reads(NEIGHBOURS + place)]

    assert asked == [NEIGHBOURS + place for place in (1, 3, 5, 7)]


def test_reads_all_over_a_layer_fetch_little_in_vain() -> None:
    spans = 4000
    reads = Reads(spans)
    for span in random.Random(1).sample(range(spans), spans // 10):
        reads(span, 4096)

    assert len(reads.in_vain) < spans // 20

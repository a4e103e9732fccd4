"""Which spans are fetched ahead of which reads."""

from __future__ import annotations

from clipshim.lazy.readahead import LONGEST, STREAMS, Readahead

SPAN = 512 << 10


def whole(readahead: Readahead, span: int) -> range:
    """Reads all of a span."""
    return readahead.advance(span, span, span * SPAN, SPAN)


def half(readahead: Readahead, span: int) -> range:
    """Reads the first half of a span."""
    return readahead.advance(span, span, span * SPAN, SPAN // 2)


def test_isolated_reads_ask_for_nothing_ahead() -> None:
    readahead = Readahead(1000)

    assert [len(whole(readahead, span)) for span in range(0, 1000, 7)] == [0] * 143


def test_what_is_asked_in_vain_stays_in_proportion_to_what_was_read() -> None:
    for read, share in ((whole, 1), (half, 4)):
        for length in range(1, 60):
            readahead = Readahead(1000)
            asked = [span for last in range(length) for span in read(readahead, last)]

            in_vain = [span for span in asked if span >= length]
            assert len(in_vain) <= max(1, length // share)


def test_a_long_file_is_asked_for_once_and_ever_further_ahead() -> None:
    for read in (whole, half):
        readahead = Readahead(300)
        asked: list[int] = []
        furthest = 0
        for span in range(300):
            ahead = read(readahead, span)
            asked.extend(ahead)
            assert all(span < wanted <= span + LONGEST for wanted in ahead)
            furthest = max([furthest, *(wanted - span for wanted in ahead)])

        assert asked == list(range(asked[0], 300))
        assert asked[0] <= 3
        assert furthest == LONGEST


def test_whoever_reads_everything_runs_ahead_faster_than_whoever_leaves_bytes_out() -> None:
    everything, parts = Readahead(1000), Readahead(1000)
    for span in range(10):
        whole(everything, span)
        half(parts, span)

    assert whole(everything, 10).stop > half(parts, 10).stop


def test_a_read_that_comes_after_its_successor_belongs_to_the_same_stream() -> None:
    readahead = Readahead(1000)
    for span in (0, 1, 2, 3):
        whole(readahead, span)
    readahead.advance(4, 5, 4 * SPAN, SPAN)

    assert len(whole(readahead, 4)) == 0
    assert len(whole(readahead, 6)) > 0


def test_streams_of_several_files_do_not_disturb_each_other() -> None:
    readahead = Readahead(STREAMS * 100)
    asked = [
        span
        for step in range(20)
        for stream in range(STREAMS)
        for span in whole(readahead, stream * 100 + step)
    ]

    assert len(asked) == len(set(asked))
    assert {span // 100 for span in asked} == set(range(STREAMS))

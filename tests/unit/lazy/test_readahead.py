"""Which spans are fetched ahead of which reads."""

from __future__ import annotations

from clipshim.lazy.readahead import LONGEST, STREAMS, Readahead


def test_isolated_reads_ask_for_nothing_ahead() -> None:
    readahead = Readahead(1000)

    assert [len(readahead.advance(span, span)) for span in range(0, 1000, 7)] == [0] * 143


def test_what_is_asked_in_vain_stays_in_proportion_to_what_was_read() -> None:
    for length in range(1, 60):
        readahead = Readahead(1000)
        asked = [span for last in range(length) for span in readahead.advance(last, last)]

        in_vain = [span for span in asked if span >= length]
        assert len(in_vain) <= max(1, length // 2)


def test_a_long_file_is_asked_for_once_and_ever_further_ahead() -> None:
    readahead = Readahead(200)
    asked: list[int] = []
    furthest = 0
    for span in range(200):
        ahead = readahead.advance(span, span)
        asked.extend(ahead)
        assert all(span < wanted <= span + LONGEST for wanted in ahead)
        furthest = max([furthest, *(wanted - span for wanted in ahead)])

    assert asked == list(range(asked[0], 200))
    assert asked[0] <= 3
    assert furthest == LONGEST


def test_streams_of_several_files_do_not_disturb_each_other() -> None:
    readahead = Readahead(STREAMS * 100)
    asked = [
        span
        for step in range(20)
        for stream in range(STREAMS)
        for span in readahead.advance(stream * 100 + step, stream * 100 + step)
    ]

    assert len(asked) == len(set(asked))
    assert {span // 100 for span in asked} == set(range(STREAMS))

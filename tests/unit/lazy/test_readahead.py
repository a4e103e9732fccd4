"""Which spans are fetched ahead of which reads."""

from __future__ import annotations

from clipshim.lazy.readahead import CERTAIN, LONGEST, STREAMS, Readahead


def test_isolated_reads_ask_for_nothing_ahead() -> None:
    readahead = Readahead(1000)

    assert [len(readahead.advance(span, span)) for span in range(0, 1000, 7)] == [0] * 143


def test_a_file_of_two_spans_asks_for_nothing_ahead() -> None:
    readahead = Readahead(1000)

    assert [*readahead.advance(5, 5), *readahead.advance(5, 6), *readahead.advance(6, 6)] == []


def test_a_long_file_is_asked_for_once_and_ever_further_ahead() -> None:
    readahead = Readahead(100)
    asked: list[int] = []
    furthest = 0
    for span in range(100):
        ahead = readahead.advance(span, span)
        asked.extend(ahead)
        assert all(span < wanted <= span + LONGEST for wanted in ahead)
        furthest = max([furthest, *(wanted - span for wanted in ahead)])

    assert asked == list(range(CERTAIN + 1, 100))
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

"""The log's form."""

from __future__ import annotations

import json
import logging
import sys

from clipshim.node.logs import BURST, WINDOW_S, Flood, JsonFormatter, TextFormatter


def record(message: str, *, error: bool = False, **fields: object) -> logging.LogRecord:
    try:
        if error:
            raise ValueError("two\nlines")
    except ValueError:
        info = sys.exc_info()
    else:
        info = (None, None, None)
    made = logging.getLogger("test").makeRecord(
        "test", logging.WARNING, __file__, 1, message, (), info, extra=fields
    )
    made.created = 0.0
    made.msecs = 5.0
    return made


def test_an_event_is_one_line_of_text_whatever_it_holds() -> None:
    text = TextFormatter(journal=False).format(record("a\nb", error=True, layer="x"))
    assert "\n" not in text
    assert text.startswith("1970-01-01T00:00:00.005Z warning test: a | b layer=x")
    assert "ValueError" in text


def test_the_journal_gets_a_priority_and_no_time() -> None:
    assert TextFormatter(journal=True).format(record("a")) == "<4>test: a"


def test_json_has_the_fields_and_the_traceback() -> None:
    line = JsonFormatter().format(record("a\nb", error=True, layer="x"))
    assert "\n" not in line
    entry = json.loads(line)
    assert entry["msg"] == "a\nb"
    assert entry["level"] == "warning"
    assert entry["layer"] == "x"
    assert "ValueError" in entry["traceback"]


def test_a_flood_of_one_kind_is_held_back_and_counted() -> None:
    now = 0.0
    flood = Flood(lambda: now)
    assert [flood.filter(record(f"layer {i}: dead")) for i in range(100)] == [
        i < BURST for i in range(100)
    ]
    now = WINDOW_S
    last = record("layer 7: dead")
    assert flood.filter(last)
    assert last.getMessage() == f"layer 7: dead ({100 - BURST} like it before were not logged)"
    again = record("layer 8: 50% dead")
    assert flood.filter(again)
    assert again.getMessage() == "layer 8: 50% dead"


def test_events_and_other_images_are_not_part_of_a_flood() -> None:
    flood = Flood(lambda: 0.0)
    for number in range(100):
        assert flood.filter(record("lost", image_id=str(number)))
        event = record("mounted")
        event.levelno = logging.INFO
        assert flood.filter(event)

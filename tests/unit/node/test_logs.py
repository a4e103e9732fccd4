"""The log's form."""

from __future__ import annotations

import json
import logging
import sys

from clipshim.node.logs import JsonFormatter, TextFormatter


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

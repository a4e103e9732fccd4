"""JSON without the json package: the same values, the same refusals."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipshim.shim import json_text

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=20,
)


@given(VALUES)
def test_round_trip(value: object) -> None:
    text = json_text.dumps(value)
    assert json_text.loads(text) == value
    assert json.loads(text) == value


@given(st.text(alphabet=' \t\n{}[],:"\\0123456789.eE+-truefalsn', max_size=30))
def test_it_accepts_what_json_accepts(text: str) -> None:
    try:
        expected = json.loads(text, parse_float=str)
    except ValueError:
        with pytest.raises(ValueError, match=r"."):
            json_text.loads(text)
    else:
        assert json_text.loads(text) == expected


def test_numbers_keep_their_text() -> None:
    text = '{"a": 1.50, "b": 1e400, "c": -0.0, "d": 123456789012345678901234567890}'
    assert json_text.dumps(json_text.loads(text)) == text


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "-Infinity", "[NaN]", "", "{}x", "[" * 100_000]
)
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        json_text.loads(text)


def test_bytes_that_are_no_utf_8_are_what_go_takes_them_for() -> None:
    assert json_text.loads(b' "\xc3\xa9" ') == "é"
    # Go's decoder makes U+FFFD of each such byte, and of each lone surrogate
    assert (
        json_text.dumps(json_text.loads(b'"\xff\xed\xa0\x80"')) == '"\\udcff\\udced\\udca0\\udc80"'
    )

"""JSON without the `json` package, which imports `re` (6 ms, at every create of every container).

The scanner is the one that `json` itself uses, from its C half. Numbers that are not small integers
keep their text, so that a document that is read and written again loses nothing.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_DEPTH = 200  # deeper documents are refused; Go's decoder stops at 10000


class NumberText(str):
    """A number with fraction or exponent, as it was written."""

    __slots__ = ()


class _Scanner:
    """What the C scanner asks of a JSONDecoder."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_int = int
    parse_float = NumberText

    def __init__(self) -> None:
        self.memo: dict[str, str] = {}

    @staticmethod
    def parse_constant(name: str) -> "Any":
        raise ValueError(f"{name} is not JSON")


def loads(raw: "bytes | str") -> "Any":
    """Decodes one document. Raises ValueError; duplicate names take the last value, as in Go.

    Bytes that are no UTF-8 become lone surrogates, which Go reads as U+FFFD, as it reads the bytes.
    """
    text = raw if isinstance(raw, str) else raw.decode("utf-8", "surrogateescape")
    try:
        from _json import make_scanner
    except ImportError:  # another implementation of Python
        import json

        return json.loads(text, parse_float=NumberText)
    start = 0
    while text[start : start + 1] in (" ", "\t", "\n", "\r") and start < len(text):
        start += 1
    try:
        value, end = make_scanner(_Scanner())(text, start)  # type: ignore[arg-type]
    except StopIteration as exc:
        raise ValueError(f"no JSON value at character {exc.value}") from None
    except SystemError:  # the C scanner wants json.decoder loaded to raise its errors
        import json

        json.loads(text)
        raise ValueError("not JSON") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if text[end:].strip(" \t\n\r"):
        raise ValueError(f"text after the JSON value, at character {end}")
    return value


def dumps(value: "Any") -> str:
    """Encodes in one line, ASCII only, in the order of the dicts."""
    parts: list[str] = []
    _encode(value, parts, 0)
    return "".join(parts)


def _encode(value: "Any", parts: "list[str]", depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError("JSON nested too deeply")
    if isinstance(value, NumberText):
        parts.append(str(value))
    elif isinstance(value, str):
        parts.append(_quote(value))
    elif value is None:
        parts.append("null")
    elif value is True:
        parts.append("true")
    elif value is False:
        parts.append("false")
    elif isinstance(value, int):
        parts.append(int.__repr__(value))
    elif isinstance(value, float):
        parts.append(float.__repr__(value))
    elif isinstance(value, dict):
        parts.append("{")
        for number, (key, item) in enumerate(value.items()):
            parts += [", " if number else "", _quote(key), ": "]
            _encode(item, parts, depth + 1)
        parts.append("}")
    elif isinstance(value, (list, tuple)):
        parts.append("[")
        for number, item in enumerate(value):
            if number:
                parts.append(", ")
            _encode(item, parts, depth + 1)
        parts.append("]")
    else:
        raise TypeError(f"not JSON: {type(value).__name__}")


def _quote(text: str) -> str:
    try:
        from _json import encode_basestring_ascii
    except ImportError:
        import json

        return json.dumps(text)
    return encode_basestring_ascii(text)

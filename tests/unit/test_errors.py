"""The error tree: each class tells exit code and errno, each message its hint."""

from __future__ import annotations

from clipshim import errors


def _all_errors() -> list[type[errors.ClipError]]:
    found = [errors.ClipError]
    for cls in found:
        found.extend(cls.__subclasses__())
    return found


def test_every_error_has_a_failing_exit_code_and_an_errno() -> None:
    for cls in _all_errors():
        assert cls.exit_code in (1, 2), cls
        assert cls.errno > 0, cls


def test_the_hint_follows_the_message() -> None:
    assert str(errors.ClipError("broken", hint="mend it")) == "broken (mend it)"
    assert str(errors.ClipError("broken")) == "broken"

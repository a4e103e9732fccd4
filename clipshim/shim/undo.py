"""Roll-back by unwinding: contextlib.ExitStack without contextlib, which costs 3 ms to load.

    with Undo() as undo:
        make(thing)
        undo.push(unmake, thing)
        …
        undo.commit()      # from here on nothing is undone

An error in one step of the roll-back does not keep the others from running, nor does it hide the
error that started it: that one says what could not be undone.
"""

from clipshim.errors import ClipError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Undo:
    """Steps to run, last first, if the block is left without commit()."""

    __slots__ = ("_steps", "failures")

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.failures: list[Exception] = []

    def push(self, step: "Callable[..., Any]", *arguments: "Any") -> None:
        """Adds what undoes the thing just done."""
        self._steps.append((step, arguments))

    def commit(self) -> None:
        """Keeps everything."""
        self._steps.clear()

    def unwind(self) -> None:
        """Undoes everything now."""
        while self._steps:
            step, arguments = self._steps.pop()
            try:
                step(*arguments)
            except Exception as exc:  # the other steps still have to run
                self.failures.append(exc)

    def __enter__(self) -> "Undo":
        return self

    def __exit__(self, _kind: object, error: object, _traceback: object) -> None:
        self.unwind()
        if self.failures and isinstance(error, ClipError):
            error.message += f"; then undoing failed: {'; '.join(map(str, self.failures))}"

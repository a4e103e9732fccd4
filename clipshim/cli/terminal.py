"""What commands print: data on stdout, progress and errors on stderr.

Names from images are hostile: they pass through `printable` before a terminal sees them.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def printable(text: str | bytes) -> str:
    """`text` on one line, with everything that could steer a terminal written as an escape."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_error(message: str, hint: str | None = None) -> None:
    """`clipshim: error: …` and `hint: …` on stderr."""
    sys.stderr.write(f"clipshim: error: {message}\n")
    if hint:
        sys.stderr.write(f"hint: {hint}\n")
    sys.stderr.flush()


def print_note(message: str) -> None:
    """One line on stderr for a person."""
    sys.stderr.write(f"{printable(message)}\n")
    sys.stderr.flush()


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns on stdout; numbers to the right. Never wraps: the output may be parsed."""
    texts = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max([len(name), *(len(row[i]) for row in texts)]) for i, name in enumerate(columns)]
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        for i in range(len(columns))
    ]

    def line(cells: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        ]
        return "  ".join(parts).rstrip()

    sys.stdout.write("\n".join([line([name.upper() for name in columns]), *map(line, texts)]))
    sys.stdout.write("\n")


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """`name: value` lines with the values aligned."""
    width = max((len(name) for name, _ in fields), default=0) + 1
    for name, value in fields:
        sys.stdout.write(f"{(name + ':').ljust(width)} {printable(str(value))}\n")


def human_size(size: float) -> str:
    """A number of bytes for people, three digits: `1.43 MB`. Powers of 1000, as engines print."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[ProgressBars]:
    """Bars on stderr while the block runs; nothing when it is no terminal or `quiet`."""
    if quiet or not sys.stderr.isatty():
        yield ProgressBars(None)
        return
    from rich.console import Console  # only for a person: 40 ms
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as progress:
        yield ProgressBars(progress)


class ProgressBars:
    """One bar a layer. The Progress protocol of clipshim.index.builder; thread-safe as rich is."""

    def __init__(self, progress: Any | None) -> None:
        self._progress = progress
        self._tasks: dict[int, Any] = {}

    def layer_started(self, i: int, digest: str, total_bytes: int) -> None:
        """Layer `i` begins; `total_bytes` are expected of it."""
        self._with(
            lambda p: self._tasks.__setitem__(
                i, p.add_task(f"layer {i + 1} {digest.partition(':')[2][:12]}", total=total_bytes)
            )
        )

    def layer_advanced(self, i: int, bytes_done: int) -> None:
        """So many bytes of layer `i` are done, counted from its beginning."""
        self._with(lambda p: p.update(self._tasks[i], completed=bytes_done))

    def layer_finished(self, i: int) -> None:
        """Layer `i` is done."""
        self._with(lambda p: p.update(self._tasks[i], completed=p.tasks[self._tasks[i]].total))

    def message(self, text: str) -> None:
        """Something a person should know, above the bars."""
        self._with(lambda p: p.console.print(printable(text), markup=False, highlight=False))

    def _with(self, act: Callable[[Any], object]) -> None:
        if self._progress is not None:
            act(self._progress)

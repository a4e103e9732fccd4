"""What the benches share: a private root, measuring in turns, tables of medians and ratios.

A contender is measured in turns with the others, so that a slow minute of the machine hits all of
them. Not for assertions: a bench prints, tests decide.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

# At the end: `tests` comes from the checkout, `clipshim` from the environment's wheel.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from tests.support import leftovers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


@contextlib.contextmanager
def bench_root() -> Iterator[Path]:
    """A directory below which everything of this bench lies; nothing is left of it."""
    run = secrets.token_hex(4)
    root = leftovers.PARENT / f"{leftovers.PREFIX}{run}"
    root.mkdir(mode=0o711)
    (root / "owner").write_text(f"{os.getpid()} {leftovers.start_time(os.getpid())}\n")
    (root / "tmp").mkdir(mode=0o1777)
    os.environ["CLIPSHIM_TEST_RUN"] = run
    os.environ["CLIPSHIM_TEST_ROOT"] = str(root)
    os.environ["TMPDIR"] = str(root / "tmp")
    try:
        yield root
    finally:
        leftovers.remove_cgroup_parent(root)
        leftovers.remove(root)


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(
    contenders: Mapping[str, Callable[[], float]], runs: int, *, warm_up: int = 1
) -> dict[str, float]:
    """Medians of `runs` measurements of each; each contender returns its own seconds."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-warm_up, runs):
        for name, measure in contenders.items():
            value = measure()
            if turn >= 0:
                taken[name].append(value)
    return {name: statistics.median(values) for name, values in taken.items()}


def drop_caches() -> None:
    """Writes out and forgets the page cache of the whole machine."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}")
    for number, row in enumerate(cells):
        words = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(words).rstrip())
        if number == 0:
            print("  " + "  ".join("-" * width for width in widths))
    sys.stdout.flush()


def against(medians: Mapping[str, float], base: str) -> list[list[object]]:
    """Rows of (name, ms, ratio to `base`, difference in ms)."""
    return [
        [
            name,
            f"{value * 1000:.1f}",
            f"{value / medians[base]:.2f}",
            f"{(value - medians[base]) * 1000:+.1f}",
        ]
        for name, value in medians.items()
    ]


COLUMNS = ("", "ms", "ratio", "difference ms")

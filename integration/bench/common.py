"""What the benches share: a private root, measuring in turns, Markdown tables with budgets.

A contender is measured in turns with the others, so that a slow minute of the machine hits all of
them: ratios within a run mean something even if times do not. Not for assertions: a bench prints,
tests decide.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

# At the end: `tests` comes from the checkout, `clipshim` from the environment's wheel.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from tests.support import images, leftovers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tests.support.node import Node
    from tests.support.registry import TestRegistry

MODES = ("erofs", "fuse")
PROGRAM = ("python3", "-c", "import json, asyncio, http.client")


class Options:
    """The command line of a bench: `runs` is how often the cheap things are measured."""

    def __init__(self, description: str | None, *, runs: int, quick: int) -> None:
        parser = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
        parser.add_argument("--runs", type=int, default=None, help=f"measurements ({runs})")
        parser.add_argument("--quick", action="store_true", help=f"only {quick} of them")
        found = parser.parse_args()
        self.runs: int = found.runs or (quick if found.quick else runs)
        self.few: int = max(2, self.runs // 5)  # of what takes seconds
        self.quick: bool = found.quick


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
    began = os.getloadavg()[0]
    try:
        yield root
    finally:
        print(
            f"\nload of the machine: {began:.1f} at the start, {os.getloadavg()[0]:.1f} at the end"
        )
        leftovers.remove_cgroup_parent(root)
        leftovers.remove(root)


def index_of(root: Path, registry: TestRegistry, node: Node) -> tuple[images.Image, str, Path]:
    """The Debian image, its name in the registry, and its index in a directory of its own."""
    debian = images.debian_image()
    return debian, *pushed_and_indexed(root, registry, node, debian, "debian")


def pushed_and_indexed(
    root: Path, registry: TestRegistry, node: Node, image: images.Image, name: str
) -> tuple[str, Path]:
    """An image's name in the registry, and its index."""
    reference = registry.push_layout(image.layout, f"{name}:bench", tag=images.TAG)
    clip = root / "indexes" / f"{name}.clip"
    clip.parent.mkdir(exist_ok=True)
    node.clipshim("index", reference, clip)
    return reference, clip


def shell(command: str, directory: Path) -> None:
    """Runs a command line in a directory."""
    subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=directory,
        check=True,
        stdin=subprocess.DEVNULL,
    )


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
    """Prints a Markdown table; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    print(f"\n### {title}\n")
    for number, row in enumerate(cells):
        words = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("| " + " | ".join(words) + " |")
        if number == 0:
            rules = ["-" * width for width in widths]
            print("| " + " | ".join([rules[0], *(f"{rule[1:]}:" for rule in rules[1:])]) + " |")
    sys.stdout.flush()


def verdict(*, met: bool) -> str:
    """The last column of a table."""
    return "met" if met else "NOT met"


def print_against(
    title: str,
    medians: Mapping[str, float],
    *,
    ratio: float | None = None,
    extra_ms: float | None = None,
) -> None:
    """A table of times against the first contender, and whether each keeps the budget given."""
    base = next(iter(medians.values()))
    budget = ""
    if ratio is not None:
        budget = f"≤ {ratio:g}"
    elif extra_ms is not None:
        budget = f"≤ +{extra_ms:g} ms"
    rows: list[list[str]] = []
    for number, (name, value) in enumerate(medians.items()):
        over_ms = (value - base) * 1000
        row = [name, f"{value * 1000:.1f}", f"{value / base:.2f}", f"{over_ms:+.1f}"]
        if budget and number:
            met = value / base <= ratio if ratio is not None else over_ms <= (extra_ms or 0)
            row += [budget, verdict(met=met)]
        elif budget:
            row += ["", ""]
        rows.append(row)
    header = ["", "median ms", "ratio", "difference ms", *(["budget", ""] if budget else [])]
    print_table(title, header, rows)


def status(node: Node) -> dict[str, Any]:
    """What `clipshim status` says."""
    document: dict[str, Any] = json.loads(node.clipshim("status", "--format", "json").stdout)
    return document


def find_number(document: object, key: str) -> int:
    """The largest number of this name anywhere in a JSON document; 0 if there is none."""
    if isinstance(document, dict):
        if isinstance(document.get(key), int):
            return int(document[key])
        document = list(document.values())
    if isinstance(document, list):
        return max((find_number(item, key) for item in document), default=0)
    return 0

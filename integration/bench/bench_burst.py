"""Many containers of one warm image at once: create and delete of all of them.

    bench_burst.py [--runs N] [--quick]

As an engine does it: each container has an overlay that is mounted already, under runc of the whole
image, under clipshim of a stub. What engines do themselves is not measured. Wall time shows what
waits in line, CPU time what the machine has to do; the daemon's is part of neither.
"""

from __future__ import annotations

import resource
import shutil
import statistics
import subprocess
from typing import TYPE_CHECKING

from common import Options, bench_root, print_table, seconds

from clipshim.mounts import overlay, syscalls
from tests.support import images
from tests.support.node import Node
from tests.support.runtimes import Runtime, write_bundle

if TYPE_CHECKING:
    from pathlib import Path

CONTAINERS = 50


class Engine:
    """Overlays and bundles for so many containers, all on the layer `lower`."""

    def __init__(self, root: Path, runtime: Runtime, lower: Path) -> None:
        self.runtime = runtime
        self.lower = lower
        self.bundles = []
        for number in range(CONTAINERS):
            directory = root / str(number)
            for name in ("upper", "work", "merged"):
                (directory / name).mkdir(parents=True)
            write_bundle(directory, ["/bin/sleep", "100000"], rootfs=directory / "merged")
            self.bundles.append(directory)

    def mount(self) -> None:
        """What an engine does before it calls its runtime."""
        for directory in self.bundles:
            overlay.OverlayPlan(
                f"{directory}/merged",
                [str(self.lower)],
                upper=f"{directory}/upper",
                work=f"{directory}/work",
            ).execute()

    def unmount(self) -> None:
        """What it does afterwards."""
        for directory in self.bundles:
            syscalls.umount2(f"{directory}/merged", syscalls.MNT_DETACH)

    def at_once(self, *words: str) -> tuple[float, float]:
        """One verb for all containers: wall and CPU seconds of each."""
        before = _cpu()
        with open(self.runtime.root / "output.log", "ab") as output:

            def burst() -> None:
                children = [
                    subprocess.Popen(
                        self.runtime.command(*words, directory.name),
                        cwd=directory,
                        env=self.runtime.env,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                    )
                    for directory in self.bundles
                ]
                statuses = [child.wait() for child in children]  # all: none may stay behind
                assert not any(statuses), output.name

            wall = seconds(burst)
        return wall / CONTAINERS, (_cpu() - before) / CONTAINERS


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measures and prints."""
    options = Options(__doc__, runs=20, quick=8)
    with bench_root() as root, Node(root / "node") as node:
        tiny = images.tiny_image()
        full = images.unpack(tiny, root / "unpacked")
        stub = root / "stub"
        (stub / ".clip").mkdir(parents=True)
        clip = root / "tiny.clip"
        node.clipshim("index", tiny.reference, clip, "--embed", "--quiet")
        shutil.copy(clip, stub / ".clip/index.clip")
        with (
            Runtime.runc(root / "runc-root") as runc,
            Runtime.clipshim(root / "shim-root", node) as shim,
        ):
            engines = {
                "runc": Engine(root / "runc", runc, full),
                "clipshim": Engine(root / "shim", shim, stub),
            }
            taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
            for turn in range(-1, options.few):
                for name, engine in engines.items():
                    engine.mount()
                    try:
                        created = engine.at_once("create")
                        deleted = engine.at_once("delete", "--force")
                    finally:
                        engine.unmount()
                    if turn >= 0:
                        taken.setdefault(("create", name), []).append(created)
                        taken.setdefault(("delete --force", name), []).append(deleted)
    for verb in ("create", "delete --force"):
        rows = []
        base: list[float] = []
        for name in engines:
            both = zip(*taken[verb, name], strict=True)
            values = [statistics.median(column) * 1000 for column in both]
            base = base or values
            row = [name]
            for value, first in zip(values, base, strict=True):
                row += [f"{value:.1f}", f"{value / first:.2f}"]
            rows.append(row)
        header = ["", "wall ms each", "ratio", "CPU ms each", "ratio"]
        print_table(f"{verb} of {CONTAINERS} containers at once", header, rows)


if __name__ == "__main__":
    main()

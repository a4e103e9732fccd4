"""What clipshim costs an engine, and what it saves: create of a warm image, start of a cold one.

    bench_start.py [--runs N] [--quick]

Warm: against bare runc on an unpacked copy of the same image. Cold: the whole way until a program
that imports json, asyncio and http.client has ended, with an empty store and no daemon, against
pull, unpack and run; a first time, and again with the profile that the first start left. Cold also
with a large image, of which such a program needs little, unless --quick.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
from typing import TYPE_CHECKING

from common import (
    MODES,
    PROGRAM,
    Options,
    bench_root,
    find_number,
    in_turns,
    index_of,
    print_against,
    print_table,
    pushed_and_indexed,
    seconds,
    status,
    verdict,
)

from tests.support import images
from tests.support.node import Node, wait_for
from tests.support.registry import running_registry
from tests.support.runtimes import Runtime, write_bundle

if TYPE_CHECKING:
    from pathlib import Path

SLEEP = ["sleep", "100000"]
CREATE_MS = 25
FETCHED = {"without a profile": 0.10, "with a profile": 0.06}
LARGE_RUNS = 3  # each pulls and unpacks 300 MB
_NUMBERS = itertools.count()


def created(runtime: Runtime, bundle: Path) -> float:
    """Seconds of one create; the container is deleted."""
    name = f"c{next(_NUMBERS)}"
    taken = seconds(lambda: runtime.quietly("create", "--bundle", bundle, name))
    runtime("delete", "--force", name)
    return taken


def deleted(runtime: Runtime, bundle: Path) -> float:
    """Seconds of one delete of a container that was created."""
    name = f"c{next(_NUMBERS)}"
    runtime.quietly("create", "--bundle", bundle, name)
    return seconds(lambda: runtime("delete", "--force", name))


def warm(root: Path, debian: images.Image, clip: Path, runs: int) -> None:
    """Create and delete, the image known and its bytes in the store."""
    rootfs = images.unpack(debian, root / "unpacked")
    plain = write_bundle(root / "plain", SLEEP, rootfs=rootfs)
    lazy = write_bundle(root / "lazy", SLEEP, annotations={"io.clipshim.index": str(clip)})
    nodes = [Node(root / mode, mode=mode, index_dirs=[str(clip.parent)]) for mode in MODES]
    try:
        runc = Runtime.runc(root / "runc-root")
        shims = {
            node.settings["mode"]: Runtime.clipshim(node.directory / "root", node) for node in nodes
        }
        for verb, measure in (("create", created), ("delete --force", deleted)):
            contenders = {"runc": lambda measure=measure: measure(runc, plain)}
            for mode, shim in shims.items():
                contenders[f"clipshim {mode}"] = lambda measure=measure, shim=shim: measure(
                    shim, lazy
                )
            medians = in_turns(contenders, runs, warm_up=2)
            budget = CREATE_MS if verb == "create" else None
            print_against(f"{verb}, warm image", medians, extra_ms=budget)
    finally:
        for node in nodes:
            node.close()


def pulled_and_run(runc: Runtime, reference: str, work: Path) -> float:
    """The way without clipshim: skopeo, umoci, runc."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()

    def way() -> None:
        images.run(
            "skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false",
            f"docker://{reference}", f"oci:{work}/oci:{images.TAG}",
        )  # fmt: skip
        rootfs = images.unpack(images.Image(work / "oci", "gzip"), work / "rootfs")
        bundle = write_bundle(work / "bundle", list(PROGRAM), rootfs=rootfs)
        runc("run", "--bundle", bundle, "pulled")

    return seconds(way)


class LazyRuns:
    """Cold starts of one mode: each a new node, an empty store, no daemon."""

    def __init__(self, root: Path, mode: str, clip: Path) -> None:
        self.root = root
        self.mode = mode
        self.clip = clip
        self.fetched: dict[str, list[int]] = {name: [] for name in FETCHED}
        self.profiles: Path | None = None

    def run(self, name: str) -> float:
        """Seconds of one start; notes how much was fetched."""
        directory = self.root / f"cold{next(_NUMBERS)}"
        with Node(directory, mode=self.mode, index_dirs=[str(self.clip.parent)]) as node:
            if name == "with a profile":
                assert self.profiles is not None
                shutil.copytree(self.profiles, node.state_dir / "profiles")
            bundle = write_bundle(
                directory / "bundle",
                list(PROGRAM),
                annotations={"io.clipshim.index": str(self.clip)},
            )
            with Runtime.clipshim(directory / "root", node) as runtime:
                taken = seconds(lambda: runtime("run", "--bundle", bundle, "lazy"))
            self.fetched[name].append(find_number(status(node), "fetched_bytes"))
            if self.profiles is None:
                learned = node.state_dir / "profiles"
                wait_for("the start's profile", lambda: list(learned.glob("*.json")))
                self.profiles = self.root / f"profiles-{self.mode}"
                shutil.copytree(learned, self.profiles)
        return taken


def cold(root: Path, image: images.Image, reference: str, clip: Path, runs: int) -> None:
    """Everything from nothing to the end of the program."""
    root.mkdir()
    runc = Runtime.runc(root / "runc")
    contenders = {"pull, unpack, run": lambda: pulled_and_run(runc, reference, root / "pull")}
    lazy = {mode: LazyRuns(root, mode, clip) for mode in MODES}
    for mode, starts in lazy.items():
        for name in FETCHED:
            contenders[f"clipshim {mode}, {name}"] = lambda starts=starts, name=name: starts.run(
                name
            )
    medians = in_turns(contenders, runs, warm_up=0)
    size = image.compressed_size
    print_against(f"cold image of {size / 1e6:.0f} MB, until python has run", medians)
    rows = []
    for mode, starts in lazy.items():
        for name, budget in FETCHED.items():
            got = statistics.median(starts.fetched[name])
            share = got / size
            rows.append([
                f"clipshim {mode}, {name}", f"{got / 1e6:.1f}", f"{share:.1%}", f"≤ {budget:.0%}",
                verdict(met=share <= budget),
            ])  # fmt: skip
    print_table(
        f"fetched until python has run, of {size / 1e6:.1f} MB",
        ["", "MB", "of the image", "budget", ""],
        rows,
    )


def describe(image: images.Image, clip: Path) -> None:
    """Prints the sizes of an image and its index."""
    size, index = image.compressed_size, clip.stat().st_size
    print(
        f"\nimage of {size / 1e6:.1f} MB compressed, index {index / 1e3:.0f} kB: {index / size:.2%}"
    )


def main() -> None:
    """Measures and prints."""
    options = Options(__doc__, runs=40, quick=10)
    with bench_root() as root, running_registry(root / "registry") as registry:
        with Node(root / "indexer") as indexer:
            debian, reference, clip = index_of(root, registry, indexer)
        describe(debian, clip)
        warm(root, debian, clip, options.runs)
        cold(root / "small", debian, reference, clip, options.few)
        if not options.quick:
            large = images.large_image()
            with Node(root / "large-indexer") as indexer:
                reference, clip = pushed_and_indexed(root, registry, indexer, large, "large")
            describe(large, clip)
            cold(root / "large", large, reference, clip, min(options.few, LARGE_RUNS))


if __name__ == "__main__":
    main()

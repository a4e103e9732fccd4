"""Reading inside a container's rootfs: both modes against native overlayfs on the same disk.

    bench_reads.py [--runs N] [--quick]

`find`, `stat` and re-reads with everything cached; reads of every byte with a cold page cache and
a complete layer store; and the first read of all from a registry on loopback against
`curl | igzip -dc` of the same layers: of the layers from start to end, and of the tree's files in
the order of `find`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common import (
    MODES,
    Options,
    bench_root,
    drop_caches,
    in_turns,
    index_of,
    print_against,
    print_table,
    seconds,
    shell,
    verdict,
)

from tests.support import images
from tests.support.leftovers import unmount_below
from tests.support.node import Node
from tests.support.registry import running_registry

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.registry import TestRegistry

READ_ALL = "find . -xdev -type f -print0 | xargs -0 cat > /dev/null"
LAYERS_READ = "cat run/layers/* > /dev/null"
WARM = {
    "find": "find . -xdev > /dev/null",
    "stat of everything": "find . -xdev -printf '%s %n %T@\\n' > /dev/null",
    "read of every byte, again": READ_ALL,
}
WARM_RATIO = 1.1
COLD_RATIO = 1.5
THROUGHPUT = 0.7
CURL = "curl | igzip -dc"


def overlay(lower: Path, work: Path) -> Path:
    """An overlay over `lower` as a container has it."""
    for name in ("upper", "work", "merged"):
        (work / name).mkdir(parents=True)
    options = f"lowerdir={lower},upperdir={work}/upper,workdir={work}/work"
    options += ",index=off,metacopy=off"
    images.run("mount", "-t", "overlay", "overlay", "-o", options, work / "merged")
    return work / "merged"


def mounted(node: Node, clip: Path) -> Path:
    """The tree, mounted by hand."""
    target = node.directory / "tree"
    target.mkdir()
    node.clipshim("mount", clip, target, "--mode", node.settings["mode"])
    return target


def cold(command: str, directory: Path) -> float:
    """Seconds with a cold page cache."""
    drop_caches()
    return seconds(lambda: shell(command, directory))


def cached_reads(root: Path, debian: images.Image, clip: Path, options: Options) -> None:
    """Everything is on this machine: in the page cache, then only on the disk."""
    nodes = [Node(root / mode, mode=mode) for mode in MODES]
    places: dict[str, Path] = {}
    try:
        places["native"] = overlay(images.unpack(debian, root / "unpacked"), root / "o-native")
        for node in nodes:
            tree = mounted(node, clip)
            shell(READ_ALL, tree)  # the store holds everything from here on
            mode = node.settings["mode"]
            places[f"clipshim {mode}"] = overlay(tree, root / f"o-{mode}")
        for title, command in WARM.items():
            medians = in_turns(
                {
                    name: lambda place=place, command=command: seconds(
                        lambda: shell(command, place)
                    )
                    for name, place in places.items()
                },
                options.runs,
            )
            print_against(title, medians, ratio=WARM_RATIO)
        medians = in_turns(
            {name: lambda place=place: cold(READ_ALL, place) for name, place in places.items()},
            options.few,
            warm_up=0,
        )
        title = "read of every byte, cold page cache, all of it in the store"
        print_against(title, medians, ratio=COLD_RATIO)
    finally:
        for name in ("native", *MODES):
            unmount_below(root / f"o-{name}")
        for node in nodes:
            node.close()


class FirstReads:
    """Each with a new node and nothing in its store."""

    def __init__(self, root: Path, clip: Path) -> None:
        self.root = root
        self.clip = clip
        self.number = 0

    def run(self, mode: str, *, whole_layers: bool) -> float:
        """Seconds, without the mounting."""
        self.number += 1
        with Node(self.root / f"first{self.number}", mode=mode) as node:
            tree = mounted(node, self.clip)
            if whole_layers:
                return seconds(lambda: shell(LAYERS_READ, node.directory))
            return seconds(lambda: shell(READ_ALL, tree))


def first_reads(
    root: Path, registry: TestRegistry, debian: images.Image, clip: Path, runs: int
) -> None:
    """Everything from the registry."""
    first = FirstReads(root, clip)
    fetch = " && ".join(
        f"curl -sf {registry.url}/v2/debian/blobs/{layer['digest']} | igzip -dc > /dev/null"
        for layer in debian.manifest["layers"]
    )
    medians = in_turns(
        {
            CURL: lambda: seconds(lambda: shell(fetch, root)),
            "layers, from start to end": lambda: first.run("erofs", whole_layers=True),
            **{
                f"files, clipshim {mode}": lambda mode=mode: first.run(mode, whole_layers=False)
                for mode in MODES
            },
        },
        runs,
        warm_up=0,
    )
    size = debian.compressed_size / 1e6
    rows = []
    for name, taken in medians.items():
        share = medians[CURL] / taken
        budget = ["", ""] if name == CURL else [f"≥ {THROUGHPUT}", verdict(met=share >= THROUGHPUT)]
        rows.append([name, f"{taken * 1000:.0f}", f"{size / taken:.0f}", f"{share:.2f}", *budget])
    header = ["", "median ms", "compressed MB/s", "throughput", "budget", ""]
    print_table("first read of everything, from a registry on loopback", header, rows)


def main() -> None:
    """Measures and prints."""
    options = Options(__doc__, runs=15, quick=5)
    with bench_root() as root, running_registry(root / "registry") as registry:
        with Node(root / "indexer") as indexer:
            debian, _, clip = index_of(root, registry, indexer)
        cached_reads(root, debian, clip, options)
        first_reads(root, registry, debian, clip, options.few)


if __name__ == "__main__":
    main()

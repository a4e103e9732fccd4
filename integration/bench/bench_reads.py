"""Reading inside a container's rootfs: both modes against native overlayfs on the same disk.

    bench_reads.py [--runs N]

`find`, `stat` and re-reads with everything cached; reads of every byte with a cold page cache and
a complete layer store; and the first read of all from a registry on loopback against
`curl | igzip -dc` of the same layers.
"""

from __future__ import annotations

import argparse
import subprocess
from typing import TYPE_CHECKING

from common import COLUMNS, against, bench_root, drop_caches, in_turns, print_table, seconds

from tests.support import images
from tests.support.leftovers import unmount_below
from tests.support.node import Node
from tests.support.registry import running_registry

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.registry import TestRegistry

MODES = ("erofs", "fuse")
READ_ALL = "find . -xdev -type f -print0 | xargs -0 cat > /dev/null"


def shell(command: str, directory: Path) -> None:
    """Runs a command line in a directory."""
    subprocess.run(["bash", "-c", command], cwd=directory, check=True, stdin=subprocess.DEVNULL)


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


def first_reads(
    root: Path, registry: TestRegistry, debian: images.Image, clip: Path, runs: int
) -> None:
    """Everything from the registry, with nothing in the store."""
    number = 0

    def lazily(mode: str) -> float:
        nonlocal number
        number += 1
        with Node(root / f"first{number}", mode=mode) as node:
            tree = mounted(node, clip)
            return seconds(lambda: shell(READ_ALL, tree))

    def directly() -> float:
        commands = [
            f"curl -sf {registry.url}/v2/debian/blobs/{layer['digest']} | igzip -dc > /dev/null"
            for layer in debian.manifest["layers"]
        ]
        return seconds(lambda: shell("set -o pipefail; " + " && ".join(commands), root))

    contenders = {"curl | igzip -dc": directly}
    for mode in MODES:
        contenders[f"clipshim {mode}"] = lambda mode=mode: lazily(mode)
    medians = in_turns(contenders, runs, warm_up=0)
    print_table("first read of all bytes, from the registry", COLUMNS,
                against(medians, "curl | igzip -dc"))  # fmt: skip


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    debian = images.debian_image()
    with bench_root() as root, running_registry(root / "registry") as registry:
        reference = registry.push_layout(debian.layout, "debian:bench", tag=images.TAG)
        clip = root / "debian.clip"
        with Node(root / "indexer") as indexer:
            indexer.clipshim("index", reference, clip)
        nodes = [Node(root / mode, mode=mode) for mode in MODES]
        places: dict[str, Path] = {}
        try:
            places["native"] = overlay(images.unpack(debian, root / "unpacked"), root / "o-native")
            for node in nodes:
                tree = mounted(node, clip)
                shell(READ_ALL, tree)  # the store holds everything from here on
                mode = node.settings["mode"]
                places[f"clipshim {mode}"] = overlay(tree, root / f"o-{mode}")
            for title, command in {
                "find": "find . -xdev > /dev/null",
                "stat of everything": "find . -xdev -printf '%s %n %T@\\n' > /dev/null",
                "read of every byte, again": READ_ALL,
            }.items():
                medians = in_turns(
                    {
                        name: lambda place=place, command=command: seconds(
                            lambda: shell(command, place)
                        )
                        for name, place in places.items()
                    },
                    runs,
                )
                print_table(title, COLUMNS, against(medians, "native"))
            medians = in_turns(
                {name: lambda place=place: cold(READ_ALL, place) for name, place in places.items()},
                max(3, runs // 2),
                warm_up=0,
            )
            print_table("read of every byte, cold page cache, complete store", COLUMNS,
                        against(medians, "native"))  # fmt: skip
        finally:
            for name in ("native", *MODES):
                unmount_below(root / f"o-{name}")
            for node in nodes:
                node.close()
        first_reads(root, registry, debian, clip, max(3, runs // 2))


if __name__ == "__main__":
    main()

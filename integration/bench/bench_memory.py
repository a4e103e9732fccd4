"""What images cost a node that has them mounted: memory of the server, time to mount a large tree.

    bench_memory.py [--runs N] [--quick]

100 different images, each mounted and read once, then the resident memory of the server and of
all the node's processes. And the time from an index in the local store to a readable tree, of
200,000 files against 2,000; the daemon runs, the tree is not mounted.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from common import MODES, Options, bench_root, print_table, seconds, verdict

from tests.support import images
from tests.support.node import Node, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterable

IMAGES = 100
SERVER_MIB = 80
FILES = (2_000, 200_000)
LONGER_MS = 50
PER_DIRECTORY = 200


def resident_mib(pids: Iterable[int]) -> float:
    """The sum of the processes' resident memory."""
    page = os.sysconf("SC_PAGE_SIZE")
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except FileNotFoundError:
            continue
    return pages * page / 2**20


def layout_of(directory: Path, top: Path) -> images.Image:
    """An image of one layer with the files below `top`."""
    tar = directory.with_suffix(".tar")
    images.run(
        "tar", "--format=posix", "--sort=name", "--numeric-owner", "-C", top, "-cf", tar, "."
    )
    images.write_layout(directory, [tar], "gzip", {"Cmd": ["true"]})
    tar.unlink()
    return images.Image(directory, "gzip")


def many_images(root: Path) -> None:
    """The server's memory with 100 images, in turn for the modes."""
    rows = []
    base = images.unpack(images.tiny_image(), root / "base")
    clips = []
    with Node(root / "indexer") as node:
        for number in range(IMAGES):
            (base / "number").write_text(f"{number}\n")
            image = layout_of(root / "layouts" / str(number), base)
            clips.append(root / f"{number}.clip")
            node.clipshim("index", image.reference, clips[-1], "--quiet")
    for mode in MODES:
        with Node(root / f"many-{mode}", mode=mode) as node:
            node.start()
            empty = resident_mib([int(node.start()["pid"])])
            for number, clip in enumerate(clips):
                target = node.directory / "trees" / str(number)
                target.mkdir(parents=True)
                node.clipshim("mount", clip, target, "--mode", mode)
                assert (target / "number").read_text() == f"{number}\n"
            full = resident_mib([int(node.start()["pid"])])
            everything = resident_mib(node.processes())
            rows.append([
                f"clipshim {mode}", f"{empty:.0f}", f"{full:.0f}", f"{everything:.0f}",
                f"≤ {SERVER_MIB} (server)", verdict(met=full <= SERVER_MIB),
            ])  # fmt: skip
    header = ["", "server, no image", f"server, {IMAGES}", "all processes", "budget", ""]
    print_table(f"resident memory in MiB, {IMAGES} different images mounted and read", header, rows)


def index_with(root: Path, files: int) -> Path:
    """The index of an image with so many small files."""
    top = root / f"top{files}"
    for number in range(files):
        directory = top / f"d{number // PER_DIRECTORY}"
        if number % PER_DIRECTORY == 0:
            directory.mkdir(parents=True)
        (directory / f"f{number}").write_bytes(b"%d\n" % number)
    image = layout_of(root / f"files{files}", top)
    images.run("rm", "-rf", top)
    clip = root / f"files{files}.clip"
    with Node(root / "indexer") as node:
        node.clipshim("index", image.reference, clip, "--quiet")
    return clip


def mount_once(node: Node, clip: Path) -> float:
    """Seconds from the command to a tree that shows its root directory."""
    target = node.directory / "tree"
    target.mkdir(exist_ok=True)

    def mount() -> None:
        node.clipshim("mount", clip, target, "--mode", node.settings["mode"])
        assert (target / "d0").is_dir()

    taken = seconds(mount)
    node.clipshim("umount", target)

    def unmounted() -> bool:
        reply = node.call("gc")
        return bool(reply["ok"]) and not any("/mnts/" in point for point in node.mounts())

    wait_for("the tree is unmounted", unmounted)
    return taken


def large_trees(root: Path, runs: int) -> None:
    """Time to mount, in turns."""
    clips = {files: index_with(root, files) for files in FILES}
    rows = []
    for mode in MODES:
        taken: dict[int, list[float]] = {files: [] for files in FILES}
        with Node(root / f"large-{mode}", mode=mode, linger_s=0.0) as node:
            node.start()
            for turn in range(-1, runs):
                for files, clip in clips.items():
                    value = mount_once(node, clip)
                    if turn >= 0:
                        taken[files].append(value)
        few, many = (statistics.median(taken[files]) * 1000 for files in FILES)
        rows.append([
            f"clipshim {mode}", f"{few:.0f}", f"{many:.0f}", f"{many - few:+.0f}",
            f"≤ +{LONGER_MS} ms", verdict(met=many - few <= LONGER_MS),
        ])  # fmt: skip
    header = ["", *(f"{files:,} files ms" for files in FILES), "difference ms", "budget", ""]
    print_table("index to mounted tree", header, rows)


def main() -> None:
    """Measures and prints."""
    options = Options(__doc__, runs=15, quick=5)
    with bench_root() as root:
        (root / "layouts").mkdir()
        many_images(root)
        large_trees(root, options.runs)


if __name__ == "__main__":
    main()

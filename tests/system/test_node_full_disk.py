"""A node whose state lies on a disk that is full, or that the kernel made read-only."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from clipshim.mounts import erofs
from tests.support import images
from tests.support.node import wait_for
from tests.system import node_trees

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.node import Node

Image = tuple[str, dict[str, str]]
DISK_BYTES = 64 << 20


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return node_trees.make_image(tmp_path_factory.mktemp("full"))


@pytest.fixture
def node(make_node: Callable[..., Node]) -> Node:
    """With a small ext4 of its own as its state directory, which goes with the node."""
    made = make_node()
    made.state_dir.mkdir(mode=0o700)
    file = made.directory / "disk.img"
    with file.open("wb") as disk:
        disk.truncate(DISK_BYTES)
    images.run("mkfs.ext4", "-q", "-m", "0", file)
    images.run("mount", "-o", "loop,errors=remount-ro", file, made.state_dir)
    return made


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 20, 512):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


def break_disk(disk: Path) -> None:
    """As the kernel does when it finds ext4 damaged: read-only, whoever has files open."""
    device = os.path.basename(images.run("findmnt", "-n", "-o", "SOURCE", disk).strip())
    Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("for a test")
    with pytest.raises(OSError, match="Read-only"):
        (disk / "probe").touch()


def check(tree: str, sums: dict[str, str]) -> None:
    for name, expected in sums.items():
        assert hashlib.sha256((Path(tree) / name).read_bytes()).hexdigest() == expected


def test_a_full_disk_stops_no_reader_and_what_fails_says_why(
    node: Node, image: Image, tmp_path: Path
) -> None:
    node.start()
    clip = node_trees.index(node, image[0])
    other = tmp_path / "other.clip"
    node.clipshim("index", "-q", node_trees.make_image(tmp_path, seed=2)[0], other)
    tree = node_trees.mount(node, clip, "c1")["tree"]
    fill(node.state_dir)
    check(tree, image[1])
    for arguments in (("mount", other, tmp_path), ("index", image[0])):
        failed = node.clipshim(*arguments, check=False)
        assert failed.returncode == 1
        assert "make room" in failed.stderr, failed.stderr
    node.kill_server()
    check(tree, image[1])
    node.call("release", container="c1")
    assert node.call("stop")["ok"]
    wait_for("every process is gone", lambda: not node.processes())
    node.start()
    (node.state_dir / "ballast").unlink()
    check(node_trees.mount(node, clip, "c2")["tree"], image[1])


def test_a_disk_that_became_read_only_still_gives_what_is_cached(node: Node, image: Image) -> None:
    node.start()
    tree = node_trees.mount(node, node_trees.index(node, image[0]), "c1")["tree"]
    check(tree, image[1])
    layout = Path(image[0].removeprefix("oci:").removesuffix(":test"))
    away = layout.with_name("away")
    shutil.move(layout, away)  # nothing can be fetched any more
    try:
        break_disk(node.state_dir)
        node.kill_server()
        check(tree, image[1])
        failed = node.clipshim("index", "oci:" + str(away) + ":test", check=False)
        assert failed.returncode == 1
        assert "read-only" in failed.stderr
    finally:
        shutil.move(away, layout)


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_a_disk_that_takes_nothing_says_nothing_about_the_kernel(node: Node, state: str) -> None:
    if state == "full":
        fill(node.state_dir)
    else:
        break_disk(node.state_dir)
    with pytest.raises(OSError, match=r"\[Errno (28|30)\]"):
        erofs.probe_erofs(str(node.state_dir))

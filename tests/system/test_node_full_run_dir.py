"""A node whose run_dir is full: nothing new perhaps, but what runs goes on, with one server."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import images
from tests.support.node import wait_for
from tests.system import node_trees

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.node import Node

Image = tuple[str, dict[str, str]]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return node_trees.make_image(tmp_path_factory.mktemp("full"))


@pytest.fixture
def node(make_node: Callable[..., Node]) -> Node:
    """With a tiny tmpfs as its run_dir, which goes with the node."""
    made = make_node()
    made.run_dir.mkdir(mode=0o700)
    images.run("mount", "-t", "tmpfs", "-o", "size=128k,mode=0700", "clipshim-test", made.run_dir)
    return made


def fill(directory: Path) -> None:
    with contextlib.suppress(OSError), (directory / "ballast").open("wb", buffering=0) as file:
        while file.write(bytes(512)):
            pass


def check(node: Node, tree: str, sums: dict[str, str]) -> None:
    """Reads all of it, cold."""
    for name in os.listdir(node.run_dir / "layers"):
        fd = os.open(node.run_dir / "layers" / name, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    for name, expected in sums.items():
        assert hashlib.sha256((Path(tree) / name).read_bytes()).hexdigest() == expected


def running(node: Node, module: str) -> list[int]:
    """Processes that run a module; keeper.json may name others."""
    found = []
    for pid in node.processes():
        with contextlib.suppress(OSError):
            if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def wait_for_one_each(node: Node) -> tuple[int, int]:
    """The only keeper, and the only server, which answers."""

    def found() -> tuple[int, int] | None:
        keepers = running(node, "clipshim.node.keeper")
        servers = running(node, "clipshim.node.server")
        answer = node.ping()
        settled = len(keepers) == len(servers) == 1 and answer and answer["pid"] == servers[0]
        return (keepers[0], servers[0]) if settled else None

    return wait_for("one keeper and one server", found)


@pytest.mark.parametrize("mode", ["erofs", "fuse"])
def test_a_full_run_dir_does_not_multiply_servers_nor_stop_readers(
    node: Node, image: Image, tmp_path: Path, mode: str
) -> None:
    node.start()
    clip = node_trees.index(node, image[0])
    tree = node_trees.mount(node, clip, "c1", mode=mode)["tree"]
    by_hand = tmp_path / "by-hand"
    by_hand.mkdir()
    node.clipshim("mount", clip, by_hand)
    fill(node.run_dir)
    node.kill_server()  # keeper.json goes on naming the dead one
    check(node, tree, image[1])

    for _ in range(3):
        keeper, _ = wait_for_one_each(node)
        os.kill(keeper, signal.SIGKILL)

        def another(old: int = keeper) -> bool:
            return wait_for_one_each(node)[0] != old

        wait_for("another keeper", another)
        check(node, tree, image[1])
        node.kill_server()
        check(node, tree, image[1])
    keeper, server = wait_for_one_each(node)
    os.kill(keeper, signal.SIGHUP)  # refused: the next keeper would not find anything
    wait_for("another server", lambda: wait_for_one_each(node)[1] != server)
    check(node, tree, image[1])
    assert wait_for_one_each(node)[0] == keeper
    failed = node.clipshim("mount", clip, tmp_path, check=False)
    assert failed.returncode == 1
    assert "make room" in failed.stderr
    node.clipshim("umount", by_hand)
    assert node.call("release", container="c1")["ok"]
    assert node.call("stop")["ok"]
    wait_for("every process is gone", lambda: not node.processes())

"""Under systemd, played by the test: readiness, and connections that outlive the whole daemon."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.node import wait_for
from tests.system import node_trees

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.node import Node

# Puts the descriptors given as arguments to 3 and up, as systemd hands them over.
LAUNCHER = """
import os, sys
fds = [os.dup(int(fd)) for fd in sys.argv[1].split(",") if fd]
high = [__import__("fcntl").fcntl(fd, 0, 100) for fd in fds]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number)
os.closerange(3 + len(high), 300)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-I", "-m", "clipshim.node.keeper"])
"""


class FakeSystemd:
    """Receives notifications and keeps descriptors; starts the unit with what it keeps."""

    def __init__(self, node: Node, path: Path) -> None:
        self._node = node
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None
        self.stored: dict[str, int] = {}
        self.states: list[str] = []

    def receive(self) -> None:
        """Takes in all that was sent."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, 4096, 4)
            except BlockingIOError:
                return
            fields = dict(line.split("=", 1) for line in data.decode().splitlines())
            self.states += data.decode().splitlines()
            name = fields.get("FDNAME", "")
            if "FDSTORE" in fields:
                self._drop(name)
                self.stored[name] = fds.pop()
            elif "FDSTOREREMOVE" in fields:
                self._drop(name)
            for fd in fds:
                os.close(fd)

    def _drop(self, name: str) -> None:
        if name in self.stored:
            os.close(self.stored.pop(name))

    def start(self) -> None:
        """Starts the unit; returns when it says that it is ready."""
        self.receive()
        self.states.clear()
        kept = dict(self.stored)
        environment = self._node.env | {
            "NOTIFY_SOCKET": str(self._path),
            "LISTEN_FDS": str(len(kept)),
            "LISTEN_FDNAMES": ":".join(kept),
        }
        numbers = ",".join(str(fd) for fd in kept.values())
        with open(self._node.directory / "keeper.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", LAUNCHER, numbers],
                env=environment,
                pass_fds=list(kept.values()),
                stdin=subprocess.DEVNULL,
                stderr=log,
            )

        def ready() -> bool:
            self.receive()
            assert self._process is not None
            assert self._process.poll() is None, self._node.log_tail(50)
            return "READY=1" in self.states

        wait_for("READY=1", ready)

    def stop(self, spared: int = 0) -> int:
        """SIGTERM to the main process, then SIGKILL to the rest of the unit; the exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(120)
        node_trees.kill_everything(self._node, spared)
        self.receive()
        return status

    def crash(self, spared: int = 0) -> None:
        """SIGKILL to the whole unit."""
        self.receive()
        node_trees.kill_everything(self._node, spared)
        assert self._process is not None
        self._process.wait(120)
        self.receive()

    def close(self) -> None:
        """Ends the unit and drops what is stored."""
        self.receive()
        for name in list(self.stored):
            self._drop(name)
        self._socket.close()
        node_trees.kill_everything(self._node)
        if self._process is not None:
            self._process.wait(120)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    return node_trees.make_image(tmp_path_factory.mktemp("systemd"))


@pytest.fixture
def systemd(node: Node) -> Iterator[FakeSystemd]:
    fake = FakeSystemd(node, node.directory / "notify")
    yield fake
    fake.close()


@pytest.mark.parametrize("mode", ["erofs", "fuse"])
def test_readers_wait_for_the_next_start_of_the_unit(
    node: Node, systemd: FakeSystemd, image: tuple[str, dict[str, str]], mode: str
) -> None:
    clip = node_trees.index(node, image[0])
    systemd.start()
    tree = node_trees.mount(node, clip, "c1", mode=mode)["tree"]
    with node_trees.Reader(node, tree, image[1]) as reader:
        reader.wait_rounds(1)
        assert systemd.stop(reader.pid) == 0
        systemd.start()
        reader.wait_rounds(1)
        systemd.crash(reader.pid)
        systemd.start()
        reader.wait_rounds(1)
        assert node_trees.mount(node, clip, "c2")["tree"] == tree


def test_an_unused_unit_stops_and_leaves_nothing_in_the_store(
    node: Node, systemd: FakeSystemd, image: tuple[str, dict[str, str]]
) -> None:
    systemd.start()
    node_trees.mount(node, node_trees.index(node, image[0]), "c1", mode="fuse")
    node.call("release", container="c1")
    assert systemd.stop() == 0
    assert "STOPPING=1" in systemd.states
    assert systemd.stored == {}
    assert node.mounts() == []

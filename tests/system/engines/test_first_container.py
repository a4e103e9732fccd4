"""The container that starts the node daemon ends like any other: no part of podman waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import leftovers, small_images
from tests.support.engine import make_target
from tests.support.node import Node, wait_for
from tests.support.podman_engine import Podman

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.images import Image

pytestmark = pytest.mark.engine
IMAGE = "localhost/first:1"


@pytest.fixture
def podman(run_root: Path, tmp_path: Path, tiny: Image, tiny_reference: str) -> Iterator[Podman]:
    """podman with a stub, and a node whose daemon does not run."""
    with Node(run_root / "fc-n") as node:
        target = make_target("clipshim", run_root / "fc-t", node)
        archive = small_images.archive(target, tiny, tiny_reference, tmp_path / "a.tar", IMAGE)
        engine = Podman(run_root / "fc-p", target)
        try:
            engine("load", "-q", "-i", archive)
            node.clipshim("daemon", "--stop")
            yield engine
        finally:
            engine.close()


def conmons(podman: Podman) -> list[int]:
    """Processes of podman's that watch containers."""
    pids = leftovers.processes_below(podman.directory)
    return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text() == "conmon\n"]


@pytest.mark.parametrize("how", ["run", "stop", "remove"])
def test_podman_does_not_wait_for_the_daemon(podman: Podman, how: str) -> None:
    node = podman.target.node
    assert node is not None
    assert node.ping() is None
    if how == "run":
        assert podman.start_container("--rm", IMAGE, "echo", "first") == "first"
    else:
        name = podman.start_container("-d", IMAGE, "sleep", "100000")
        assert conmons(podman)
        if how == "stop":
            podman("stop", "-t", "0", name)
            wait_for("its conmon ends", lambda: not conmons(podman))
        podman("rm", "-f", "-t", "0", name)
    wait_for("its conmon ends", lambda: not conmons(podman))
    assert node.ping() is not None

"""The doctor comes to an end, whatever hangs."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import pytest

from clipshim.cli.mount_probe import hanging_helpers, probe
from clipshim.node.fuse_connection import mount_fuse
from tests.support import leftovers
from tests.support.node import DEADLINE_S
from tests.system import node_trees

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.node import Node


@pytest.fixture
def silent_mount(tmp_path: Path) -> Iterator[Path]:
    """A FUSE mount whose server never answers; at the end the connection breaks."""
    target = tmp_path / "silent"
    target.mkdir()
    fd = mount_fuse(str(target), nosuid=True).fd
    yield target
    os.close(fd)
    while hanging_helpers:
        hanging_helpers.pop().wait(DEADLINE_S)
    leftovers.unmount_below(tmp_path)


def test_mounts_that_hang_are_told_from_those_that_answer(
    silent_mount: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    paths = [str(path) for path in (tmp_path, silent_mount, missing, tmp_path)]
    found = list(probe(paths, limit_s=10.0))
    assert found == [
        (paths[0], None),
        (paths[1], "no answer in 10 s"),
        (paths[2], "No such file or directory"),
        (paths[3], None),
    ]
    many = [str(silent_mount)] * 6
    assert [trouble for _, trouble in probe(many, limit_s=0.2)] == [
        *["no answer in 0.2 s"] * 3,
        *["not looked at: too many others hang"] * 3,
    ]


def test_the_doctor_does_not_wait_for_a_server_that_hangs(node: Node, tmp_path: Path) -> None:
    reference, _ = node_trees.make_image(tmp_path, seed=31)
    clip = node_trees.index(node, reference)
    pid = int(node.start()["pid"])
    node_trees.mount(node, clip, "c1", mode="fuse")
    os.kill(pid, signal.SIGSTOP)
    try:
        done = node.clipshim("doctor", "--format", "json", check=False, timeout_s=120)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 1
    findings = json.loads(done.stdout)["findings"]
    (daemon,) = [entry for entry in findings if entry["check"] == "daemon"]
    assert daemon["level"] == "broken"
    assert "no reply" in daemon["message"]
    assert "keeper.json" in daemon["remedy"]

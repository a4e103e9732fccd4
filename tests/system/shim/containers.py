"""What the tests of containers that name an index have in common."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.node import Node


LOOP = ["/bin/sh", "-c", "trap 'exit 7' TERM; echo ready >/ready; while :; do sleep 0.1; done"]

INDEX = {"io.clipshim.index": "index.clip"}


def assert_clean(node: Node) -> None:
    """No container of the node has left a mount, a directory or a file."""
    assert node.container_mounts() == []
    left = list(node.run_dir.glob("*/lock"))
    assert left == []
    for name in ("upper", "work"):
        directory = node.state_dir / name
        assert not directory.exists() or os.listdir(directory) == []


def error_of(log: Path) -> str:
    """The one line of a --log file, as containerd and podman read it."""
    lines = log.read_text().splitlines()
    assert len(lines) == 1, lines
    entry = json.loads(lines[0])
    assert set(entry) == {"level", "msg", "time"}
    assert entry["level"] == "error"
    return str(entry["msg"])

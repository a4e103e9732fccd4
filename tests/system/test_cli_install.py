"""What `clipshim install` writes is what the real engines read."""

from __future__ import annotations

import subprocess
import tomllib
from typing import TYPE_CHECKING

import pytest

from tests.support.node import CLIPSHIM

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.node import Node

# what a version of the configuration calls the CRI plugin; containerd 2 dumps version 3 or newer
CRI = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}


def output(*command: str | Path, env: dict[str, str]) -> str:
    """What an engine's program prints; none of these starts a daemon."""
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
        timeout=120,
    )  # fmt: skip
    return done.stdout


@pytest.mark.engine
@pytest.mark.parametrize("before", [None, "version = 2\n# ours\noom_score = -1\n"])
def test_containerd_reads_it(node: Node, before: str | None) -> None:
    path = node.directory / "etc/containerd/config.toml"
    if before is not None:
        path.parent.mkdir(parents=True)
        path.write_text(before)
    node.clipshim("install", "containerd", "--root", node.directory, "--runtime", CLIPSHIM)
    dumped = tomllib.loads(output("containerd", "--config", path, "config", "dump", env=node.env))
    runtimes = dumped["plugins"][CRI[min(dumped["version"], 3)]]["containerd"]["runtimes"]
    assert runtimes["clipshim"]["options"]["BinaryName"] == str(CLIPSHIM)
    assert runtimes["clipshim"]["pod_annotations"] == ["io.clipshim.*"]
    assert "runc" in runtimes
    if before is not None:
        assert dumped["oom_score"] == -1


@pytest.mark.engine
def test_podman_reads_it(node: Node) -> None:
    node.clipshim("install", "podman", "--root", node.directory, "--runtime", CLIPSHIM)
    storage = node.directory / "storage.conf"
    storage.write_text(
        f'[storage]\ndriver = "vfs"\nrunroot = "{node.directory}/podman-run"\n'
        f'graphroot = "{node.directory}/podman-root"\n'
    )
    env = {
        **node.env,
        "CONTAINERS_CONF": str(node.directory / "etc/containers/containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(storage),
    }
    shown = output(
        "podman", "--runtime", "clipshim", "info", "--format",
        "{{.Host.OCIRuntime.Name}} {{.Host.OCIRuntime.Path}}", env=env,
    )  # fmt: skip
    assert shown.split() == ["clipshim", str(CLIPSHIM)]

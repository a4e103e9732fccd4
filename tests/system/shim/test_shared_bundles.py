"""Several containers of one bundle, whose config.json each of them rewrites."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from clipshim.shim import state
from tests.support.node import Node, wait_for
from tests.system.shim.containers import LOOP

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.runtimes import Runtime


def own_cgroups(bundle: Path) -> str:
    """Leaves it to each container to have a cgroup named as it is; the bundle's config.json.

    runc 1.3 refuses to put a second container into the first one's cgroup.
    """
    config = json.loads((bundle / "config.json").read_text())
    del config["linux"]["cgroupsPath"]
    text = json.dumps(config)
    (bundle / "config.json").write_text(text)
    return text


def ids(count: int) -> list[str]:
    """IDs, and so names of cgroups, that no other run on this machine has."""
    return [f"{os.environ['CLIPSHIM_TEST_RUN']}-{number}" for number in range(count)]


def test_two_containers_of_one_bundle(
    node: Node, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    path = bundle(LOOP)
    before = own_cgroups(path)
    names = ids(2)
    for name in names:
        runtime.quietly("create", "-b", path, name)
        key = state.container_key(name, str(runtime.root))
        assert (node.run_dir / key / "rootfs/bin").is_dir(), "a root of its own"
    for name in names:
        runtime("delete", "--force", name)
    assert (path / "config.json").read_text() == before


def test_many_containers_of_one_bundle_at_once(
    node: Node, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    """Each gets its own root, whoever rewrites config.json in the meantime."""
    path = bundle(["/bin/cat", "/proc/self/mountinfo"])
    config = json.loads(own_cgroups(path))
    config["root"]["path"] = "other root"
    names = ids(32)
    before = json.dumps(config, indent=3)
    (path / "config.json").write_text(before)

    def run(container: str) -> str:
        return runtime("run", "-b", path, container).stdout.splitlines()[0]

    with ThreadPoolExecutor(8) as pool:
        for container, root in zip(names, pool.map(run, names), strict=True):
            key = state.container_key(container, str(runtime.root))
            assert f"upperdir={node.state_dir}/upper/{key}," in root
    assert (path / "config.json").read_text() == before


def test_a_container_that_runs_does_not_keep_the_next_one_waiting(
    runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    path = bundle(LOOP)
    own_cgroups(path)
    one, two = ids(2)
    running = subprocess.Popen(
        runtime.command("run", "-b", path, one),
        env=runtime.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    wait_for("it runs", lambda: runtime("exec", one, "/bin/ls", "/ready", check=False).stdout)
    runtime.quietly("create", "-b", path, two)
    assert running.poll() is None
    for name in (one, two):
        runtime("delete", "--force", name)
    running.wait(timeout=60)

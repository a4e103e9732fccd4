"""Two verbs at work on one container at the same time."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from clipshim.settings import Settings
from clipshim.shim import state
from tests.support.node import wait_for
from tests.system.shim.containers import LOOP, assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.node import Node
    from tests.support.runtimes import Runtime


def waits_for_lock(pid: int) -> bool:
    """Whether a process stands in a queue for a file lock (proc(5), /proc/locks)."""
    with open("/proc/locks") as file:
        return any(line.split()[1] == "->" and line.split()[5] == str(pid) for line in file)


def test_a_create_that_comes_second_leaves_the_first_ones_container_alone(
    node: Node, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    """It has found no container of the ID, and waits for the lock; when it has it, there is one."""
    path = bundle(LOOP, "first")
    runtime.quietly("create", "-b", path, "box")
    key = state.container_key("box", str(runtime.root))
    record = node.run_dir / key / "state.json"
    written = node.state_dir / "upper" / key / "written"
    written.write_text("x")
    before = (record.read_bytes(), node.container_mounts())
    settings = Settings({"run_dir": str(node.run_dir), "state_dir": str(node.state_dir)})
    hidden = runtime.root / "hidden"
    with state.ContainerLock(settings, key, wait_s=60):
        (runtime.root / "box").rename(hidden)  # as if it were not made yet
        second = subprocess.Popen(
            runtime.command("create", "-b", bundle(LOOP, "second"), "box"),
            env=runtime.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for("the second one waits", lambda: waits_for_lock(second.pid))
        hidden.rename(runtime.root / "box")
    assert "exists" in second.communicate(timeout=120)[1]
    assert second.returncode == 1
    assert (record.read_bytes(), node.container_mounts()) == before
    assert written.read_text() == "x"
    runtime("start", "box")
    wait_for("it runs", lambda: runtime("exec", "box", "/bin/ls", "/ready", check=False).stdout)
    runtime("delete", "--force", "box")
    assert_clean(node)


def test_many_creates_and_deletes_of_one_id(
    node: Node, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    paths = [bundle(LOOP, f"b{number}") for number in range(6)]

    def create(path: Path) -> int:
        return runtime.quietly("create", "-b", path, "box", check=False).returncode

    def delete(_: Path) -> int:
        return runtime("delete", "--force", "box", check=False).returncode

    with ThreadPoolExecutor(len(paths)) as pool:
        assert sorted(pool.map(create, paths)) == [0, 1, 1, 1, 1, 1]
        assert runtime.status("box") == "created"
        assert len(node.container_mounts()) == 1
        assert list(pool.map(delete, paths)) == [0] * len(paths)
    assert_clean(node)
    for path in paths:
        assert json.loads((path / "config.json").read_text())["root"]["path"] == "rootfs"

"""Engines and the node daemon die and come back: containers stay, and end as they should."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.support import leftovers, small_images
from tests.support.docker_engine import Docker
from tests.support.engine import cgroup_parent, make_target
from tests.support.node import Node, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.engine import Target
    from tests.support.images import Image

pytestmark = pytest.mark.engine
IMAGE = "localhost/tree:1"
SCRIPT = "trap 'exit 3' TERM; while :; do busybox sleep 0.1; done"


@pytest.fixture(scope="module", params=["runc", "clipshim"])
def target(request: pytest.FixtureRequest, run_root: Path) -> Iterator[Target]:
    """The runtime that the engines call, of a node of this module."""
    if request.param == "runc":
        yield make_target("runc", run_root / "lr-t", None)
        return
    with Node(run_root / "lr-n") as node:
        yield make_target("clipshim", run_root / "lr-t", node)


@pytest.fixture(scope="module")
def docker(
    run_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    target: Target,
    tiny: Image,
    tiny_reference: str,
) -> Iterator[Docker]:
    """dockerd and its containerd, which tests here kill; both have the image."""
    archive = tmp_path_factory.mktemp("live-restore") / "image.tar"
    small_images.archive(target, tiny, tiny_reference, archive, IMAGE)
    engine = Docker(run_root / f"lr-{target.name[0]}", target)
    try:
        engine("load", "-q", "-i", archive)
        engine.containerd("images", "import", archive)
        yield engine
    finally:
        engine.close()


@pytest.fixture
def sleeper(docker: Docker) -> Iterator[str]:
    """A running container; the engine answers again at the end, and no mount is left."""
    name = docker("run", "-d", IMAGE, "sh", "-c", SCRIPT)
    yield name
    docker("rm", "-f", name)
    no_mount_is_left(docker)


def no_mount_is_left(docker: Docker) -> None:
    """Neither of an engine nor of clipshim."""

    def none() -> bool:
        mounts = leftovers.mounts_below(docker.directory)
        roots = [path for path in mounts if path.endswith(("/merged", "/rootfs"))]
        return not roots and not docker.target.container_mounts()

    wait_for("no mount of a container is left", none)


def init_process(docker: Docker, name: str) -> int:
    return int(docker("inspect", "-f", "{{.State.Pid}}", name))


def state(docker: Docker, name: str) -> str:
    return docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", name)


def works(docker: Docker, name: str) -> None:
    """exec, write, restart, stop and start of a container that has survived something."""

    def executes() -> bool:  # dockerd answers before it has found its containerd again
        return docker.run("exec", name, "true", check=False).returncode == 0

    wait_for("the container executes programs", executes)
    assert docker("exec", name, "cat", "/etc/group") == "root:x:0:\ntesters:x:1235:"
    docker("exec", name, "sh", "-c", "echo kept >>/kept")
    docker("restart", "-t", "0", name)
    assert docker("exec", name, "cat", "/kept") == "kept"
    docker("stop", name)
    assert state(docker, name) == "exited 3"
    docker("start", name)
    assert docker("exec", name, "id", "-un") == "root"


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_dockerd_comes_back(docker: Docker, sleeper: str, how: str) -> None:
    pid = init_process(docker, sleeper)
    (docker.daemon.stop if how == "stopped" else docker.daemon.kill)()
    assert leftovers.start_time(pid) is not None, "the container lives on"
    docker.start()
    assert init_process(docker, sleeper) == pid
    works(docker, sleeper)


def test_containerd_is_killed_beneath_docker(docker: Docker, sleeper: str) -> None:
    pid = init_process(docker, sleeper)
    docker.containerd.daemon.kill()
    docker.containerd.start()
    assert leftovers.start_time(pid) is not None
    works(docker, sleeper)


def test_both_are_killed_at_once(docker: Docker, sleeper: str) -> None:
    pid = init_process(docker, sleeper)
    docker.daemon.kill()
    docker.containerd.daemon.kill()
    docker.containerd.start()
    docker.start()
    assert init_process(docker, sleeper) == pid
    works(docker, sleeper)


def test_a_container_ends_while_docker_is_away(docker: Docker, sleeper: str) -> None:
    pid = init_process(docker, sleeper)
    docker.daemon.kill()
    os.kill(pid, signal.SIGTERM)
    wait_for("it has ended", lambda: leftovers.start_time(pid) is None)
    docker.start()
    wait_for("docker knows", lambda: state(docker, sleeper).startswith("exited"))
    docker("start", sleeper)
    works(docker, sleeper)


def test_everything_dies_at_once(docker: Docker, sleeper: str) -> None:
    """The engine, its containerd and shims, the container and the node daemon."""
    docker("exec", sleeper, "sh", "-c", "echo before >/before")
    docker.daemon.kill()
    docker.containerd.daemon.kill()
    leftovers.kill_processes(docker.directory, leftovers.processes_below)
    if docker.target.node is not None:
        docker.target.node.stop()
    docker.containerd.start()
    docker.start()
    wait_for("docker knows", lambda: not state(docker, sleeper).startswith("running"))
    docker("start", sleeper)
    assert docker("exec", sleeper, "cat", "/before") == "before"
    works(docker, sleeper)


def test_a_restart_policy(docker: Docker, tmp_path: Path) -> None:
    """Docker starts the container again by itself, on what it has written before."""
    script = "echo again >>/count; exit 1"
    name = docker("run", "-d", "--restart=on-failure:2", IMAGE, "sh", "-c", script)
    try:
        form = "{{.State.Status}} {{.State.ExitCode}} {{.RestartCount}}"
        wait_for(
            "the last try has ended", lambda: docker("inspect", "-f", form, name) == "exited 1 2"
        )
        docker("cp", f"{name}:/count", tmp_path / "count")
        assert (tmp_path / "count").read_text() == "again\n" * 3
    finally:
        docker("rm", "-f", name)
    no_mount_is_left(docker)


def test_a_task_of_containerd_outlives_it(docker: Docker) -> None:
    containerd = docker.containerd
    name = "outlives"
    containerd(
        "run", "-d", "--runc-binary", str(docker.target.runtime),
        "--runc-root", f"{containerd.directory}/ctr-runtime",
        "--cgroup", f"{cgroup_parent()}/{name}", IMAGE, name, "sh", "-c", SCRIPT,
    )  # fmt: skip
    containerd.daemon.kill()
    containerd.start()
    assert containerd("task", "exec", "--exec-id", "e1", name, "id", "-un") == "root"
    containerd("task", "kill", "--signal", "SIGTERM", name)

    def stopped() -> bool:
        return "STOPPED" in containerd("task", "ls")

    wait_for("the task has stopped", stopped)
    assert "exit code 3" in containerd.run("task", "delete", name).stderr
    containerd("container", "delete", name)
    no_mount_is_left(docker)

    def runs() -> bool:
        return docker.run("run", "--rm", IMAGE, "true", check=False).returncode == 0

    wait_for("docker has found its containerd again", runs)


def test_a_dead_node_daemon_is_started_by_the_next_container(docker: Docker, sleeper: str) -> None:
    node = docker.target.node
    if node is None:
        return  # there is nothing to kill
    facts = node.start()
    for pid in (facts["keeper_pid"], facts["pid"]):
        os.kill(int(pid), signal.SIGKILL)
    wait_for("the daemon is dead", lambda: node.ping() is None)
    out = docker("run", "--rm", IMAGE, "cat", "/etc/group")
    assert out == "root:x:0:\ntesters:x:1235:"
    again = node.ping()
    assert again is not None
    assert again["pid"] != facts["pid"]
    # the container that was there before, too
    docker("restart", "-t", "0", sleeper)
    works(docker, sleeper)

"""delete of a container whose rootfs is a graft: the launcher's own, without Python."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from clipshim.settings import Settings
from clipshim.shim import state
from tests.support.node import CLIPSHIM, Node, wait_for
from tests.system.shim.test_inheritance import DUMP_RUNTIME

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Recorded:
    """A node whose runtime is a script, and the record of a graft that nobody has mounted."""

    def __init__(self, make_node: Callable[..., Node], directory: Path, script: str) -> None:
        self.runtime = directory / "fake-runtime"
        self.runtime.write_text(script)
        self.runtime.chmod(0o755)
        self.node = make_node(runtimes=[str(self.runtime)])
        self.root = directory / "root"
        self.root.mkdir()
        self.directory = self.node.run_dir / state.container_key("box", str(self.root))
        self.directory.mkdir(parents=True)
        (self.directory / "lock").touch()
        values = {"version": 1, "id": "box", "root": str(self.root), "kind": "graft"}
        state.ContainerState(str(self.directory), values).save()
        alone = directory / "alone"  # where there is no python3 beside it
        alone.mkdir()
        self.launcher = shutil.copy(CLIPSHIM, alone / "clipshim")

    def start(
        self, *, env: dict[str, str] | None = None, **options: object
    ) -> subprocess.Popen[str]:
        """Starts a delete as containerd calls it."""
        return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
            [self.launcher, "--root", self.root, "delete", "--force", "box"],
            env=env or self.node.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )


def ended(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    stdout, stderr = child.communicate(timeout=60)
    return child.returncode, stdout, stderr


@pytest.fixture
def recorded(make_node: Callable[..., Node], tmp_path: Path) -> Callable[[str], Recorded]:
    return lambda script: Recorded(make_node, tmp_path, script)


@pytest.mark.parametrize("caller", ["plain", "ignores children", "interrupt ignored"])
def test_the_runtime_gets_what_the_engine_gave(
    caller: str, recorded: Callable[[str], Recorded], tmp_path: Path
) -> None:
    ignored = {"ignores children": signal.SIGCHLD, "interrupt ignored": signal.SIGINT}.get(caller)
    found = []
    made = recorded(DUMP_RUNTIME)
    env = {**made.node.env, "DUMP": str(tmp_path / "dump"), "ODD": "\udcff", "LC_ALL": ""}

    def prepare() -> None:
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)

    for program in (made.runtime, made.launcher):
        made.launcher = program
        child = made.start(env=env, cwd=tmp_path, preexec_fn=prepare)
        assert ended(child) == (0, "", "")
        found.append(json.loads((tmp_path / "dump").read_text()))
    assert found[1] == found[0]
    assert not made.directory.exists()


@pytest.mark.parametrize(("end", "status"), [("exit 3", 3), ("kill -9 $$", -signal.SIGKILL)])
def test_it_ends_as_the_runtime_does(
    end: str, status: int, recorded: Callable[[str], Recorded], tmp_path: Path
) -> None:
    made = recorded(f"#!/bin/sh\nmkdir {tmp_path}/root/box\necho said >&2\n{end}\n")
    assert ended(made.start()) == (status, "", "said\n")
    assert made.directory.exists(), "the runtime still knows the container"


def test_signals_are_passed_on(recorded: Callable[[str], Recorded], tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = f"trap 'exit 9' TERM; touch {ready}; while :; do sleep 0.1; done"
    child = recorded(f"#!/bin/sh\n{script}\n").start()
    wait_for("it runs", ready.exists)
    child.terminate()
    assert ended(child) == (9, "", "")


def test_a_container_of_the_same_name_that_was_quick_stays(
    recorded: Callable[[str], Recorded],
) -> None:
    made = recorded('#!/bin/sh\ncp "$NEW" "$STATE"\n')
    new = made.directory.parent / "new"
    new.write_text('{"version": 1}')
    env = {**made.node.env, "NEW": str(new), "STATE": str(made.directory / "state.json")}
    assert ended(made.start(env=env)) == (0, "", "")
    assert (made.directory / "state.json").read_text() == '{"version": 1}'


def test_it_waits_for_whoever_works_on_the_container(
    recorded: Callable[[str], Recorded], tmp_path: Path
) -> None:
    made = recorded(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    with open(made.directory / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child = made.start()
        wait_for("the runtime is called", (tmp_path / "called").exists)
        assert made.directory.exists()
    assert ended(child) == (0, "", "")
    assert not made.directory.exists()


@pytest.mark.parametrize("field", ["checkpointed", "volumes", "of a later version"])
def test_what_is_not_plain_is_not_the_launchers(
    field: str, recorded: Callable[[str], Recorded]
) -> None:
    made = recorded("#!/bin/sh\n")
    container = state.load_state(Settings({"run_dir": str(made.node.run_dir)}), made.directory.name)
    assert container is not None
    container.save(**{field: [{"id": "x"}]})
    status, _, error = ended(made.start())
    assert (status, "python3" in error) == (1, True), "there is none"
    assert made.directory.exists()

"""What the real engines have in common: a private directory, the runtime under test, an end.

An engine under test is started twice: with runc and the full image, which proves the tests, and
with clipshim and a stub of that image, which proves clipshim. `Target` says which.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.support import leftovers
from tests.support.node import CLIPSHIM, wait_for
from tests.support.programs import search_path
from tests.support.runtimes import RUNC

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.node import Node

# A machine whose root lacks CAP_SYS_RESOURCE cannot give containers the engines' default limits.
ULIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")


class Target(NamedTuple):
    """What an engine runs, and how."""

    name: str  # "runc" or "clipshim"
    runtime: Path  # what the engine calls
    node: Node | None  # clipshim's

    @property
    def lazy(self) -> bool:
        """Whether the image is a stub."""
        return self.node is not None

    def container_mounts(self) -> list[str]:
        """clipshim's mounts that belong to containers."""
        return self.node.container_mounts() if self.node is not None else []


def make_target(name: str, directory: Path, node: Node | None) -> Target:
    """For clipshim a script named so, that names the private node whatever the engine passes on."""
    if node is None:
        return Target(name, RUNC, None)
    directory.mkdir(parents=True, exist_ok=True)
    script = directory / "clipshim"
    script.write_text(f'#!/bin/sh\nCLIPSHIM_CONFIG={node.config} exec {CLIPSHIM} "$@"\n')
    script.chmod(0o755)
    return Target(name, script, node)


def cgroup_parent() -> str:
    """The cgroup below which the run's containers have theirs."""
    return f"/{Path(os.environ['CLIPSHIM_TEST_ROOT']).name}"


def engine_env(directory: Path, **more: str) -> dict[str, str]:
    """An environment for daemons and clients: nothing of the user's configuration."""
    home = directory / "home"
    home.mkdir(parents=True, exist_ok=True)
    kept = ("LC_ALL", "CLIPSHIM_TEST_RUN", "CLIPSHIM_TEST_ROOT")
    return {
        **{name: os.environ[name] for name in kept if name in os.environ},
        "PATH": search_path(),
        "HOME": str(home),
        "TMPDIR": os.environ["TMPDIR"],
        "DOCKER_BUILDKIT": "0",
        **more,
    }


class Client:
    """Runs an engine's command-line client with fixed leading arguments."""

    def __init__(self, prefix: Sequence[str | Path], env: dict[str, str]) -> None:
        self.prefix = list(prefix)
        self.env = env

    def run(
        self, *arguments: str | Path, check: bool = True, timeout_s: float = 300, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """One call; stdout and stderr are captured apart."""
        options.setdefault("stdin", subprocess.DEVNULL)
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [*self.prefix, *arguments],
            env=self.env,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            **options,
        )
        if check:
            words = " ".join(str(word) for word in arguments)
            assert done.returncode == 0, (
                f"{Path(self.prefix[0]).name} {words}: exit {done.returncode}\n"
                f"{done.stdout}{done.stderr}"
            )
        return done

    def __call__(self, *arguments: str | Path, **options: Any) -> str:
        """stdout of a call that must work, stripped."""
        return self.run(*arguments, **options).stdout.strip()


class Daemon:
    """An engine's daemon process below a directory of its own."""

    def __init__(self, directory: Path, env: dict[str, str]) -> None:
        self.directory = directory
        self.env = env
        self.log = directory / "daemon.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str | Path], ready: Client, *question: str) -> None:
        """Starts it and waits until the client's question is answered."""
        with open(self.log, "ab") as log:
            process = self.process = subprocess.Popen(
                list(command),
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

        def answers() -> bool:
            status = process.poll()
            assert status is None, f"{command[0]}: exit {status}\n{self.log_tail()}"
            return ready.run(*question, check=False).returncode == 0

        try:
            wait_for(f"{command[0]} answers", answers, 180)
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.log_tail()}") from exc

    def log_tail(self) -> str:
        """The end of the daemon's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """SIGTERM, and SIGKILL after a minute."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def close(self) -> None:
        """Stops it, ends everything below its directory, and removes that."""
        self.stop()
        destroy(self.directory)


def destroy(directory: Path) -> None:
    """Kills what runs below a directory of the run, undoes its mounts, deletes it."""
    leftovers.kill_processes(directory, leftovers.processes_below)
    leftovers.unmount_below(directory)
    assert not leftovers.mounts_below(directory), leftovers.mounts_below(directory)
    shutil.rmtree(directory, ignore_errors=True)

"""A private node: its own configuration, run and state directories, and daemon.

    with Node(directory, mode="fuse") as node:
        node.clipshim("index", reference)
        node.start()

`close()` leaves nothing: processes that have the node's configuration in their environment are
killed, all mounts below its directory undone, the directory removed. Not for engines.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from clipshim.node.self_access import DEBUG_ENV, MARK
from tests.support import leftovers
from tests.support.programs import program

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
DEADLINE_S = 120.0
CLIPSHIM = Path(sys.executable).parent / "clipshim"


def wait_for(what: str, look: Callable[[], T | None], deadline_s: float = DEADLINE_S) -> T:
    """Polls `look` until it answers something true, and returns that."""
    end = time.monotonic() + deadline_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < end, f"waited {deadline_s:.0f} s in vain: {what}"
        time.sleep(0.02)


class Node:
    """One private node; `settings` are keys of the configuration file."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self.run_dir = directory / "run"
        self.state_dir = directory / "state"
        self.config = directory / "config.toml"
        directory.mkdir(parents=True, exist_ok=True)
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.settings: dict[str, Any] = {
            "run_dir": str(self.run_dir),
            "state_dir": str(self.state_dir),
            "runtimes": [str(program("/usr/sbin/runc"))],
            "min_free_bytes": 0,
            "certs_dir": str(directory / "certs.d"),
        }
        self.configure(**settings)
        self.env = {
            **os.environ,
            "CLIPSHIM_CONFIG": str(self.config),
            "HOME": str(directory),
            "DOCKER_CONFIG": str(directory / "docker-config"),
            DEBUG_ENV: "1",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def configure(self, **settings: Any) -> None:
        """Changes keys of the configuration; what already runs keeps the old values."""
        self.settings.update(settings)
        lines = [f"{key} = {_toml(value)}\n" for key, value in self.settings.items()]
        draft = self.config.with_suffix(".draft")
        draft.write_text("".join(lines))
        draft.rename(self.config)

    def clipshim(
        self, *arguments: str | Path, check: bool = True, timeout_s: float = 300, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs `clipshim …` for this node; stdout and stderr are captured."""
        result = subprocess.run(
            [CLIPSHIM, *arguments],
            env=options.pop("env", self.env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            **options,
        )
        if check:
            words = " ".join(str(word) for word in arguments)
            assert result.returncode == 0, (
                f"clipshim {words}: exit {result.returncode}\n{result.stdout}{result.stderr}"
                f"{self.log_tail()}"
            )
        return result

    def log_tail(self, lines: int = 30) -> str:
        """The end of the daemon's log files, for messages of failed tests."""
        parts = []
        for log in self._logs():
            try:
                text = log.read_text(errors="replace").splitlines()[-lines:]
            except OSError:
                continue
            parts.append(f"\n--- {log}\n" + "\n".join(text))
        return "".join(parts)

    def _logs(self) -> list[Path]:
        """All log files; never looks into a mount, which may have nobody left to answer."""
        mounts = set(self.mounts())
        found = []
        for directory, names, files in os.walk(self.directory):
            names[:] = [name for name in names if f"{directory}/{name}" not in mounts]
            found += [Path(directory, name) for name in files if name.endswith(".log")]
        return sorted(found)

    def call(self, op: str, *, timeout_s: float = 60, **fields: Any) -> dict[str, Any]:
        """One request to the daemon; the final reply. OSError if nobody listens."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(timeout_s)
            client.connect(str(self.run_dir / "daemon.sock"))
            client.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")
            with client.makefile("rb") as replies:
                for line in replies:
                    reply: dict[str, Any] = json.loads(line)
                    if "ok" in reply:
                        return reply
        raise ConnectionError(f"the daemon closed the connection without an answer to {op}")

    def ping(self) -> dict[str, Any] | None:
        """The daemon's answer to a ping; None if it does not answer now."""
        try:
            reply = self.call("ping", timeout_s=10)
        except (OSError, ValueError):
            return None
        return reply if reply.get("ok") else None

    def start(self) -> dict[str, Any]:
        """Starts the daemon if none runs, and waits for its answer."""
        if (reply := self.ping()) is not None:
            return reply
        with open(self.directory / "start.log", "ab") as log:
            daemon = subprocess.Popen(
                [CLIPSHIM, "daemon"],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._daemons.append(daemon)

        def answers() -> dict[str, Any] | None:
            status = daemon.poll()
            assert status in (None, 0), f"clipshim daemon: exit {status}{self.log_tail()}"
            return self.ping()

        return wait_for("the daemon answers", answers)

    def kill_server(self) -> int:
        """SIGKILL to the server; returns when another one answers. The new process id."""
        old = int(self.start()["pid"])
        os.kill(old, signal.SIGKILL)

        def replaced() -> int | None:
            reply = self.ping()
            return int(reply["pid"]) if reply and reply["pid"] != old else None

        return wait_for("another server answers", replaced)

    def processes(self) -> list[int]:
        """Live processes that have this node's configuration in their environment or arguments."""
        mark = os.fsencode(self.config)
        found = []
        for name in os.listdir("/proc"):
            if not name.isdigit() or int(name) == os.getpid():
                continue
            environment, arguments = leftovers.environment_and_arguments(int(name))
            marked = b"CLIPSHIM_CONFIG=" + mark in environment or mark in arguments
            if marked and leftovers.start_time(int(name)) is not None:
                found.append(int(name))
        return found

    def mounts(self) -> list[str]:
        """Mount points below the node's directory, in this mount namespace."""
        return leftovers.mounts_below(self.directory)

    def container_mounts(self) -> list[str]:
        """Mount points that belong to containers, without the daemon's own."""
        own = (f"{self.run_dir}/layers", f"{self.state_dir}/mnts")
        return [point for point in self.mounts() if not point.startswith(own)]

    def stop(self) -> None:
        """Kills every process of the node and undoes all its mounts; files stay."""

        def killed() -> bool:
            pids = self.processes()
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            return not pids

        wait_for("the node's processes end", killed)
        while self._daemons:
            self._daemons.pop().wait(DEADLINE_S)
        leftovers.unmount_below(self.directory)

    def check_self_access(self) -> None:
        """The server has not touched its own mounts, which can hang it for ever."""
        for log in (*self.directory.glob("*.log"), *self.state_dir.glob("*.log")):
            text = log.read_text(errors="replace")
            assert MARK not in text, text[text.index(MARK) :][:4000]

    def close(self) -> None:
        """Stops the node and removes its directory."""
        self.stop()
        assert not self.mounts(), self.mounts()
        self.check_self_access()
        shutil.rmtree(self.directory, ignore_errors=True)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value)  # strings, numbers and booleans are written alike

"""A FUSE mount whose descriptor the test holds, and the server processes that serve it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from clipshim.mounts import syscalls
from clipshim.node import fuse_connection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

PATIENCE_S = 120.0


class FuseMount:
    """Mounts a fresh FUSE connection; the connection lives as long as this object."""

    def __init__(self, mountpoint: Path, *, posix_acl: bool = False) -> None:
        self.mountpoint = mountpoint
        mountpoint.mkdir()
        self.fd = fuse_connection.mount_fuse(str(mountpoint), nosuid=False, posix_acl=posix_acl).fd
        self.servers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> FuseMount:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for server in self.servers:
            if server.poll() is None:
                server.kill()
            server.wait(PATIENCE_S)
        # The last descriptor of a connection aborts it: nothing can hang on it any more.
        os.close(self.fd)
        self.unmount()

    def unmount(self) -> None:
        """Takes the mount away, now or before."""
        with contextlib.suppress(OSError):  # EINVAL: before
            syscalls.umount2(str(self.mountpoint), syscalls.MNT_DETACH)

    def start(self, module: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts `python -m module FUSE_FD ARGUMENTS…`."""
        server = subprocess.Popen(
            [sys.executable, "-m", module, str(self.fd), *arguments],
            pass_fds=[self.fd],
            cwd=Path(__file__).parent.parent.parent,
        )
        self.servers.append(server)
        return server

    def kill(self) -> None:
        """Kills the server that runs now, without a chance to say good-bye."""
        self.servers[-1].send_signal(signal.SIGKILL)
        self.servers[-1].wait(PATIENCE_S)


def wait_until(condition: Callable[[], bool]) -> None:
    """Polls until the condition holds."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def wait_for_line(log: Path, line: str, count: int = 1) -> None:
    """Polls until `line` is in the log `count` times."""
    wait_until(lambda: log.exists() and log.read_text().splitlines().count(line) >= count)


@contextlib.contextmanager
def reader_process(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that reads from the mount; killed at the end if it still runs."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()

"""A FUSE mount whose descriptor the test holds, and the server processes that serve it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
MNT_DETACH = 2
PATIENCE_S = 120.0
_libc = ctypes.CDLL(None, use_errno=True)


class FuseMount:
    """Mounts a fresh FUSE connection; the connection lives as long as this object."""

    def __init__(self, mountpoint: Path, *, options: str = "") -> None:
        self.mountpoint = mountpoint
        mountpoint.mkdir()
        self.fd = os.open("/dev/fuse", os.O_RDWR)
        self.servers: list[subprocess.Popen[bytes]] = []
        data = f"fd={self.fd},rootmode=40000,user_id=0,group_id=0{options}"
        flags = MS_RDONLY | MS_NOSUID | MS_NODEV
        if _libc.mount(b"test", bytes(mountpoint), b"fuse.test", flags, data.encode()):
            number = ctypes.get_errno()
            os.close(self.fd)
            raise OSError(number, "mount: " + os.strerror(number))

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
        _libc.umount2(bytes(self.mountpoint), MNT_DETACH)

    def start(self, module: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts `python -m module FUSE_FD first|takeover ARGUMENTS…`."""
        how = "takeover" if self.servers else "first"
        server = subprocess.Popen(
            [sys.executable, "-m", module, str(self.fd), how, *arguments],
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

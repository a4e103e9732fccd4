"""The server's side of the mount worker: one process, one request at a time, restarted if lost."""

import contextlib
import fcntl
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import trio

from clipshim.errors import MountError
from clipshim.node.control import (
    Message,
    close_all,
    control_pair,
    receive_message,
    send_message,
)

if TYPE_CHECKING:
    import socket

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 60.0


class MountClient:
    """Asks the worker, which is started again when it is needed and gone."""

    def __init__(self, run_dir: str) -> None:
        self._lock_path = f"{run_dir}/worker.lock"
        self._turn = trio.Lock()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._next_id = 0

    async def settle(self) -> None:
        """Returns when no worker of an earlier server is at work. Raises MountError.

        Our own is started already, so that the first mount need not wait for it.
        """
        with contextlib.suppress(OSError):  # whoever asks it for something will learn why
            self._start()
        try:
            with trio.fail_after(REQUEST_TIMEOUT_S):
                await trio.to_thread.run_sync(
                    _wait_for_lock, self._lock_path, abandon_on_cancel=True
                )
        except (OSError, trio.TooSlowError) as exc:
            raise MountError(
                f"mount worker of an earlier server: {str(exc) or 'still at work'}"
            ) from exc

    async def probe(self, directory: str) -> str | None:
        """Why EROFS cannot be mounted from files in `directory`; None if it can."""
        reply, _ = await self._ask({"op": "probe", "directory": directory})
        return None if reply["reason"] is None else str(reply["reason"])

    async def mount_erofs(self, primary: str, devices: list[str], target: str) -> None:
        """Mounts an image at `target` unless something is mounted there."""
        request = {"op": "mount_erofs", "primary": primary, "devices": devices, "target": target}
        await self._ask(request)

    async def mount_bind(self, source: str, target: str) -> None:
        """Shows the directory `source` read-only at `target`."""
        await self._ask({"op": "mount_bind", "source": source, "target": target})

    async def clone(self, target: str) -> int:
        """A descriptor of a detached copy of the mount at `target`; the caller owns it."""
        _, fds = await self._ask({"op": "clone", "target": target})
        if len(fds) != 1:
            close_all(fds)
            raise MountError(f"{target}: expected one mount descriptor, got {len(fds)}")
        return fds[0]

    async def unmount(self, target: str) -> bool:
        """Detaches what is mounted at `target`; False if nothing was."""
        reply, _ = await self._ask({"op": "unmount", "target": target})
        return bool(reply["removed"])

    def close(self) -> None:
        """Lets the worker end by itself."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _ask(self, request: Message) -> tuple[Message, list[int]]:
        """Raises MountError. Shielded: a worker whose answer nobody reads would be out of step."""
        async with self._turn:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + REQUEST_TIMEOUT_S):
                try:
                    reply, fds = await self._exchange(request)
                except (OSError, EOFError, ValueError) as exc:
                    self._abandon()
                    raise MountError(f"mount worker: {str(exc) or type(exc).__name__}") from exc
                if not reply.get("ok"):
                    close_all(fds)
                    raise MountError(
                        str(reply.get("error", "mount worker failed")), hint=reply.get("hint")
                    )
                return reply, fds
            self._abandon()
            raise MountError(
                f"mount worker: no answer to {request['op']} in {REQUEST_TIMEOUT_S:.0f} s"
            )

    async def _exchange(self, request: Message) -> tuple[Message, list[int]]:
        if self._socket is None:
            self._start()
        assert self._socket is not None
        self._next_id += 1
        send_message(self._socket, request | {"id": self._next_id})
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                reply, fds = receive_message(self._socket)
            except BlockingIOError:
                continue
            if reply.get("id") == self._next_id:
                return reply, fds
            close_all(fds)

    def _start(self) -> None:
        ours, theirs = control_pair()
        ours.setblocking(False)
        with theirs:
            arguments = [str(theirs.fileno()), self._lock_path]
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-m", "clipshim.node.mount_worker", *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._socket = ours

    def _abandon(self) -> None:
        """Gives the worker up. It may hang in the kernel, so it is not waited for."""
        if self._process is not None:
            log.error("mount worker given up", extra={"worker_pid": self._process.pid})
            self._process.kill()
            if self._process.poll() is None:  # dies later: its zombie must not stay
                trio.lowlevel.spawn_system_task(_reap, self._process)
            self._process = None
        self.close()


def _wait_for_lock(path: str) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)


async def _reap(process: "subprocess.Popen[bytes]") -> None:
    fd = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)
    process.wait()

"""Serves one /dev/fuse descriptor with pyfuse3, in the place of whoever served it before.

Not for mounting, and not for what the files hold.

The descriptor belongs to a mount that somebody else made with mount(2) and fd=N and whose FUSE_INIT
has been answered (the keeper does both), so that the mount outlives its servers and the first one
is like the others. libfuse always starts with FUSE_INIT: it begins on a socket pair that stands at
the descriptor's number, reads a FUSE_INIT that we made, and in Operations.init() the real
descriptor comes back to that number. libfuse's answer then goes to the kernel, which drops it,
because it knows no such request.

FUSE_NOTIFY_RESEND (Linux 6.9+) makes the kernel send again what a dead server had read and not
answered. That needs inode numbers and file handles that mean the same in every server:
deterministic inodes, handles without state.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import socket
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from clipshim.errors import ClipError, MountError
from clipshim.lazy import fuse_wire as wire

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

log = logging.getLogger(__name__)

# What libfuse is told that the kernel can; 7.36 is the newest that libfuse 3.14 understands whole.
LIBFUSE_FLAGS = 0x73FFFFFB
MINOR = 36
SYNTHETIC_UNIQUE = 0x0FFFFFFFFFFFFFF0
MAX_READ = 1 << 20
# Every waiting request is a task; reads wait for as long as their registry does.
MAX_TASKS = 100_000

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")


def handler(
    function: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """For every FUSE handler: known errors become their errno, others EIO and a log entry.

    pyfuse3 translates only FUSEError; any other exception would end the main loop and with it
    the mount. Cancellation passes.
    """

    @functools.wraps(function)
    async def guarded(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await function(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except ClipError as exc:
            log.debug("%s: %s", function.__name__, exc)  # who raised it has logged it, rate-limited
            raise pyfuse3.FUSEError(wire.reportable(exc.errno)) from exc
        except OSError as exc:
            log.warning("%s: %s", function.__name__, exc)
            raise pyfuse3.FUSEError(wire.reportable(exc.errno)) from exc
        except Exception as exc:
            log.exception("%s failed", function.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from exc

    return guarded


class StatelessOperations(pyfuse3.Operations):
    """The handlers that a file system of deterministic inodes and handles without state shares."""

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        """Nothing is counted: inodes are deterministic."""

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """Tells the kernel never to ask again: close() must not wait for a server that is dead."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    @handler
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """Handles have no state."""

    @handler
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """Handles have no state."""


def volume(size: int, files: int) -> pyfuse3.StatvfsData:
    """What statfs says of a read-only file system of `size` bytes: nothing is free."""
    data = pyfuse3.StatvfsData()
    data.f_bsize = data.f_frsize = 512
    data.f_blocks = (size + 511) // 512
    data.f_bfree = data.f_bavail = data.f_ffree = data.f_favail = 0
    data.f_files = files
    data.f_namemax = 255
    return data


class FuseSession:
    """One connection's service. One a process: pyfuse3 keeps its session in module globals."""

    def __init__(self, ops: pyfuse3.Operations, fuse_fd: int) -> None:
        self._ops = ops
        self._fd = fuse_fd
        self._can_resend = True
        self._serving = False

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves the connection until it is unmounted, or finished, or the task is cancelled.

        `task_status` is told when requests are being answered. Neither unmounts nor closes the
        descriptor. Raises MountError if the connection is gone.
        """
        fuse_fd = self._fd
        real_fd = os.dup(fuse_fd)

        def init() -> None:
            os.dup2(real_fd, fuse_fd)
            os.close(real_fd)
            self._can_resend = wire.request_resend(fuse_fd)
            # A request can be withdrawn between poll and read; then read must not block the loop.
            # The price, a main loop that starts again, needs the resend.
            os.set_blocking(fuse_fd, not self._can_resend)
            self._serving = True
            task_status.started()

        self._ops.init = init  # type: ignore[method-assign]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            os.dup2(theirs.fileno(), fuse_fd)
            theirs.close()
            ours.send(_synthetic_init())
            pyfuse3.init(self._ops, f"/dev/fd/{fuse_fd}", set())
            try:
                await self._main_loop()
            finally:
                if not self._serving:
                    os.dup2(real_fd, fuse_fd)
                    os.close(real_fd)
        if not self._serving:
            raise MountError("the FUSE session ended before its first request")

    def finish(self) -> bool:
        """Has `serve` take no more requests, and return when what it took is answered.

        Does nothing and returns False where the next server gets what is left unanswered.
        """
        if self._can_resend or not self._serving:
            return False
        pyfuse3.terminate()
        return True

    async def _main_loop(self) -> None:
        while True:
            try:
                await pyfuse3.main(max_tasks=MAX_TASKS)
            except Exception as exc:
                if not _is_only_eagain(exc):
                    log.error("FUSE main loop starts again", exc_info=exc)
                    await trio.sleep(0.1)  # whatever it is must not become a busy loop
                if self._can_resend:  # the handlers that were cancelled have not answered
                    wire.request_resend(self._fd)
            else:
                return


def _is_only_eagain(exc: BaseException) -> bool:
    if isinstance(exc, BaseExceptionGroup):
        return all(_is_only_eagain(inner) for inner in exc.exceptions)
    return isinstance(exc, OSError) and exc.errno == errno.EAGAIN


def _synthetic_init() -> bytes:
    body = wire.INIT_IN.pack(7, MINOR, MAX_READ, LIBFUSE_FLAGS) + bytes(48)
    length = wire.IN_HEADER.size + len(body)
    return wire.IN_HEADER.pack(length, wire.INIT, SYNTHETIC_UNIQUE, 0, 0, 0, 0, 0, 0) + body

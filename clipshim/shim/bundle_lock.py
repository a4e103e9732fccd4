"""Lets one at a time change a bundle's config.json: several containers may come from one bundle.

The lock (flock) is on the bundle's directory, so that nothing is left behind. A container holds it
from reading config.json until the low-level runtime has read what became of it; who takes a
container down, while it puts config.json back. Not for what one container's verbs do to each other:
that is ContainerLock's.
"""

import errno
import fcntl
import os

from clipshim.errors import BundleError
from clipshim.shim.state import lock_file

WAIT_S = 30.0


class BundleLock:
    """Held from entering the block to leaving it, or to release()."""

    __slots__ = ("_fd", "_path")

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> "BundleLock":
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return self  # gone: nothing to lock, and what follows finds that out
        try:
            lock_file(fd, WAIT_S)
        except (BlockingIOError, TimeoutError):
            os.close(fd)
            raise BundleError(
                f"bundle {self._path}: another container has been starting from it for {WAIT_S:g} s"
            ) from None
        except OSError as exc:
            # NFS locks only files that are open for writing; there containers of one bundle have to
            # be started one after the other
            if exc.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
                os.close(fd)
                raise
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Lets the next one in; a second time does nothing."""
        if self._fd >= 0:
            # not left to close: a child between fork and execve has a copy of the descriptor
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1

"""Why the low-level runtime refused a container, as far as its --log file tells.

Its output is the engine's and passes untouched; the log is only read. Not for errors of our own
(reporting.py).
"""

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_TAIL_BYTES = 64 << 10
# what runc says of a mount target whose link count is 0 (github.com/cyphar/filepath-securejoin)
_DELETED = (b"deleted directory", b"deleted inode")


class RuntimeLog:
    """The file of --log, from where it ended when this was made."""

    __slots__ = ("_begin", "_path")

    def __init__(self, options: "Mapping[str, str]") -> None:
        self._path = options.get("log", "")
        self._begin = 0
        try:
            self._begin = os.stat(self._path).st_size if self._path else 0
        except (OSError, ValueError):
            return

    def failure(self, status: int, verb: str) -> str:
        """The cause of a failure for the daemon's counts, by the wait status; empty for none.

        A status of `run` may be the container's own, so that without words in the log it is none.
        """
        if status == 0:
            return ""
        said = self._tail()
        if any(text in said for text in _DELETED):
            return "DeletedDirectory"
        return "RuntimeFailed" if verb != "run" or b"error" in said else ""

    def _tail(self) -> bytes:
        """What has been written since, at most the last 64 KiB of it."""
        if not self._path:
            return b""
        try:
            # O_NONBLOCK: engines may pass a FIFO
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError):
            return b""
        try:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode):
                return b""
            begin = max(self._begin, facts.st_size - MAX_TAIL_BYTES)
            return os.pread(fd, MAX_TAIL_BYTES, begin)
        except OSError:
            return b""
        finally:
            os.close(fd)

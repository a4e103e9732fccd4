"""What the node daemon needs to know about processes: identity that survives pid reuse, limits.

Standard library only: the keeper imports this.
"""

import contextlib
import os
import resource
from typing import NamedTuple


class ProcessId(NamedTuple):
    """A pid and when that process started, so that a reused pid is not taken for it."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> "ProcessId":
        """The identity of a running process. Raises ProcessLookupError."""
        ticks = start_ticks(pid)
        if ticks is None:
            raise ProcessLookupError(pid)
        return cls(pid, ticks)

    def is_running(self) -> bool:
        """Whether this very process still exists and is not a zombie."""
        return start_ticks(self.pid) == self.start_ticks


def start_ticks(pid: int) -> int | None:
    """Clock ticks from boot to the start of `pid`; None if it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    # The name in parentheses may hold anything, so count from the last one (proc(5), stat).
    fields = text[text.rfind(b")") + 2 :].split()
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return int(fields[19])


def open_pidfd(process: ProcessId) -> int | None:
    """A pidfd of exactly this process, or None if it is gone."""
    try:
        fd = os.pidfd_open(process.pid)
    except OSError:
        return None
    if not process.is_running():  # the pid was reused between the check and the open
        os.close(fd)
        return None
    return fd


def raise_limits() -> None:
    """As many open files as allowed, and the last to be chosen when memory runs out."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # In a container or without CAP_SYS_RESOURCE this is refused; it is a precaution only.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("-999")

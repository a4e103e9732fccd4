"""A child process of the keeper: started, watched through a pidfd, restarted with back-off.

Not for what the children do. Standard library only.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from clipshim.node.processes import ProcessId, open_pidfd

STEADY_S = 60.0  # a child that lived this long starts again with a clean record
FIRST_DELAY_S = 0.05
LONGEST_DELAY_S = 2.0  # readers wait that long at most for a server that keeps dying


def restart_delay(failures: int) -> float:
    """Seconds to wait before the restart after so many deaths in a row."""
    if failures <= 1:
        return 0.0
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * float(2 ** min(failures - 2, 16)))


def failures_after(failures: int, lived_s: float) -> int:
    """How many deaths in a row it is with this one: a long life makes good for earlier ones."""
    return 1 if lived_s >= STEADY_S else failures + 1


class Child:
    """One supervised process. `exited()` is called by the owner when the pidfd is readable."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process: ProcessId | None = None
        self.pidfd = -1
        self.restart_at: float | None = None
        self.ending = False  # its exit is expected: do not restart
        self.deaths = 0  # unexpected and not, since this keeper started
        self._popen: subprocess.Popen[bytes] | None = None
        self._failures = 0
        self._started = 0.0

    @property
    def running(self) -> bool:
        """Whether a process is being watched."""
        return self.pidfd >= 0

    def start(self, module: str, arguments: Sequence[str], fds: Sequence[int]) -> None:
        """Starts `python -I -m module arguments` with these descriptors and no others."""
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=fds,
        )
        try:
            self.process = ProcessId.of(self._popen.pid)
            self.pidfd = os.pidfd_open(self._popen.pid)
        except OSError:  # one that is not watched would run beside the next one
            self._popen.kill()
            self._popen.wait()
            self._popen = self.process = None
            raise
        self._started = time.monotonic()
        self.restart_at = None

    def adopt(self, process: ProcessId | None) -> bool:
        """Watches a process that somebody else started; False if it is gone."""
        if process is None:
            return False
        pidfd = open_pidfd(process)
        if pidfd is None:
            return False
        self.process, self.pidfd = process, pidfd
        self._started = time.monotonic()
        return True

    def exited(self) -> int | None:
        """Takes note of the end; returns the exit status, or None if it was not our child."""
        status: int | None = None
        if self._popen is not None:
            status = self._popen.wait()
        elif self.process is not None:  # ours after an exec of the keeper, else not
            with contextlib.suppress(ChildProcessError):
                _, raw = os.waitpid(self.process.pid, 0)
                status = os.waitstatus_to_exitcode(raw)
        os.close(self.pidfd)
        self.pidfd, self.process, self._popen = -1, None, None
        now = time.monotonic()
        self._failures = failures_after(self._failures, now - self._started)
        self.deaths += 1
        self.restart_at = now + restart_delay(self._failures)
        return status

    def restart_soon(self) -> None:
        """Cancels the back-off: the exit was asked for."""
        self._failures = 0
        self.restart_at = time.monotonic()

    def kill(self, number: signal.Signals) -> None:
        """Sends a signal to exactly this process, if it still runs."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

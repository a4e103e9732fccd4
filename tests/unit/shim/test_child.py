"""Running the low-level runtime as a child."""

from __future__ import annotations

import subprocess
import sys

RUN = '''
import signal, sys
from clipshim.shim import child
if sys.argv[1] == "ignored":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
code, text = child.run_quietly(["/bin/sh", "-c", "exit 5"])
assert code == 5, (code, text)
script = """
for line in open("/proc/self/status"):
    if line.startswith("SigIgn:"):
        print(line)
raise SystemExit(7)
"""
child.leave_with(child.run(sys.executable, ["-c", script]))
'''
SIGCHLD_BIT = 1 << 16  # of signal 17, proc(5)


def _run(setting: str) -> tuple[int, int]:
    """The exit code, and the signals that the runtime finds ignored."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, setting], capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    return done.returncode, int(done.stdout.split()[1], 16)


def test_a_caller_that_ignores_its_children() -> None:
    """The setting survives execve; with it a child ends without status and signal."""
    code, ignored = _run("ignored")
    assert code == 7
    assert ignored & SIGCHLD_BIT, "the runtime gets the caller's setting"


def test_an_ordinary_caller() -> None:
    code, ignored = _run("default")
    assert code == 7
    assert not ignored & SIGCHLD_BIT

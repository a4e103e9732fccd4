"""Process identity and the keeper's children."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time

import pytest

from clipshim.node.children import (
    LONGEST_DELAY_S,
    STEADY_S,
    Child,
    failures_after,
    restart_delay,
)
from clipshim.node.processes import ProcessId, open_pidfd, start_ticks


def test_the_first_restart_is_at_once_and_later_ones_wait_longer_up_to_a_bound() -> None:
    delays = [restart_delay(failures) for failures in range(1, 100)]
    assert delays[0] == 0.0
    assert delays == sorted(delays)
    assert delays[-1] == LONGEST_DELAY_S


def test_only_a_long_life_makes_the_next_restart_immediate() -> None:
    failures = 0
    for lived_s in (0.0, 1.0, STEADY_S - 1):
        failures = failures_after(failures, lived_s)
    assert failures == 3
    assert restart_delay(failures_after(failures, STEADY_S - 1)) > 0
    assert failures_after(100, STEADY_S) == 1
    assert restart_delay(failures_after(100, STEADY_S)) == 0.0


def test_a_child_that_keeps_dying_is_restarted_later_and_later() -> None:
    child = Child("test")
    for deaths in range(1, 5):
        child.start("platform", ["--terse"], [])
        select.select([child.pidfd], [], [], 60)
        before = time.monotonic()
        child.exited()
        assert child.restart_at is not None
        due: float = child.restart_at
        assert due >= before + restart_delay(deaths)
    child.restart_soon()
    assert child.restart_at is not None
    assert child.restart_at <= time.monotonic()


def test_a_process_is_known_by_pid_and_start() -> None:
    me = ProcessId.of(os.getpid())
    assert me.is_running()
    assert not ProcessId(me.pid, me.start_ticks + 1).is_running()
    assert open_pidfd(ProcessId(me.pid, me.start_ticks + 1)) is None


def test_a_dead_process_and_a_zombie_are_not_running() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pidfd = os.pidfd_open(process.pid)
        try:
            select.select([pidfd], [], [], 60)
        finally:
            os.close(pidfd)
        assert start_ticks(process.pid) is None  # a zombie until it is waited for
    with pytest.raises(ProcessLookupError):
        ProcessId.of(process.pid)


def test_a_name_with_parentheses_does_not_confuse_the_start_time() -> None:
    code = "import ctypes; ctypes.CDLL(None).prctl(15, b'a) R 1 (b', 0, 0, 0); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code + "; print(1)"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        known = start_ticks(process.pid)
        assert known is not None
        process.communicate(b"\n")
    assert process.returncode == 0


def test_a_child_that_ends_is_due_again() -> None:
    child = Child("test")
    child.start("platform", ["--terse"], [])
    assert child.running
    select.select([child.pidfd], [], [], 60)
    assert child.exited() == 0
    assert not child.running
    assert child.restart_at is not None
    assert child.deaths == 1


def test_a_process_that_is_gone_cannot_be_adopted() -> None:
    child = Child("test")
    assert not child.adopt(None)
    assert not child.adopt(ProcessId(os.getpid(), 1))
    assert child.adopt(ProcessId.of(os.getpid()))
    os.close(child.pidfd)

"""Who started the daemon does not wait for it at its end, even if it adopts and reaps like conmon.

The engine here is a small program: it adopts orphans while its container runs, stops that at the
container's end, and then waits for every child it has.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support import leftovers
from tests.support.node import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.node import Node

ENGINE = """
import os, sys
from clipshim.mounts import syscalls
from clipshim.settings import load_settings
from clipshim.shim import daemon_start

directory, order = sys.argv[1:]
os.makedirs(directory)
syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
if os.fork() == 0:
    daemon_start.start_daemon(load_settings(), directory)
    os._exit(0)
os.wait()
print("started", flush=True)
sys.stdin.readline()
if order == "deleted before":
    os.rmdir(directory)
    os.wait()  # an orphan that was made to find out who adopts it
syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 0)
if order == "deleted after":
    os.rmdir(directory)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
print("ended", flush=True)
"""


@pytest.fixture
def engine(node: Node) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts an engine, which starts the daemon; a line on its stdin ends its container."""
    started: list[subprocess.Popen[str]] = []

    def start(order: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", ENGINE, node.run_dir / "box", order],
            env=node.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def parent_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        pid = parent_of(pid)
        found.append(pid)
    return found


def keeper(node: Node) -> int:
    facts = node.ping()
    assert facts is not None, node.log_tail()
    return int(facts["keeper_pid"])


def end_container(process: subprocess.Popen[str]) -> None:
    out, _ = process.communicate("now\n", timeout=120)
    assert (out, process.returncode) == ("ended\n", 0)


@pytest.mark.parametrize("order", ["deleted before", "deleted after"])
def test_an_engine_that_waits_for_its_children_ends(
    node: Node, engine: Callable[[str], subprocess.Popen[str]], order: str
) -> None:
    process = engine(order)
    pid = keeper(node)
    assert parent_of(parent_of(pid)) == process.pid, "the foster parent is between the two"
    end_container(process)
    assert keeper(node) == pid


def test_nor_for_what_a_dead_keeper_has_left(
    node: Node, engine: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = engine("deleted after")
    old = keeper(node)
    foster = parent_of(old)
    os.kill(old, signal.SIGKILL)

    def replaced() -> bool:
        now = node.ping()
        return now is not None and now["keeper_pid"] not in (None, old)

    wait_for("there is another keeper", replaced)
    assert foster in ancestors(keeper(node)), "it adopts what the dead one has left"
    end_container(process)
    assert node.ping() is not None


def test_the_foster_parent_ends_with_the_daemon(
    node: Node, engine: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = engine("deleted after")
    foster = parent_of(keeper(node))
    node.clipshim("daemon", "--stop")
    wait_for("it has ended", lambda: leftovers.start_time(foster) is None)
    end_container(process)


def test_a_daemon_that_a_person_starts_has_none(node: Node) -> None:
    node.clipshim("gc")  # starts one
    with open(f"/proc/{parent_of(keeper(node))}/cmdline", "rb") as file:
        assert b"clipshim.node.foster" not in file.read()

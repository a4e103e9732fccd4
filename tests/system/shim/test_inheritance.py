"""What the low-level runtime and the container get from the caller: all of it, and only they."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.node import CLIPSHIM, Node, wait_for
from tests.support.runtimes import Runtime, write_bundle
from tests.system.shim.containers import LOOP, assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


DUMP_RUNTIME = """#!/usr/bin/python3 -IS
import json, os, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
json.dump({
    "argv": sys.argv[1:],
    "environ": sorted(open("/proc/self/environ", errors="surrogateescape").read().split(chr(0))),
    "fds": sorted(fd for fd in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + fd)
                  and not os.readlink("/proc/self/fd/" + fd).endswith(("/fd", "fake-runtime"))),
    "signals": [status[key] for key in ("SigBlk", "SigIgn", "SigCgt")],
    "cwd": os.getcwd(),
    "umask": status.get("Umask"),
    "session": os.getsid(0),
}, open(os.environ["DUMP"], "w"))
"""


@pytest.mark.parametrize("interrupt", [signal.SIG_DFL, signal.SIG_IGN], ids=["heeded", "ignored"])
@pytest.mark.parametrize("way", ["launcher", "python", "child"])
def test_the_runtime_gets_what_the_engine_gave(
    way: str,
    interrupt: signal.Handlers,
    make_node: Callable[..., Node],
    tmp_path: Path,
    bundle: Callable[..., Path],
) -> None:
    fake = tmp_path / "fake-runtime"
    fake.write_text(DUMP_RUNTIME)
    fake.chmod(0o755)
    node = make_node(runtimes=[str(fake)])
    path = bundle(["/bin/true"])
    if way == "launcher":
        (path / "index.clip").unlink()
        write_bundle(path, ["/bin/true"])
    elif way == "python":  # an escape in config.json is for Python to understand
        write_bundle(path, ["/bin/true"], annotations={"org.example": "\u20ac"})
    words = ["--root", str(tmp_path / "root"), "create", "--bundle", str(path), "odd id\udcff"]
    words[-1] = "box"
    env = {
        **node.env,
        "DUMP": str(tmp_path / "dump"),
        "LD_LIBRARY_PATH": "/nonexistent",
        "PYTHONPATH": "/nonexistent",
        "PYTHONHOME": "",
        "LC_ALL": "",
        "EMPTY": "",
        "BYTES": "\udcff",
    }
    for name in ("LANG", "LC_CTYPE"):
        env.pop(name, None)
    found = []
    for program in (fake, CLIPSHIM):
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "dump").unlink()
        done = subprocess.run(
            [program, *words],
            env=env,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: signal.signal(signal.SIGINT, interrupt) and None,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        found.append(json.loads((tmp_path / "dump").read_text()))
    assert found[1] == found[0]
    node.stop()


def test_the_daemon_holds_none_of_the_callers_descriptors(
    make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    node = make_node()
    path = bundle(["/bin/sh", "-c", "echo through >&3"])
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    words = [CLIPSHIM, "--root", tmp_path / "root", "run", "--preserve-fds", "1", "-b", path, "box"]
    try:
        done = subprocess.run(
            ["bash", "-c", f'exec "$@" 3>&{write_end} {write_end}>&-', "bash", *map(str, words)],
            env=node.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
            pass_fds=[write_end],
            check=False,
        )
    finally:
        os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        assert pipe.read() == b"through\n"  # to its end: nobody else has it open
    assert (done.returncode, done.stderr) == (0, b"")
    assert node.ping() is not None, "the first create has started a daemon"


def test_signals_reach_the_container(
    node: Node, runtime: Runtime, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    words = runtime.command("run", "-b", bundle(LOOP), "box")
    running = subprocess.Popen(
        words, env=runtime.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    wait_for("it runs", lambda: runtime("exec", "box", "/bin/ls", "/ready", check=False).stdout)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 7
    assert_clean(node)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGPWR", "SIGTSTP", "SIGRTMIN+3"])
def test_every_signal_is_passed_on_as_by_runc(
    name: str, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    first, _, offset = name.partition("+")
    number = signal.Signals[first] + int(offset or 0)
    script = f"trap 'exit 9' {number}; echo ready >/ready; while :; do sleep 0.1; done"
    running = subprocess.Popen(
        runtime.command("run", "-b", bundle(["/bin/sh", "-c", script]), "box"),
        env=runtime.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    wait_for("it runs", lambda: runtime("exec", "box", "/bin/ls", "/ready", check=False).stdout)
    running.send_signal(number)
    assert running.wait(timeout=60) == 9


def test_sockets_that_are_passed_reach_the_container(
    runtime: Runtime, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """As systemd and conmon pass them: LISTEN_PID names the process that they start."""
    (tmp_path / "passed").write_text("from descriptor 3\n")
    script = "echo $LISTEN_FDS $LISTEN_PID; cat <&3"
    words = runtime.command("run", "-b", bundle(["/bin/sh", "-c", script]), "box")
    start = f'exec 3<"{tmp_path}/passed"; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
    done = subprocess.run(
        ["bash", "-c", start, "bash", *map(str, words)],
        env=runtime.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 1\nfrom descriptor 3\n", "")


def test_a_config_that_is_no_utf_8_is_read_as_runc_reads_it(
    runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    path = bundle(["/bin/sh", "-c", "ls /bin/busybox; echo $ODD"])
    raw = (path / "config.json").read_bytes().replace(b'"env": [', b'"env": ["ODD=\xff\xfe",', 1)
    (path / "config.json").write_bytes(raw)
    done = runtime("run", "-b", path, "box")
    assert done.stdout == "/bin/busybox\n\ufffd\ufffd\n"
    assert (path / "config.json").read_bytes() == raw

"""What a test run left on the machine: found by the run's marks, reported, removed.

Every run has a root directory /var/tmp/clipshim-test-<id> and puts CLIPSHIM_TEST_RUN=<id> into the
environment of all it starts. Only what carries these marks counts: mounts below the root,
processes with the mark (or with a path below the root in their environment or command line),
loop devices backed by files below it, cgroups named after it. So nothing else on the machine, and
no second run, can disturb the check. Not for the leftovers of the product: those are its own
`gc`'s. Standard library only: tests/run.sh calls it before there is an environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PARENT = Path("/var/tmp")  # persistent and on a disk: overlayfs needs that
PREFIX = "clipshim-test-"
MNT_DETACH = 2  # linux/fs.h
_LIBC = ctypes.CDLL(None, use_errno=True)


class Leftovers(NamedTuple):
    """Descriptions of what was found, by kind; empty lists if nothing was."""

    processes: list[str]
    mounts: list[str]
    loops: list[str]
    cgroups: list[str]

    def lines(self) -> list[str]:
        """One line a thing."""
        return [
            f"{kind}: {item}"
            for kind, items in zip(("process", "mount", "loop device", "cgroup"), self, strict=True)
            for item in items
        ]


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # the process is gone
        return b""


def _ancestors() -> set[int]:
    pids, pid = set(), os.getpid()
    while pid > 1 and pid not in pids:
        pids.add(pid)
        stat = _read(f"/proc/{pid}/stat")
        pid = int(stat.rpartition(b")")[2].split()[1]) if stat else 0
    return pids


def start_time(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; None if it is gone or a zombie."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return int(fields[19]) if len(fields) > 19 and fields[0] not in (b"Z", b"X") else None


def environment_and_arguments(pid: int) -> tuple[list[bytes], list[bytes]]:
    """What a process was started with; empty if it is gone, or a thread of the kernel.

    In the middle of execve(2) it has neither for a moment: whoever kills what has a mark would
    miss a child that is just being started.
    """
    end = time.monotonic() + 10
    while True:
        environment = _read(f"/proc/{pid}/environ")
        arguments = _read(f"/proc/{pid}/cmdline")
        if environment or arguments or not _has_program(pid) or time.monotonic() > end:
            return environment.split(b"\0"), arguments.split(b"\0")
        time.sleep(0.005)


def _has_program(pid: int) -> bool:
    try:
        os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return False
    return True


def _belongs(pid: int, root: bytes, run: bytes | None) -> bool:
    environment, arguments = environment_and_arguments(pid)
    if run is not None and b"CLIPSHIM_TEST_RUN=" + run in environment:
        return True
    below = root + b"/"
    if any(below in entry for entry in environment):
        return True
    if any(below in word for word in arguments):
        return True
    # A process in a container: its root is an overlay over, or a directory in, the run's root.
    for line in _read(f"/proc/{pid}/mountinfo").splitlines():
        if line.split(b" ", 5)[4] == b"/":
            return below in line
    return False


def processes_of(root: Path) -> list[int]:
    """Live processes of the run, without this one and its ancestors."""
    return _processes(root, os.fsencode(root.name).removeprefix(PREFIX.encode()))


def processes_below(directory: Path) -> list[int]:
    """Live processes that name, or have their root, below a directory of the run."""
    return _processes(directory, None)


def _processes(root: Path, run: bytes | None) -> list[int]:
    mine = _ancestors()
    return [
        pid
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit())
        if pid not in mine and start_time(pid) is not None and _belongs(pid, os.fsencode(root), run)
    ]


def _unescape(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def mounts_below(root: Path) -> list[str]:
    """Mount points at or below `root`, the innermost last."""
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        points = [_unescape(line.split(" ", 5)[4]) for line in file]
    return [point for point in points if point == str(root) or point.startswith(f"{root}/")]


def _loops_below(root: Path) -> list[str]:
    found = []
    for name in os.listdir("/sys/block"):
        backing = _read(f"/sys/block/{name}/loop/backing_file")
        if os.fsencode(root) + b"/" in backing:
            found.append(f"/dev/{name}")
    return found


def remove_cgroup_parent(root: Path) -> None:
    """Removes the run's own cgroup, under which its containers had theirs, if it is empty."""
    # os.walk, unlike glob, does not mind that other runs' cgroups vanish meanwhile
    for directory, subdirectories, _ in os.walk("/sys/fs/cgroup"):
        if root.name in subdirectories:
            with contextlib.suppress(OSError):  # not empty: that is what the check is about
                os.rmdir(os.path.join(directory, root.name))


def _cgroups_named(name: str) -> list[str]:
    """Cgroup directories named after the run, the innermost first."""
    found = []
    base = Path("/sys/fs/cgroup")
    for directory, subdirectories, _ in os.walk(base, topdown=False):
        del subdirectories
        if name in directory:
            found.append(directory)
    return found


def _describe(pid: int) -> str:
    command = _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace")
    return f"{pid} {command[:300]}"


def look(root: Path) -> Leftovers:
    """What the run of this root has on the machine now."""
    return Leftovers(
        [_describe(pid) for pid in processes_of(root)],
        mounts_below(root),
        _loops_below(root),
        _cgroups_named(root.name),
    )


def wait_until_gone(root: Path, deadline_s: float) -> Leftovers:
    """Looks until nothing is left or the deadline has passed; answers what is left then."""
    end = time.monotonic() + deadline_s
    while True:
        remove_cgroup_parent(root)
        left = look(root)
        if not left.lines() or time.monotonic() > end:
            return left
        time.sleep(0.2)


def unmount_below(root: Path) -> None:
    """Detaches every mount at or below `root`."""
    for _ in range(50):
        points = mounts_below(root)
        if not points:
            return
        for point in reversed(points):
            _LIBC.umount2(os.fsencode(point), MNT_DETACH)


def kill_processes(
    root: Path, find: Callable[[Path], list[int]] = processes_of, deadline_s: float = 30
) -> None:
    """Kills the run's processes and waits until they are gone."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        pids = find(root)
        if not pids:
            return
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


def remove(root: Path) -> None:
    """Kills, unmounts and deletes everything below a run's root; never raises."""
    kill_processes(root)
    unmount_below(root)
    for cgroup in _cgroups_named(root.name):
        try:
            os.rmdir(cgroup)
        except OSError:
            continue
    if mounts_below(root):  # never delete through a mount: it may show something else
        print(f"{root}: still has mounts, not removed", file=sys.stderr)
        return
    for attempt in range(5):
        shutil.rmtree(root, ignore_errors=True)
        if not root.exists():
            return
        time.sleep(0.2 * (attempt + 1))


def _abandoned() -> Iterator[Path]:
    for root in PARENT.glob(f"{PREFIX}*"):
        try:
            pid, started = (int(word) for word in (root / "owner").read_text().split())
        except (OSError, ValueError):
            # No owner yet: a run that is just starting, or one that died there.
            if time.time() - root.lstat().st_mtime > 60:
                yield root
            continue
        if start_time(pid) != started:
            yield root


def sweep() -> None:
    """Removes what runs have left whose owner is gone."""
    for root in list(_abandoned()):
        if root.is_dir() and not root.is_symlink():
            print(f"removing what an earlier run left: {root}")
            remove(root)


def main() -> int:
    """`sweep`, or `remove ROOT`."""
    if sys.argv[1:] == ["sweep"]:
        sweep()
        return 0
    if len(sys.argv) == 3 and sys.argv[1] == "remove":
        root = Path(sys.argv[2])
        if root.parent != PARENT or not root.name.startswith(PREFIX):
            print(f"{root}: not the root of a test run", file=sys.stderr)
            return 2
        remove(root)
        return 0
    print("usage: leftovers.py sweep | remove ROOT", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

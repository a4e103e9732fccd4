"""Moves the daemon out of the cgroup of whoever started it, which may be throttled or removed.

Versions 1 and 2 of cgroups. Best effort: a daemon in a wrong cgroup still serves. Standard
library only.
"""

import contextlib
import logging
import os

log = logging.getLogger(__name__)

NAME = "clipshim"


def parse_cgroups(text: str) -> list[tuple[str, str]]:
    """(controllers, path) for each line of /proc/PID/cgroup; no controllers means version 2."""
    entries = []
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        entries.append((controllers, path))
    return entries


def move_self(root: str = "/sys/fs/cgroup") -> None:
    """Moves this process into /clipshim of every hierarchy it can."""
    with open("/proc/self/cgroup", encoding="utf-8") as file:
        entries = parse_cgroups(file.read())
    for controllers, path in entries:
        if path == f"/{NAME}":
            continue
        for base in _candidates(root, controllers):
            with contextlib.suppress(OSError):
                _join(f"{base}/{NAME}", controllers)
                break
        else:
            log.debug("stays in cgroup %s of %s", path, controllers or "version 2")


def remove(root: str = "/sys/fs/cgroup") -> None:
    """Leaves the cgroups that move_self made and removes them, unless others are in them."""
    with open("/proc/self/cgroup", encoding="utf-8") as file:
        entries = parse_cgroups(file.read())
    for controllers, path in entries:
        if path != f"/{NAME}":
            continue
        for base in _candidates(root, controllers):
            with contextlib.suppress(OSError):
                with open(f"{base}/cgroup.procs", "r+") as file:  # never creates one
                    file.write(str(os.getpid()))
                os.rmdir(f"{base}/{NAME}")


def _candidates(root: str, controllers: str) -> list[str]:
    if not controllers:
        return [root, f"{root}/unified"]
    return [f"{root}/{controllers.removeprefix('name=')}"]


def _join(directory: str, controllers: str) -> None:
    if not os.path.exists(f"{os.path.dirname(directory)}/cgroup.procs"):
        raise FileNotFoundError(directory)
    os.makedirs(directory, exist_ok=True)
    if "cpuset" in controllers.split(","):  # version 1: an empty cpuset takes no processes
        for name in ("cpuset.cpus", "cpuset.mems"):
            with open(f"{os.path.dirname(directory)}/{name}") as parent:
                value = parent.read()
            with open(f"{directory}/{name}", "w") as file:
                file.write(value)
    with open(f"{directory}/cgroup.procs", "r+") as file:  # a cgroup has one; tmpfs has none
        file.write(str(os.getpid()))

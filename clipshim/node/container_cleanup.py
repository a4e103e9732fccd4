"""Finds and removes what crashed creates and deletes left: container directories, upper, mounts.

Runs as a process of its own (`python -I -m clipshim.node.container_cleanup`), because taking down
a rootfs touches trees that the server serves. Writes one JSON object a line to stdout. Never
touches a container that its runtime still knows, or that a verb is working on: a container's lock
is held while it is looked at and taken down. In doubt everything stays.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from clipshim.errors import ClipError
from clipshim.node.kept_settings import settings_of_daemon
from clipshim.settings import Settings
from clipshim.shim import teardown
from clipshim.shim.state import ContainerLock, is_valid_id, list_states, load_state


@dataclass(frozen=True)
class Victim:
    """Something to remove."""

    key: str  # of the container
    kind: str  # container, unfinished or orphan
    detail: str


def candidates(settings: Settings) -> list[str]:
    """The keys of all that may be garbage: directories of containers, upper and work."""
    keys = set(list_states(settings))
    for parent in ("upper", "work"):
        try:
            names = os.listdir(f"{settings.state_dir}/{parent}")
        except FileNotFoundError:
            continue
        keys.update(name for name in names if is_valid_id(name))
    return sorted(keys)


def judge(settings: Settings, key: str) -> Victim | None:
    """What is to be removed of a container whose lock is held; None if it lives or may live."""
    try:
        state = load_state(settings, key)
    except ClipError:
        return None  # unreadable: where its runtime keeps it is unknown, so it may run
    if state is None:
        left = [p for p in (settings.upper_dir(key), settings.work_dir(key)) if os.path.lexists(p)]
        if left:
            return Victim(key, "orphan", ", ".join(left))
        return Victim(key, "unfinished", settings.container_dir(key))
    if not state.is_gone() or state.is_checkpointed:
        return None
    return Victim(key, "container", f"{state.text('id')}: {state.runtime_directory} is gone")


def remove(settings: Settings, victim: Victim) -> None:
    """Takes a victim down; its lock is held. Raises OSError."""
    state = load_state(settings, victim.key)
    if state is not None:
        teardown.tear_down(settings, state)
        return
    directory = settings.container_dir(victim.key)
    for name in ("lower", "layers", "rootfs"):
        teardown.unmount_all(f"{directory}/{name}")
    for path in (settings.upper_dir(victim.key), settings.work_dir(victim.key)):
        teardown.remove_tree(path)
    teardown.forget(settings, directory)


def clean(settings: Settings, *, dry_run: bool) -> Iterator[dict[str, str]]:
    """One report for each victim."""
    for key in candidates(settings):
        made = not os.path.lexists(settings.container_dir(key))
        try:
            with ContainerLock(settings, key, wait_s=0.0):
                victim = judge(settings, key)
                if victim is not None and not dry_run:
                    remove(settings, victim)
                elif made:  # by the lock
                    teardown.forget(settings, settings.container_dir(key))
        except ClipError:
            continue  # a verb is working on it
        except OSError as exc:
            yield {"key": key, "kind": "error", "detail": str(exc)}
            continue
        if victim is not None:
            yield {"key": key, "kind": victim.kind, "detail": victim.detail}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    try:
        for report in clean(settings_of_daemon(), dry_run=options.dry_run):
            sys.stdout.write(json.dumps(report) + "\n")
    except (ClipError, OSError) as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

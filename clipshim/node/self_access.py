"""A guard for tests: the server must not touch its own mounts, or it waits for itself for ever.

Active only with CLIPSHIM_DEBUG_SELF_ACCESS in the environment. It sees what Python opens, lists
and looks at, by names below the mounts; not what C code does, nor names relative to descriptors.
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from clipshim.settings import Settings

DEBUG_ENV = "CLIPSHIM_DEBUG_SELF_ACCESS"
MARK = "SERVER TOUCHES ITS OWN MOUNT"
# without an audit event of their own in Python 3.11
_SILENT = ("stat", "lstat", "statvfs", "readlink", "access")


class SelfAccessError(Exception):
    """No OSError and no ClipError, so that nobody takes it for an ordinary failure."""


def is_own(path: object, settings: Settings) -> bool:
    """Whether a path is, or lies below, the layers mount or the mount point of a tree."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        return False
    name = os.path.abspath(os.fsdecode(path))
    if name == settings.layers_mount or name.startswith(settings.layers_mount + "/"):
        return True
    trees = f"{settings.state_dir}/mnts/"
    return name.startswith(trees) and "/" in name[len(trees) :]


def forbid(settings: Settings) -> None:
    """Has every such access raise SelfAccessError, and say so on stderr, in this process."""

    def refuse(what: str, path: object) -> None:
        if is_own(path, settings):
            stack = "".join(traceback.format_stack(limit=12)).replace("\n", " | ")
            sys.stderr.write(f"{MARK}: {what} {path!r}: {stack}\n")
            raise SelfAccessError(f"{what} {path!r}")

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        # making a mount point does not look at what is mounted there
        if (event == "open" or event.startswith("os.")) and event != "os.mkdir" and arguments:
            refuse(event, arguments[0])

    def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if options.get("dir_fd") is None:
                refuse(name, path)
            return function(path, *arguments, **options)

        return call

    for name in _SILENT:
        setattr(os, name, guarded(name, getattr(os, name)))
    sys.addaudithook(audit)

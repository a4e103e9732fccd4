"""Which programs the tests call as runc, containerd, Docker and podman.

The distribution's, unless $CLIPSHIM_TEST_PROGRAMS names a directory that holds others of the same
names: so the engines' tests run against engines that were built from source. Not for tools that
are not under test.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

DIRECTORY = os.environ.get("CLIPSHIM_TEST_PROGRAMS", "")


def program(usual: str) -> Path:
    """The program to call for the one that Debian 12 has at `usual`, others maybe elsewhere."""
    name = os.path.basename(usual)
    other = Path(DIRECTORY, name)
    if DIRECTORY and other.exists():
        return other
    return Path(usual if os.path.exists(usual) else shutil.which(name) or usual)


def search_path() -> str:
    """A PATH on which engines find the shims and helpers that belong to them."""
    return ":".join(filter(None, (DIRECTORY, os.environ.get("PATH", ""))))

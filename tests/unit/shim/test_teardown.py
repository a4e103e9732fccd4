"""Removing what a container has written, whatever it is."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

import pytest

from clipshim.shim import teardown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """As many as a process needs that has 100 open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few_descriptors")
def test_a_tree_is_removed_however_deep(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    # names that the removal itself would like to use
    for name in (".clipshim-0", ".clipshim-2"):
        os.mkdir(name, dir_fd=here)
        os.close(os.open(f"{name}/file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(os.open(".clipshim-1", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    for _ in range(500):
        for name in ("down", "empty"):
            os.mkdir(name, dir_fd=here)
        os.symlink("/", "link", dir_fd=here)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        below = os.open("down", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    before = len(os.listdir("/proc/self/fd"))
    teardown.remove_tree(str(top))
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_not_there_is_removed(tmp_path: Path) -> None:
    teardown.remove_tree(str(tmp_path / "nothing"))


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    (tmp_path / "top").symlink_to("kept")
    with pytest.raises(OSError, match="top"):
        teardown.remove_tree(str(tmp_path / "top"))
    assert (tmp_path / "kept/file").exists()

"""Whether a range is in the page cache."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

from clipshim.lazy import page_cache
from tests.support.skips import kernel_cannot

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_what_was_just_written_is_cached_and_a_hole_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    os.truncate(path, 1 << 20)
    with path.open("rb") as file:
        fd = file.fileno()
        cached = page_cache.is_cached(fd, 100, 5000)
        if not page_cache._known:
            kernel_cannot("cachestat, Linux 6.5")
        assert cached
        assert not page_cache.is_cached(fd, 4096, 100_000)
        assert not page_cache.is_cached(fd, 0, 0)
    assert not page_cache.is_cached(fd, 0, 10)  # closed


def test_a_kernel_that_does_not_know_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def unknown(*_: object) -> int:
        asked.append(1)
        ctypes.set_errno(errno.ENOSYS)
        return -1

    monkeypatch.setattr(page_cache, "_syscall", unknown)
    monkeypatch.setattr(page_cache, "_known", True)
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with path.open("rb") as file:
        assert not page_cache.is_cached(file.fileno(), 0, 1)
        assert not page_cache.is_cached(file.fileno(), 0, 1)
    assert len(asked) == 1

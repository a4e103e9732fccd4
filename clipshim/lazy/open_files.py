"""A bounded number of open files, the least recently used closed first.

A descriptor in use is never closed: its number could name another layer's file a moment later.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class _OpenFile:
    __slots__ = ("fd", "stale", "users")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 0
        self.stale = False


class OpenFiles:
    """Descriptors by path, read-write where the disk is, never through links. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def using(self, path: str) -> Iterator[int]:
        """The descriptor of an existing file, valid inside the with block."""
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = _OpenFile(_open(path))
                self._files[path] = file
                file.users = 1
                self._trim()
            else:
                self._files.move_to_end(path)
                file.users += 1
        try:
            yield file.fd
        finally:
            with self._lock:
                file.users -= 1
                if file.stale and not file.users:
                    os.close(file.fd)

    def forget(self, path: str) -> None:
        """The path is about to mean another file, or none."""
        with self._lock:
            file = self._files.pop(path, None)
            if file:
                self._drop(file)

    def close(self) -> None:
        """Closes everything, what is in use as soon as it is not."""
        with self._lock:
            while self._files:
                self._drop(self._files.popitem()[1])

    def __len__(self) -> int:
        return len(self._files)

    def _trim(self) -> None:
        excess = len(self._files) - self._limit
        if excess > 0:
            idle = [path for path, file in self._files.items() if not file.users]
            for path in idle[:excess]:
                self._drop(self._files.pop(path))

    @staticmethod
    def _drop(file: _OpenFile) -> None:
        file.stale = True
        if not file.users:
            os.close(file.fd)


def _open(path: str) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, os.O_RDWR | flags)
    except OSError as exc:
        if exc.errno != errno.EROFS:
            raise
        return os.open(path, os.O_RDONLY | flags)  # what is cached can still be read


def raise_descriptor_limit() -> int:
    """Raises this process's soft limit of descriptors to the hard one, and returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft

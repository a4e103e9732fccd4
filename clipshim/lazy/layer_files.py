"""The files of one layer in the layer store: making, marking, syncing, punching, removing them.

Not for what the bits mean or when to write them: stored_layer.py does, under its lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from clipshim.lazy.open_files import OpenFiles

log = logging.getLogger(__name__)

HEADER = struct.Struct("<8sQQ")  # magic, number of spans, size of the layer
MAGIC = b"CLIPSPN1"
FALLOC_FL_KEEP_SIZE = 0x01  # linux/falloc.h
FALLOC_FL_PUNCH_HOLE = 0x02
NAMES = ("complete", "spans", "boot", "data", "complete.new", "boot.new")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CREATE = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class DamageError(Exception):
    """The files contradict the layer or each other."""


class Loaded(NamedTuple):
    """What was found: the bitmap, and what the boot file says."""

    bits: bytes
    complete: bool
    boot_id: str
    clean: bool


class LayerFiles:
    """The directory of a layer with `count` spans and `size` bytes."""

    def __init__(
        self, directory: str, size: int, count: int, files: OpenFiles, boot_id: str
    ) -> None:
        self.directory = directory
        self.data_path = f"{directory}/data"
        self._bits_path = f"{directory}/spans"
        self._size = size
        self._count = count
        self._files = files
        self._boot_id = boot_id

    def load(self) -> Loaded | None:
        """What is there; None if nothing is. Raises DamageError, OSError."""
        length = (self._count + 7) // 8
        try:
            with open(self._bits_path, "rb", opener=_no_follow) as file:
                raw = file.read(HEADER.size + length + 1)
            data_size = os.lstat(self.data_path).st_size
        except FileNotFoundError:
            if os.path.lexists(self.directory):
                self.remove()
            return None
        bits = raw[HEADER.size :]
        if raw[: HEADER.size] != self._header() or len(bits) != length:
            raise DamageError("bitmap: expected another header or size")
        spare = -self._count % 8
        if spare and bits[-1] >> (8 - spare):
            raise DamageError("bitmap: bits beyond the last span are set")
        if data_size != self._size:
            raise DamageError(f"data file: expected {self._size} bytes, got {data_size}")
        complete = os.path.lexists(f"{self.directory}/complete")
        return Loaded(bits, complete, *self._read_boot())

    def create(self, bits: bytes | bytearray) -> None:
        """Makes the files; the bitmap comes last, without it there is nothing."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.directory, 0o700)
        fd = os.open(self.data_path, _CREATE, 0o600)
        try:
            os.ftruncate(fd, self._size)
        finally:
            os.close(fd)
        self.write_boot(clean=False, durable=False)
        _write(self._bits_path, self._header() + bits)

    def write_bits(self, bits: bytes | bytearray, at: int = 0) -> None:
        """Changes the bitmap from byte `at`: visible to a later process, not yet on the disk."""
        with self._files.using(self._bits_path) as fd:
            os.pwrite(fd, bits, HEADER.size + at)

    def sync(self) -> None:
        """Brings data, then bitmap, to the disk. Raises OSError."""
        with self._files.using(self.data_path) as fd:
            os.fdatasync(fd)
        with self._files.using(self._bits_path) as fd:
            os.fdatasync(fd)

    def write_boot(self, *, clean: bool, durable: bool) -> None:
        """Notes that the marks are of this boot, and whether all of them are on the disk."""
        content = json.dumps({"boot_id": self._boot_id, "clean": clean}).encode()
        path = f"{self.directory}/boot"
        if durable:
            _write_durably(path, content)
        else:
            _write(path, content)

    def write_unclean(self) -> None:
        """Takes back, durably, that all is on the disk; where there is no room, by a removal."""
        try:
            self.write_boot(clean=False, durable=True)
        except OSError as exc:
            if exc.errno not in FULL:
                raise
            for name in ("boot.new", "boot"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{self.directory}/{name}")
            _sync_directory(self.directory)

    def write_complete(self) -> None:
        """Says, durably, that the layer is whole and checked. The data must be synced."""
        _write_durably(f"{self.directory}/complete", b"")

    def remove_complete(self, bits: bytes | bytearray) -> None:
        """Takes that back, durably; `bits` is what still is there."""
        self.write_bits(bits)
        with self._files.using(self._bits_path) as fd:
            os.fdatasync(fd)
        self.write_unclean()
        os.unlink(f"{self.directory}/complete")
        _sync_directory(self.directory)

    def punch(self, offset: int, size: int) -> None:
        """Gives the disk space of a range of the data back."""
        try:
            with self._files.using(self.data_path) as fd:
                mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
                if size and _libc.fallocate(fd, mode, offset, size):
                    number = ctypes.get_errno()
                    log.warning("%s: fallocate: %s", self.data_path, os.strerror(number))
        except FileNotFoundError:
            return
        except OSError as exc:  # out of descriptors: the space comes back with the layer's file
            log.warning("%s: %s", self.data_path, exc.strerror)

    def forget(self) -> None:
        """The descriptors are not needed for now."""
        for name in NAMES:
            self._files.forget(f"{self.directory}/{name}")

    def remove(self) -> None:
        """Deletes the files, the bitmap before the data; the directory stays."""
        self.forget()
        for name in NAMES:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.directory}/{name}")

    def _header(self) -> bytes:
        return HEADER.pack(MAGIC, self._count, self._size)

    def _read_boot(self) -> tuple[str, bool]:
        try:
            with open(f"{self.directory}/boot", "rb", opener=_no_follow) as file:
                content = json.loads(file.read(4096))
            return str(content["boot_id"]), content["clean"] is True
        except (OSError, ValueError, KeyError, TypeError):
            return "", False


def remove_layer(directory: str, files: OpenFiles) -> None:
    """Deletes the directory of a layer that nobody has open."""
    LayerFiles(directory, 0, 0, files, "").remove()
    try:
        os.rmdir(directory)
    except OSError as exc:
        if exc.errno != errno.ENOENT:
            log.warning("layer store: %s: %s", directory, exc.strerror)


def _no_follow(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def _write(path: str, content: bytes, *, sync: bool = False) -> None:
    fd = os.open(path, _CREATE, 0o600)
    try:
        view = memoryview(content)
        while view:  # a disk that gets full in the middle writes less, and says why the next time
            view = view[os.write(fd, view) :]
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def _write_durably(path: str, content: bytes) -> None:
    temporary = f"{path}.new"
    _write(temporary, content, sync=True)
    os.rename(temporary, path)
    _sync_directory(os.path.dirname(path))


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

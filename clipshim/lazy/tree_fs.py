"""Mode fuse: a whole tree as a FUSE file system, straight from the EROFS image in the index.

Nothing is parsed at mount and nothing has state: a node's number comes from the image and there
are no handles, so a process that is killed can be replaced. File data is read from the layer files
(the layers mount, or a complete layer's file in the store). Answers requests; talking to the
kernel is tree_session.py's. Not for fetching. Standard library only.
"""

from __future__ import annotations

import errno
import os
import threading
from functools import lru_cache
from typing import TYPE_CHECKING

from clipshim.errors import LayerError
from clipshim.lazy import fuse_wire as wire
from clipshim.lazy.page_cache import is_cached

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from clipshim.index.erofs_read import ErofsImage

DIRECTORIES_CACHED = 64  # long ones are listed in many requests
FIRST_NID = 2  # node number of nid 0: 1 is the root's, 0 means "none" to FUSE
BLOCK = 512
NAME_MAX = 255
DT_DIR = 4  # dirent.h

Extent = tuple[int, int, int]  # device, offset, bytes


class TreeFileSystem:
    """Answers FUSE requests from an ErofsImage and the files of its devices (device 1 first)."""

    def __init__(
        self, image: ErofsImage, device_paths: Sequence[str], *, no_opendir: bool = False
    ) -> None:
        """`no_opendir`: the kernel can be told never to ask for OPENDIR (Linux 5.1+).

        Raises LayerError if there are not as many files as the image has devices.
        """
        if len(device_paths) != image.device_count:
            raise LayerError(
                f"tree: expected {image.device_count} layer files, got {len(device_paths)}"
            )
        self._image = image
        self._paths = list(device_paths)
        self._fds: list[int | None] = [None] * len(device_paths)
        self._nowait = [hasattr(os, "RWF_NOWAIT")] * len(device_paths)
        self._no_opendir = no_opendir
        self._entries = lru_cache(DIRECTORIES_CACHED)(self._list)
        self._opening = threading.Lock()
        # opcode → answers a node's number and what follows a request's header with a body
        self.handlers: dict[int, Callable[[int, memoryview], bytes | bytearray]] = {
            wire.LOOKUP: self._lookup,
            wire.GETATTR: self._getattr,
            wire.READLINK: self._readlink,
            wire.OPEN: self._open,
            wire.STATFS: self._statfs,
            wire.RELEASE: self._nothing_to_do,
            wire.GETXATTR: self._getxattr,
            wire.LISTXATTR: self._listxattr,
            wire.OPENDIR: self._opendir,
            wire.READDIR: self._readdir,
            wire.RELEASEDIR: self._nothing_to_do,
            wire.DESTROY: self._nothing_to_do,
            wire.READDIRPLUS: self._readdirplus,
        }

    def close(self) -> None:
        """Closes the layer files."""
        for number, fd in enumerate(self._fds):
            if fd is not None:
                os.close(fd)
                self._fds[number] = None

    # -- metadata

    def _nid(self, node: int) -> int:
        return self._image.root_nid if node == wire.ROOT else node - FIRST_NID

    def _node(self, nid: int) -> int:
        return wire.ROOT if nid == self._image.root_nid else nid + FIRST_NID

    def _attributes(self, nid: int) -> bytes:
        found = self._image.stat(nid)
        seconds, nanoseconds = divmod(found.mtime_ns, 1_000_000_000)
        return wire.ATTRIBUTES.pack(
            self._node(nid),
            found.size,
            (found.size + BLOCK - 1) // BLOCK,
            seconds,
            seconds,
            seconds,
            nanoseconds,
            nanoseconds,
            nanoseconds,
            found.mode,
            found.nlink,
            found.uid,
            found.gid,
            found.rdev,
            4096,
        )

    def _lookup(self, node: int, body: memoryview) -> bytes:
        nid = self._image.lookup(self._nid(node), bytes(body[:-1]))
        if nid is None:
            return wire.NO_ENTRY
        return wire.entry(self._node(nid), self._attributes(nid))

    def _getattr(self, node: int, body: memoryview) -> bytes:
        return wire.ATTR_OUT_HEAD.pack(wire.FOREVER_S, 0) + self._attributes(self._nid(node))

    def _readlink(self, node: int, body: memoryview) -> bytes:
        return self._image.readlink(self._nid(node))

    def _getxattr(self, node: int, body: memoryview) -> bytes:
        name = bytes(body[wire.XATTR_IN.size : -1])
        value = self._image.xattrs(self._nid(node)).get(name)
        if value is None:
            raise wire.Refusal(errno.ENODATA)
        return _sized(value, body)

    def _listxattr(self, node: int, body: memoryview) -> bytes:
        names = self._image.xattrs(self._nid(node))
        return _sized(b"".join(name + b"\0" for name in names), body)

    def _opendir(self, node: int, body: memoryview) -> bytes:
        if self._no_opendir:
            # The kernel then opens directories itself from now on and keeps their listings.
            raise wire.Refusal(errno.ENOSYS)
        return wire.OPEN_OUT.pack(0, wire.KEEP_CACHE | wire.CACHE_DIR)

    def _list(self, nid: int) -> list[tuple[bytes, int, int]]:
        image = self._image
        parent = image.lookup(nid, b"..")
        dots = [
            (b".", nid, DT_DIR),
            (b"..", image.root_nid if parent is None else parent, DT_DIR),
        ]
        return dots + image.readdir(nid)

    def _readdir(self, node: int, body: memoryview) -> bytearray:
        return self._listing(node, body, plus=False)

    def _readdirplus(self, node: int, body: memoryview) -> bytearray:
        return self._listing(node, body, plus=True)

    def _listing(self, node: int, body: memoryview, *, plus: bool) -> bytearray:
        # In the order of the image; positions are places in it.
        _, start, size = wire.READ_IN.unpack_from(body)
        entries = self._entries(self._nid(node))
        listing = bytearray()
        for position in range(start, len(entries)):
            name, nid, kind = entries[position]
            number = self._node(nid)
            item = wire.dirent(number, position + 1, kind, name)
            if plus:
                # "." and ".." make no node in the kernel
                found = wire.entry(number, self._attributes(nid)) if position > 1 else wire.NO_ENTRY
                item = found + item
            if len(listing) + len(item) > size:
                break
            listing += item
        return listing

    def _statfs(self, node: int, body: memoryview) -> bytes:
        blocks = sum(self._image.device_blocks()) + self._image.length // BLOCK
        # nothing is free
        return wire.STATFS_OUT.pack(
            blocks, 0, 0, self._image.inode_count, 0, BLOCK, NAME_MAX, BLOCK
        )

    def _nothing_to_do(self, node: int, body: memoryview) -> bytes:
        return b""

    # -- data

    def _open(self, node: int, body: memoryview) -> bytes:
        # The kernel opens files itself from now on and keeps what it has cached of them. It never
        # asks for writing: the mount is read-only.
        raise wire.Refusal(errno.ENOSYS)

    def extents(self, node: int, body: memoryview) -> list[Extent]:
        """Where the bytes lie that a READ asks for; see ErofsImage.extents."""
        _, offset, size = wire.READ_IN.unpack_from(body)
        return self._image.extents(self._nid(node), offset, size)

    def read_without_waiting(self, extents: Sequence[Extent]) -> bytearray | None:
        """The bytes, if all of them can be had without waiting for a layer's server."""
        pieces = []
        for device, offset, length in extents:
            piece = self._without_waiting(device, offset, length)
            if piece is None:
                return None
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else bytearray().join(pieces)

    def read(self, extents: Sequence[Extent]) -> bytearray:
        """The bytes. Waits for as long as the layers' server does; for threads."""
        pieces = [self._extent(*extent) for extent in extents]
        return pieces[0] if len(pieces) == 1 else bytearray().join(pieces)

    def _inside(self, device: int, offset: int, length: int) -> bytearray:
        if device < 0:
            return bytearray(length)
        return bytearray(self._image.buffer[offset : offset + length])

    def _without_waiting(self, device: int, offset: int, length: int) -> bytearray | None:
        if device <= 0:
            return self._inside(device, offset, length)
        number = device - 1
        fd = self._fds[number]
        if fd is None:
            return None  # opening waits too
        if not self._nowait[number]:
            return self._pread(number, offset, length) if is_cached(fd, offset, length) else None
        data = bytearray(length)
        try:
            if os.preadv(fd, [data], offset, os.RWF_NOWAIT) == length:
                return data
        except BlockingIOError:
            pass
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self._nowait[number] = False
        return None

    def _extent(self, device: int, offset: int, length: int) -> bytearray:
        if device <= 0:
            return self._inside(device, offset, length)
        return self._pread(device - 1, offset, length)

    def _pread(self, number: int, offset: int, length: int) -> bytearray:
        fd = self._fds[number]
        if fd is None:
            # Two threads may open the same file; the loser's descriptor is closed.
            opened = os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC)
            with self._opening:
                fd = self._fds[number]
                if fd is None:
                    fd = self._fds[number] = opened
                else:
                    os.close(opened)
        data = bytearray(length)
        view = memoryview(data)
        done = 0
        while done < length:
            count = os.preadv(fd, [view[done:]], offset + done)
            if not count:
                raise LayerError(
                    f"{self._paths[number]}: expected {length} bytes at {offset}, got {done}"
                )
            done += count
        return data


def _sized(value: bytes, body: memoryview) -> bytes:
    """What GETXATTR and LISTXATTR answer: the value, or its size if that is asked for."""
    (size,) = wire.XATTR_IN.unpack_from(body)
    if size == 0:
        return wire.XATTR_OUT.pack(len(value))
    if len(value) > size:
        raise wire.Refusal(errno.ERANGE)
    return value

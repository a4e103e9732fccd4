"""Mode fuse: a whole tree as a FUSE mount, straight from the EROFS image in the index.

Nothing is parsed at mount and nothing has state: inode numbers come from the image, handles are
inode numbers, so a process that is killed can be replaced. File data is read from the layer files
(the layers mount, or a complete layer's file in the store). Not for fetching.
"""

from __future__ import annotations

import errno
import os
import stat
from functools import lru_cache
from typing import TYPE_CHECKING

import pyfuse3
import trio

from clipshim.errors import LayerError
from clipshim.lazy.fuse_session import StatelessOperations, handler, volume
from clipshim.lazy.layers_fs import FOREVER_S
from clipshim.lazy.page_cache import is_cached

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clipshim.index.erofs_read import ErofsImage

ATTRIBUTES_CACHED = 32_768
DIRECTORIES_CACHED = 64
XATTRS_CACHED = 8_192
# Reads that wait for a layer's registry hold a thread each; each layer has its own.
THREADS_PER_LAYER = 32
FIRST_NID = 2  # inode number of nid 0: 1 is the root's, 0 means "none" to FUSE


class TreeOperations(StatelessOperations):
    """FUSE operations over an ErofsImage and the files of its devices (device 1 first)."""

    def __init__(self, image: ErofsImage, device_paths: Sequence[str]) -> None:
        """Raises LayerError if there are not as many files as the image has devices."""
        super().__init__()
        if len(device_paths) != image.device_count:
            raise LayerError(
                f"tree: expected {image.device_count} layer files, got {len(device_paths)}"
            )
        self._image = image
        self._paths = list(device_paths)
        self._fds: list[int | None] = [None] * len(device_paths)
        self._nowait = [hasattr(os, "RWF_NOWAIT")] * len(device_paths)
        self._limiters = [trio.CapacityLimiter(THREADS_PER_LAYER) for _ in device_paths]
        self._attributes = lru_cache(ATTRIBUTES_CACHED)(self._make_attributes)
        self._entries = lru_cache(DIRECTORIES_CACHED)(self._list)
        self._xattrs = lru_cache(XATTRS_CACHED)(image.xattrs)

    def close(self) -> None:
        """Closes the layer files."""
        for number, fd in enumerate(self._fds):
            if fd is not None:
                os.close(fd)
                self._fds[number] = None

    # -- metadata

    def _nid(self, inode: int) -> int:
        return self._image.root_nid if inode == pyfuse3.ROOT_INODE else inode - FIRST_NID

    def _inode(self, nid: int) -> int:
        return pyfuse3.ROOT_INODE if nid == self._image.root_nid else nid + FIRST_NID

    def _make_attributes(self, nid: int) -> pyfuse3.EntryAttributes:
        found = self._image.stat(nid)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(self._inode(nid))
        entry.st_mode = pyfuse3.ModeT(found.mode)
        entry.st_nlink = found.nlink
        entry.st_uid = found.uid
        entry.st_gid = found.gid
        entry.st_rdev = found.rdev
        entry.st_size = found.size
        entry.st_blocks = (found.size + 511) // 512
        entry.st_blksize = 4096
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = found.mtime_ns
        entry.entry_timeout = FOREVER_S
        entry.attr_timeout = FOREVER_S
        return entry

    def _list(self, nid: int) -> list[tuple[bytes, int]]:
        image = self._image
        parent = image.lookup(nid, b"..")
        dots = [(b".", nid), (b"..", image.root_nid if parent is None else parent)]
        return dots + [(name, child) for name, child, _ in image.readdir(nid)]

    @handler
    async def lookup(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """An entry; what is not there may be remembered by the kernel, the tree never changes."""
        nid = self._image.lookup(self._nid(parent_inode), name)
        return _nothing() if nid is None else self._attributes(nid)

    @handler
    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Attributes, with link counts, blocks and nanoseconds."""
        return self._attributes(self._nid(inode))

    @handler
    async def readlink(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileNameT:
        """A symbolic link's target."""
        return pyfuse3.FileNameT(self._image.readlink(self._nid(inode)))

    @handler
    async def getxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> bytes:
        """An extended attribute, security.capability among them."""
        value = self._xattrs(self._nid(inode)).get(name)
        if value is None:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return value

    @handler
    async def listxattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> Sequence[pyfuse3.XAttrNameT]:
        """The names of all extended attributes."""
        return [pyfuse3.XAttrNameT(name) for name in self._xattrs(self._nid(inode))]

    @handler
    async def opendir(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileHandleT:
        """The handle is the inode: it survives the process."""
        return pyfuse3.FileHandleT(inode)

    @handler
    async def readdir(
        self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        """In the order of the image; positions are places in it."""
        entries = self._entries(self._nid(fh))
        for position in range(start_id, len(entries)):
            name, nid = entries[position]
            attributes = self._attributes(nid)
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), attributes, position + 1):
                break

    @handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Sizes of the image; nothing is free."""
        size = 512 * sum(self._image.device_blocks()) + self._image.length
        return volume(size, self._image.inode_count)

    # -- data

    @handler
    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        """The handle is the inode: it survives the process."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        if not stat.S_ISREG(self._attributes(self._nid(inode)).st_mode):
            raise pyfuse3.FUSEError(errno.EINVAL)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    @handler
    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Bytes of a file, from wherever its extents say."""
        extents = self._image.extents(self._nid(fh), off, size)
        if len(extents) == 1:
            data = await self._extent(*extents[0])
        else:
            data = bytearray()
            for extent in extents:
                data += await self._extent(*extent)
        return data  # type: ignore[return-value]  # pyfuse3 takes any contiguous buffer

    async def _extent(self, device: int, offset: int, length: int) -> bytearray:
        if device < 0:
            return bytearray(length)
        if device == 0:
            return bytearray(self._image.buffer[offset : offset + length])
        number = device - 1
        fd = self._fds[number]
        if fd is not None:
            data = self._without_waiting(number, fd, offset, length)
            if data is not None:
                return data
        return await trio.to_thread.run_sync(
            self._pread, number, offset, length, limiter=self._limiters[number]
        )

    def _without_waiting(self, number: int, fd: int, offset: int, length: int) -> bytearray | None:
        if not self._nowait[number]:
            # A thread costs as much as the rest of the request.
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

    def _pread(self, number: int, offset: int, length: int) -> bytearray:
        fd = self._fds[number]
        if fd is None:
            # In the thread: opening waits for the server of the layers mount. Two threads may
            # open the same file; the loser's descriptor is closed.
            opened = os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC)
            if self._fds[number] is None:
                self._fds[number] = opened
            else:
                os.close(opened)
            fd = self._fds[number]
            assert fd is not None
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


def _nothing() -> pyfuse3.EntryAttributes:
    # Inode 0 is FUSE's way of letting the kernel remember that there is nothing.
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = pyfuse3.InodeT(0)
    entry.entry_timeout = FOREVER_S
    entry.attr_timeout = FOREVER_S
    return entry

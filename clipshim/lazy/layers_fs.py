"""The node's FUSE mount of layers: one flat directory, one read-only file a layer.

Each file is a layer's uncompressed tar stream, named by its layer key; EROFS trees use it as a
device. Not for fetching: reads go to the layer's reader.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from typing import Protocol

import pyfuse3

from clipshim.errors import NotFoundError
from clipshim.lazy.fuse_session import StatelessOperations, handler, volume

FOREVER_S = 1e6  # layers never change; the kernel may keep what it was told


def layer_inode(key: str) -> int:
    """The inode number of a layer's file: the same in every process, never root's (1)."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 2 | 2


class LayerFile(Protocol):
    """What the mount needs of a layer reader."""

    @property
    def key(self) -> str: ...

    @property
    def size(self) -> int: ...

    async def read(self, offset: int, size: int) -> bytes | bytearray | memoryview:
        """Exactly the bytes of the range that lie within the layer."""
        ...


class LayerDirectory(Protocol):
    """Finds layers for the mount. May wait, such as for recovery after a restart to be over."""

    async def by_name(self, key: str) -> LayerFile | None: ...

    async def by_inode(self, inode: int) -> LayerFile | None: ...

    def names(self) -> list[str]: ...


class LayersOperations(StatelessOperations):
    """FUSE operations over a LayerDirectory. Inodes and handles mean the same in every process."""

    def __init__(self, directory: LayerDirectory) -> None:
        super().__init__()
        self._directory = directory

    async def _file(self, inode: int) -> LayerFile:
        found = await self._directory.by_inode(inode)
        if found is None:
            raise NotFoundError(f"layer file {inode}: not shown")
        return found

    @handler
    async def lookup(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Root has the layers by key; names never mean anything else."""
        if parent_inode != pyfuse3.ROOT_INODE:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        if name in (b".", b".."):
            return _root_attributes()
        found = await self._directory.by_name(os.fsdecode(name))
        if found is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return _file_attributes(found)

    @handler
    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Attributes of root or of a layer."""
        if inode == pyfuse3.ROOT_INODE:
            return _root_attributes()
        return _file_attributes(await self._file(inode))

    @handler
    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        """The handle is the inode: it survives the server."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        await self._file(inode)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    @handler
    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Bytes of a layer, verified."""
        # pyfuse3 takes any contiguous buffer
        return await (await self._file(fh)).read(off, size)  # type: ignore[return-value]

    @handler
    async def opendir(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileHandleT:
        """There is one directory."""
        if inode != pyfuse3.ROOT_INODE:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        return pyfuse3.FileHandleT(inode)

    @handler
    async def readdir(
        self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        """In the order of the inode numbers, so that a position stays valid when layers come."""
        entries = sorted((layer_inode(key), key) for key in self._directory.names())
        for inode, key in entries:
            if inode <= start_id:
                continue
            found = await self._directory.by_name(key)
            if found is None:
                continue
            if not pyfuse3.readdir_reply(
                token, pyfuse3.FileNameT(os.fsencode(key)), _file_attributes(found), inode
            ):
                break

    @handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Sizes of the layers that are shown; nothing is free."""
        total = 0
        names = self._directory.names()
        for key in names:
            found = await self._directory.by_name(key)
            total += found.size if found else 0
        return volume(total, len(names) + 1)


def _root_attributes() -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = pyfuse3.ROOT_INODE
    entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o755)
    # runc, fts and find take a directory with less than two links for a deleted one
    entry.st_nlink = 2
    entry.entry_timeout = FOREVER_S
    entry.attr_timeout = FOREVER_S
    return entry


def _file_attributes(layer: LayerFile) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = pyfuse3.InodeT(layer_inode(layer.key))
    entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o444)
    entry.st_nlink = 1
    entry.st_size = layer.size
    entry.st_blocks = (layer.size + 511) // 512
    entry.st_blksize = 4096
    entry.entry_timeout = FOREVER_S
    entry.attr_timeout = FOREVER_S
    return entry

"""`fallback = "unpack"`: an image fetched whole and unpacked, where it cannot be mounted lazily.

    <state_dir>/unpacked/<image_id>/    the tree as ordinary files, complete when it has this name

Walks the index's tree and writes files from verified spans, so whiteouts and hard links are as the
index has them. Runs as root; not for anything that can be mounted.
"""

import logging
import os
import secrets
import shutil
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import trio

from clipshim.errors import StoreError
from clipshim.index.erofs_read import ErofsImage
from clipshim.index.model import open_index
from clipshim.node.resolver import Resolved
from clipshim.settings import Settings

log = logging.getLogger(__name__)

PIECE = 4 << 20

ReadLayer = Callable[[int, int, int], Awaitable[bytes | bytearray | memoryview]]
Progress = Callable[[dict[str, Any]], Awaitable[None]]


class Unpacker:
    """Unpacks each image once, whoever asks."""

    def __init__(self, settings: Settings) -> None:
        self.directory = f"{settings.state_dir}/unpacked"
        self._locks: dict[str, trio.Lock] = {}

    def path(self, image_id: str) -> str:
        """Where the image lies, or would."""
        return f"{self.directory}/{image_id}"

    async def unpack(self, resolved: Resolved, read: ReadLayer, progress: Progress) -> str:
        """Returns the directory when the image is there whole. Raises ClipError."""
        image_id = resolved.facts.image_id
        path = self.path(image_id)
        async with self._locks.setdefault(image_id, trio.Lock()):
            if await trio.to_thread.run_sync(os.path.isdir, path):
                return path
            log.warning("unpacking an image whole", extra={"reference": resolved.facts.reference})
            draft = f"{self.directory}/.new-{secrets.token_hex(8)}"
            await trio.to_thread.run_sync(_make, draft)
            try:
                await self._write(resolved, draft, read, progress)
                await trio.to_thread.run_sync(_finish, draft, path)
            except OSError as exc:
                raise StoreError(f"unpacking into {self.directory}: {exc}") from exc
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(remove_quietly, draft)
            return path

    async def _write(
        self, resolved: Resolved, root: str, read: ReadLayer, progress: Progress
    ) -> None:
        with await trio.to_thread.run_sync(open_index, resolved.path) as index:
            image = ErofsImage(index.tree())
        root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            writer = _TreeWriter(image, root_fd, read)
            done = 0
            async for size in writer.run():
                done += size
                await progress({"message": "unpacking", "bytes": done})
        finally:
            os.close(root_fd)


class _TreeWriter:
    """Writes below one directory fd; every name is a single component of a checked tree."""

    def __init__(self, image: ErofsImage, root_fd: int, read: ReadLayer) -> None:
        self._image = image
        self._root_fd = root_fd
        self._read = read
        self._links: dict[int, str] = {}  # nid -> path of its first name

    async def run(self) -> AsyncIterator[int]:
        """Yields the size of each file that was written. Directories get their times last."""
        pending: list[tuple[int, str]] = [(self._image.root_nid, ".")]
        directories = []
        while pending:
            nid, path = pending.pop()
            directories.append((nid, path))
            for raw_name, entry_nid, _ in self._image.readdir(nid):
                name = os.fsdecode(raw_name)
                child = name if path == "." else f"{path}/{name}"
                inode = self._image.stat(entry_nid)
                if stat.S_ISDIR(inode.mode):
                    os.mkdir(child, 0o700, dir_fd=self._root_fd)
                    pending.append((entry_nid, child))
                elif entry_nid in self._links:
                    os.link(
                        self._links[entry_nid],
                        child,
                        src_dir_fd=self._root_fd,
                        dst_dir_fd=self._root_fd,
                        follow_symlinks=False,
                    )
                else:
                    self._links[entry_nid] = child
                    yield await self._entry(entry_nid, child)
        for nid, path in reversed(directories):
            self._attributes(nid, path)

    async def _entry(self, nid: int, path: str) -> int:
        inode = self._image.stat(nid)
        size = 0
        if stat.S_ISREG(inode.mode):
            size = inode.size
            await self._file(nid, path, size)
        elif stat.S_ISLNK(inode.mode):
            os.symlink(os.fsdecode(self._image.readlink(nid)), path, dir_fd=self._root_fd)
        else:
            os.mknod(path, inode.mode, inode.rdev, dir_fd=self._root_fd)
        self._attributes(nid, path)
        return size

    async def _file(self, nid: int, path: str, size: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags, 0o600, dir_fd=self._root_fd)
        try:
            os.ftruncate(fd, size)
            at = 0
            while at < size:
                for device, offset, length in self._image.extents(nid, at, min(PIECE, size - at)):
                    if device > 0:
                        data = await self._read(device - 1, offset, length)
                        await trio.to_thread.run_sync(_write_at, fd, data, at)
                    at += length
        finally:
            os.close(fd)

    def _attributes(self, nid: int, path: str) -> None:
        inode = self._image.stat(nid)
        os.chown(path, inode.uid, inode.gid, dir_fd=self._root_fd, follow_symlinks=False)
        full = f"/proc/self/fd/{self._root_fd}/{path}"
        for name, value in self._image.xattrs(nid).items():
            os.setxattr(full, name, value, follow_symlinks=False)
        if not stat.S_ISLNK(inode.mode):
            os.chmod(path, stat.S_IMODE(inode.mode), dir_fd=self._root_fd)
        times = (inode.mtime_ns, inode.mtime_ns)
        os.utime(path, ns=times, dir_fd=self._root_fd, follow_symlinks=False)


def _make(path: str) -> None:
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    os.mkdir(path, 0o700)


def _finish(draft: str, path: str) -> None:
    os.sync()  # what has the final name must be whole after a host reset
    os.rename(draft, path)


def _write_at(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        offset += count
        view = view[count:]


def remove_quietly(path: str) -> None:
    """Removes a tree of ours; what cannot be removed is found by the next clean-up."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as exc:
        log.error("%s: %s", path, exc)

"""Walks paths in a tree as the kernel does in a chroot: links lead nowhere outside of it.

Not for listing trees (erofs_read), nor for names in a layer that is still being merged (merge).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipshim.index.erofs_read import S_IFDIR, S_IFLNK

if TYPE_CHECKING:
    from clipshim.index.erofs_read import ErofsImage

MAX_LINKS = 40  # linux/namei.h MAXSYMLINKS


def walk_path(image: ErofsImage, path: bytes) -> list[tuple[bytes, int]] | None:
    """Name and nid of each step from the root, without links, to what a path leads to.

    Empty for the root itself; None if there is nothing. Raises IndexFormatError if the tree
    contradicts itself.
    """
    trail: list[tuple[bytes, int]] = []
    parts = path.split(b"/")[::-1]
    followed = 0
    is_directory = True
    while parts:
        part = parts.pop()
        if not is_directory:  # a slash behind the name of a file is an error too
            return None
        if part in (b"", b"."):
            continue
        if part == b"..":
            del trail[-1:]
            continue
        nid = image.lookup(trail[-1][1] if trail else image.root_nid, part)
        if nid is None:
            return None
        kind = image.inode(nid)[1] >> 12
        if kind == S_IFLNK:
            followed += 1
            if followed > MAX_LINKS:
                return None
            target = image.readlink(nid)
            if target.startswith(b"/"):
                trail.clear()
            parts += target.split(b"/")[::-1]
            continue
        is_directory = kind == S_IFDIR
        trail.append((part, nid))
    return trail

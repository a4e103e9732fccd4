"""Checks a tree from an untrusted index in full: nothing a reader or the kernel follows may lie
outside of the image or of its layers, and the tree is one that a file system can show.

Stricter than EROFS: only what erofs_write produces is accepted. One pass over all inodes; the
caller keeps the verdict by the index's digest. Not for contents: spans have digests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from struct import error as StructError
from typing import TYPE_CHECKING, NoReturn

from clipshim.errors import IndexFormatError
from clipshim.index.erofs_format import (
    BLOCK,
    BLOCK_BITS,
    CHUNK_BASED,
    CHUNK_FORMAT_BITS,
    CHUNK_FORMAT_INDEXES,
    CHUNK_INDEX,
    CHUNK_INDEX_SIZE,
    FILE_TYPES,
    FLAT_INLINE,
    FLAT_PLAIN,
    MAX_NAME,
    NULL_ADDR,
)
from clipshim.index.erofs_read import (
    S_IFBLK,
    S_IFCHR,
    S_IFDIR,
    S_IFLNK,
    S_IFREG,
    ErofsImage,
    Inode,
    block_entries,
)
from clipshim.index.tree_path import walk_path

if TYPE_CHECKING:
    from clipshim.index.model import Index

MAX_INODES = 4_000_000
MAX_LINK_TARGET = 4095
_S_IFIFO = 0o1


@dataclass(slots=True)
class TreeFacts:
    """What others want to know of a sound tree: `has_…` is true if that is a directory."""

    inodes: int = 0
    has_proc: bool = False
    has_usr: bool = False
    top_symlinks: dict[bytes, bytes] = field(default_factory=dict)  # that lead to something
    total_bytes: int = 0  # of all regular files, each once


def check_tree(image: ErofsImage, layer_sizes: Sequence[int]) -> TreeFacts:
    """Raises IndexFormatError unless the whole tree is sound."""
    try:
        return _Check(image, layer_sizes).run()
    except (StructError, IndexError, OverflowError) as exc:
        raise IndexFormatError(f"tree: damaged: {exc}") from exc


def sound_tree(index: "Index") -> ErofsImage:
    """The tree of an index that nobody has checked before. Raises IndexFormatError."""
    image = ErofsImage(index.tree())
    check_tree(image, [layer.size for layer in index.layers])
    return image


class _Check:
    def __init__(self, image: ErofsImage, layer_sizes: Sequence[int]) -> None:
        self._image = image
        self._limits = [image.length, *layer_sizes]
        self._facts = TreeFacts()
        self._directories: set[int] = set()
        self._names: dict[int, int] = {}  # of what is not a directory: nid to names found
        self._links: dict[int, int] = {}  # nid to nlink
        # Structures may not share bytes, so all together they are no larger than the image.
        self._budget = image.length

    def run(self) -> TreeFacts:
        image, facts = self._image, self._facts
        blocks = [-(-size // BLOCK) for size in self._limits[1:]]
        if image.device_blocks() != blocks:
            raise IndexFormatError(f"tree: expected devices of {blocks} blocks for its layers")
        root = image.root_nid
        inode = image.inode(root)
        if inode[1] >> 12 != S_IFDIR:
            _fail(root, "the root is not a directory")
        self._common(root, inode)
        self._directories.add(root)
        pending = [(root, root, inode)]
        while pending:
            self._directory(*pending.pop(), pending)
        links = self._links
        for nid, found in self._names.items():
            if links[nid] != found:
                _fail(nid, f"expected a link count of {found}, got {links[nid]}")
        facts.inodes = len(self._directories) + len(self._names)
        if facts.inodes != image.inode_count:
            raise IndexFormatError(f"tree: expected {image.inode_count} inodes, got {facts.inodes}")
        # images may hold links that dangle: to what is mounted later, to a kernel that is not there
        facts.top_symlinks = {
            name: target
            for name, target in facts.top_symlinks.items()
            if walk_path(image, name) is not None
        }
        return facts

    def _directory(
        self, nid: int, parent: int, inode: Inode, pending: list[tuple[int, int, Inode]]
    ) -> None:
        image = self._image
        layout, _, nlink, _, _, size, _, union, at, xattr_size = inode
        tail_at = at + xattr_size
        if layout == FLAT_INLINE:
            self._tail(nid, tail_at, (size - 1) % BLOCK + 1)
        self._spend(nid, size)
        previous = b""
        dots = 0
        subdirectories = 2
        names, directories = self._names, self._directories
        at_root = nid == image.root_nid
        for start, end in image.directory_blocks(nid, layout, size, union, tail_at):
            for name, child, kind in block_entries(image.buffer, start, end):
                if name <= previous:
                    _fail(nid, f"name {name!r} is out of order")
                previous = name
                if name == b"." or name == b"..":
                    if child != (nid if name == b"." else parent) or kind != 2:
                        _fail(nid, f"{name!r} leads to inode {child}")
                    dots += 1
                    continue
                if b"/" in name or b"\0" in name or len(name) > MAX_NAME:
                    _fail(nid, f"bad name {name!r}")
                known = names.get(child)
                if known is not None and not at_root:
                    names[child] = known + 1
                    if FILE_TYPES[image.inode(child)[1] >> 12] != kind:
                        _fail(child, f"wrong type of name {name!r}")
                    continue
                below = image.inode(child)
                if FILE_TYPES.get(below[1] >> 12) != kind:
                    _fail(child, f"wrong type of name {name!r}")
                if kind == 2:
                    if child in directories:
                        _fail(child, "a directory with two names")
                    directories.add(child)
                    subdirectories += 1
                    pending.append((child, nid, below))
                    self._common(child, below)
                elif known is not None:
                    names[child] = known + 1
                else:
                    names[child] = 1
                    self._links[child] = below[2]
                    self._common(child, below)
                    self._file(child, below)
                if at_root:
                    self._top(name, child, kind)
        if dots != 2:
            _fail(nid, "'.' or '..' is missing")
        if nlink != subdirectories:
            _fail(nid, f"expected a link count of {subdirectories}, got {nlink}")
        if len(directories) + len(names) > MAX_INODES:
            raise IndexFormatError(f"tree: more than {MAX_INODES} inodes")

    def _top(self, name: bytes, nid: int, kind: int) -> None:
        if kind == 7:
            self._facts.top_symlinks[name] = self._image.readlink(nid)
        elif kind == 2 and name == b"proc":
            self._facts.has_proc = True
        elif kind == 2 and name == b"usr":
            self._facts.has_usr = True

    def _common(self, nid: int, inode: Inode) -> None:
        xattr_size = inode[9]
        if inode[0] not in (FLAT_PLAIN, FLAT_INLINE, CHUNK_BASED):
            _fail(nid, f"unknown layout {inode[0]}")
        if xattr_size:
            self._spend(nid, xattr_size)
            seen = [name for name, _ in self._image.xattr_entries(nid, inode[8], xattr_size)]
            if len(set(seen)) != len(seen):
                _fail(nid, "an extended attribute twice")

    def _file(self, nid: int, inode: Inode) -> None:
        layout, mode, _, _, _, size, _, union, at, xattr_size = inode
        kind = mode >> 12
        if kind == S_IFREG:
            self._facts.total_bytes += size
            if layout == CHUNK_BASED and size:
                self._chunks(nid, size, union, at + xattr_size)
            elif size or layout != FLAT_PLAIN:
                _fail(nid, f"file of {size} bytes with layout {layout}")
        elif kind == S_IFLNK:
            if not 0 < size <= MAX_LINK_TARGET:
                _fail(nid, f"symbolic link of {size} bytes")
            if layout == FLAT_INLINE:
                self._tail(nid, at + xattr_size, size)
            elif layout != FLAT_PLAIN or (union << BLOCK_BITS) + size > self._image.length:
                _fail(nid, "symbolic link outside of the image")
            if b"\0" in self._image.readlink(nid):
                _fail(nid, "symbolic link with a zero byte")
        elif size or layout != FLAT_PLAIN or kind not in (S_IFCHR, S_IFBLK, _S_IFIFO):
            _fail(nid, f"special file of type {kind:o}, {size} bytes and layout {layout}")

    def _chunks(self, nid: int, size: int, union: int, at: int) -> None:
        if union & ~CHUNK_FORMAT_BITS != CHUNK_FORMAT_INDEXES:
            _fail(nid, f"chunk format {union:#x}")
        bits = BLOCK_BITS + (union & CHUNK_FORMAT_BITS)
        count = -(-size >> bits)
        at += -at % CHUNK_INDEX_SIZE
        end = at + count * CHUNK_INDEX_SIZE
        if end > self._image.length:
            _fail(nid, "chunk table outside of the image")
        self._spend(nid, end - at)
        limits = self._limits
        left = size
        for advise, device, address in CHUNK_INDEX.iter_unpack(bytes(self._image.buffer[at:end])):
            if address != NULL_ADDR and (
                device >= len(limits)
                or (address << BLOCK_BITS) + min(left, 1 << bits) > limits[device]
            ):
                _fail(nid, f"chunk at block {address} of device {device} lies outside of it")
            if advise:
                _fail(nid, "unknown chunk advice")
            left -= 1 << bits

    def _tail(self, nid: int, at: int, size: int) -> None:
        if at % BLOCK + size > BLOCK or at + size > self._image.length:
            _fail(nid, "inline data crosses the end of its block")

    def _spend(self, nid: int, size: int) -> None:
        self._budget -= size
        if self._budget < 0:
            _fail(nid, "structures that share bytes")


def _fail(nid: int, what: str) -> NoReturn:
    raise IndexFormatError(f"tree: inode {nid}: {what}")

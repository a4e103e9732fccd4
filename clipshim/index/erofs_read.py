"""Reads trees that erofs_write wrote, straight from a buffer: an mmap or bytes.

Serves every request of a mounted tree, so nothing is parsed ahead and nothing is kept. Reading
is safe with a hostile image in that it raises IndexFormatError or returns nonsense; whether the
image is sound is tree_check's question.
"""

from collections.abc import Iterator
from mmap import mmap
from struct import error as StructError

from clipshim.errors import IndexFormatError
from clipshim.index.erofs_format import (
    BLOCK,
    BLOCK_BITS,
    CHUNK_BASED,
    CHUNK_FORMAT_BITS,
    CHUNK_FORMAT_INDEXES,
    CHUNK_INDEX,
    CHUNK_INDEX_SIZE,
    COMPACT,
    COMPACT_SIZE,
    DEVICE_SLOT,
    DEVICE_SLOT_SIZE,
    DIRENT,
    DIRENT_SIZE,
    EXTENDED,
    EXTENDED_SIZE,
    FEATURE_COMPAT_MTIME,
    FEATURE_INCOMPAT_CHUNKED_FILE,
    FEATURE_INCOMPAT_DEVICE_TABLE,
    FLAT_INLINE,
    FLAT_PLAIN,
    NULL_ADDR,
    SLOT_BITS,
    SUPER,
    SUPER_MAGIC,
    SUPER_OFFSET,
    SUPER_SIZE,
    XATTR_ENTRY,
    XATTR_ENTRY_SIZE,
    XATTR_HEADER,
    XATTR_HEADER_SIZE,
    XATTR_PREFIXES,
)

HOLE = -1  # as a device
S_IFDIR, S_IFREG, S_IFLNK, S_IFCHR, S_IFBLK = 0o4, 0o10, 0o12, 0o2, 0o6  # mode >> 12


class Stat:
    """What stat(2) says of an inode. Its number, `ino`, is its nid, as in the kernel."""

    __slots__ = ("gid", "ino", "mode", "mtime_ns", "nlink", "rdev", "size", "uid")

    def __init__(
        self,
        mode: int,
        nlink: int,
        uid: int,
        gid: int,
        size: int,
        mtime_ns: int,
        rdev: int,
        ino: int,
    ) -> None:
        self.mode = mode
        self.nlink = nlink
        self.uid = uid
        self.gid = gid
        self.size = size
        self.mtime_ns = mtime_ns
        self.rdev = rdev  # as os.makedev encodes it
        self.ino = ino


# layout, mode, nlink, uid, gid, size, mtime_ns, i_u, offset of what follows the fixed part,
# bytes of extended attributes
Inode = tuple[int, int, int, int, int, int, int, int, int, int]


class ErofsImage:
    """An EROFS image of ours. Raises IndexFormatError if the superblock is not one."""

    def __init__(self, buffer: bytes | mmap | memoryview) -> None:
        self.buffer = buffer
        self.length = len(buffer)
        try:
            fields = SUPER.unpack_from(buffer, SUPER_OFFSET)
        except StructError:
            raise IndexFormatError(
                f"tree: expected a superblock, got {self.length} bytes"
            ) from None
        devices = fields[16]
        incompat = FEATURE_INCOMPAT_CHUNKED_FILE | (FEATURE_INCOMPAT_DEVICE_TABLE if devices else 0)
        expected = (
            SUPER_MAGIC,
            FEATURE_COMPAT_MTIME,
            BLOCK_BITS,
            incompat,
            (SUPER_OFFSET + SUPER_SIZE) // DEVICE_SLOT_SIZE,
        )
        got = (fields[0], fields[2], fields[3], fields[14], fields[17])
        if got != expected:
            raise IndexFormatError(f"tree: expected a superblock of {expected}, got {got}")
        # checksum, sb_extslots, available_compr_algs, what follows devt_slotoff; xattr_blkaddr,
        # uuid and volume_name; fixed_nsec
        unused = (fields[1], fields[4], fields[15], *fields[18:23], any(fields[23]))
        if any(unused) or any((fields[11], *fields[12], *fields[13])) or fields[8] >= 10**9:
            raise IndexFormatError("tree: superblock with features that no tree has")
        self.root_nid: int = fields[5]
        self.inode_count: int = fields[6]
        self.device_count: int = devices
        self._epoch_ns: int = fields[7] * 1_000_000_000 + fields[8]
        self._meta: int = fields[10] << BLOCK_BITS
        head = SUPER_OFFSET + SUPER_SIZE + DEVICE_SLOT_SIZE * devices
        if fields[9] * BLOCK != self.length or not head <= self._meta <= self.length:
            raise IndexFormatError(
                f"tree: expected {fields[9]} blocks with inodes from {fields[10]}, "
                f"got {self.length} bytes"
            )

    def device_blocks(self) -> list[int]:
        """How many 512-byte blocks each device has, device 1 first."""
        found = []
        for number in range(self.device_count):
            at = SUPER_OFFSET + SUPER_SIZE + DEVICE_SLOT_SIZE * number
            tag, blocks, address, reserved = DEVICE_SLOT.unpack_from(self.buffer, at)
            if any(tag) or address or any(reserved):
                raise IndexFormatError(f"tree: device {number + 1} has fields that no tree has")
            found.append(blocks)
        return found

    def inode(self, nid: int) -> Inode:
        """The fixed part of an inode, decoded."""
        at = self._meta + (nid << SLOT_BITS)
        buffer = self.buffer
        try:
            if buffer[at] & 1:
                (
                    format_, count, mode, reserved, size, union, _, uid, gid,
                    seconds, nanoseconds, nlink,
                ) = EXTENDED.unpack_from(buffer, at)  # fmt: skip
                if reserved or nanoseconds >= 1_000_000_000:
                    raise IndexFormatError(f"tree: inode {nid} has fields that no tree has")
                mtime_ns = seconds * 1_000_000_000 + nanoseconds
                at += EXTENDED_SIZE
            else:
                (format_, count, mode, nlink, size, reserved, union, _, uid, gid, more) = (
                    COMPACT.unpack_from(buffer, at)
                )
                if reserved or more:
                    raise IndexFormatError(f"tree: inode {nid} has fields that no tree has")
                mtime_ns = self._epoch_ns
                at += COMPACT_SIZE
        except (StructError, IndexError, OverflowError):
            raise IndexFormatError(f"tree: inode {nid} lies outside of the image") from None
        xattr_size = XATTR_HEADER_SIZE + 4 * (count - 1) if count else 0
        return format_ >> 1, mode, nlink, uid, gid, size, mtime_ns, union, at, xattr_size

    def stat(self, nid: int) -> Stat:
        _, mode, nlink, uid, gid, size, mtime_ns, union, _, _ = self.inode(nid)
        rdev = 0
        if mode >> 12 in (S_IFCHR, S_IFBLK):
            # new_encode_dev() is os.makedev()'s encoding of small numbers
            rdev = union
        return Stat(mode, nlink, uid, gid, size, mtime_ns, rdev, nid)

    def lookup(self, nid: int, name: bytes) -> int | None:
        """The nid of a name in a directory, `.` and `..` included; None if it is not there."""
        spans = self._directory_blocks(nid)
        buffer = self.buffer
        low, high = 0, len(spans) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if _first_name(buffer, *spans[middle]) <= name:
                low = middle
            else:
                high = middle - 1
        if not spans:
            return None
        start, end = spans[low]
        count = _dirent_count(buffer, start, end)
        left, right = 0, count - 1
        while left <= right:
            middle = (left + right) // 2
            here = _name(buffer, start, end, middle, count)
            if here == name:
                found: int = DIRENT.unpack_from(buffer, start + DIRENT_SIZE * middle)[0]
                return found
            if here < name:
                left = middle + 1
            else:
                right = middle - 1
        return None

    def readdir(self, nid: int) -> list[tuple[bytes, int, int]]:
        """(name, nid, DT_ type) of all in a directory but `.` and `..`, in order of names."""
        buffer = self.buffer
        found = []
        for start, end in self._directory_blocks(nid):
            for name, child, kind in block_entries(buffer, start, end):
                if name != b"." and name != b"..":
                    found.append((name, child, _DT[kind & 7]))
        return found

    def readlink(self, nid: int) -> bytes:
        layout, mode, _, _, _, size, _, union, at, xattr_size = self.inode(nid)
        if mode >> 12 != S_IFLNK:
            raise IndexFormatError(f"tree: inode {nid} is not a symbolic link")
        start = at + xattr_size if layout == FLAT_INLINE else union << BLOCK_BITS
        return bytes(self.buffer[start : start + size])

    def xattrs(self, nid: int) -> dict[bytes, bytes]:
        inode = self.inode(nid)
        return dict(self.xattr_entries(nid, inode[8], inode[9])) if inode[9] else {}

    def xattr_entries(self, nid: int, at: int, size: int) -> Iterator[tuple[bytes, bytes]]:
        """Names and values in the `size` bytes from `at`; what does not fit is an error."""
        end = at + size
        if end > self.length or XATTR_HEADER.unpack_from(self.buffer, at) != (0, 0):
            raise IndexFormatError(f"tree: inode {nid}: damaged extended attributes")
        at += XATTR_HEADER_SIZE
        while at < end:
            length, index, value_size = XATTR_ENTRY.unpack_from(self.buffer, at)
            at += XATTR_ENTRY_SIZE
            following = at + length + value_size
            prefix = XATTR_PREFIXES.get(index)
            if prefix is None or following > end or bool(length) != prefix.endswith(b"."):
                raise IndexFormatError(f"tree: inode {nid}: damaged extended attributes")
            name = prefix + bytes(self.buffer[at : at + length])
            yield name, bytes(self.buffer[at + length : following])
            at = following + -following % 4

    def extents(self, nid: int, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Where `length` bytes of a file from `offset` lie, cut off at its end.

        A list of (device, offset in the device, bytes): device i + 1 is layer i, 0 this image,
        HOLE zeros.
        """
        layout, mode, _, _, _, size, _, union, at, xattr_size = self.inode(nid)
        if mode >> 12 != S_IFREG:
            raise IndexFormatError(f"tree: inode {nid} is not a regular file")
        end = min(offset + length, size)
        if offset >= end:
            return []
        if layout != CHUNK_BASED or not union & CHUNK_FORMAT_INDEXES:
            raise IndexFormatError(f"tree: inode {nid}: file of layout {layout}")
        bits = BLOCK_BITS + (union & CHUNK_FORMAT_BITS)
        table = at + xattr_size
        table += -table % CHUNK_INDEX_SIZE
        found: list[tuple[int, int, int]] = []
        while offset < end:
            chunk = offset >> bits
            stop = min(end, (chunk + 1) << bits)
            try:
                _, device, address = CHUNK_INDEX.unpack_from(
                    self.buffer, table + CHUNK_INDEX_SIZE * chunk
                )
            except StructError:
                raise IndexFormatError(f"tree: inode {nid}: chunk {chunk} is missing") from None
            inside = offset - (chunk << bits)
            start = (address << BLOCK_BITS) + inside
            if address == NULL_ADDR:
                device, start = HOLE, 0
            if found and found[-1][0] == device:
                _, before, extent = found[-1]
                if device == HOLE or before + extent == start:
                    found[-1] = (device, before, extent + stop - offset)
                    offset = stop
                    continue
            found.append((device, start, stop - offset))
            offset = stop
        return found

    def walk(self) -> Iterator[tuple[bytes, int]]:
        """Every path, b"" for the root, with its nid; parents before children."""
        pending = [(b"", self.root_nid, _DT[2])]
        while pending:
            path, nid, kind = pending.pop()
            yield path, nid
            if kind == _DT[2]:
                prefix = path + b"/" if path else b""
                pending += [
                    (prefix + name, child, below)
                    for name, child, below in reversed(self.readdir(nid))
                ]

    def _directory_blocks(self, nid: int) -> list[tuple[int, int]]:
        layout, mode, _, _, _, size, _, union, at, xattr_size = self.inode(nid)
        if mode >> 12 != S_IFDIR:
            raise IndexFormatError(f"tree: inode {nid} is not a directory")
        return self.directory_blocks(nid, layout, size, union, at + xattr_size)

    def directory_blocks(
        self, nid: int, layout: int, size: int, union: int, tail_at: int
    ) -> list[tuple[int, int]]:
        """Start and end of each block of a directory in the buffer."""
        first = union << BLOCK_BITS
        if size > self.length:
            raise IndexFormatError(f"tree: directory {nid} of {size} bytes")
        spans = [(first + done, first + min(done + BLOCK, size)) for done in range(0, size, BLOCK)]
        if layout == FLAT_INLINE and spans:
            spans[-1] = (tail_at, tail_at + (size - 1) % BLOCK + 1)
        elif layout != FLAT_PLAIN:
            raise IndexFormatError(f"tree: directory {nid} of layout {layout}")
        if any(end > self.length for _, end in spans):
            raise IndexFormatError(f"tree: directory {nid} lies outside of the image")
        return spans


_DT = (0, 8, 4, 2, 6, 1, 12, 10)  # DT_ of dirent.h by file_type


def block_entries(
    buffer: bytes | mmap | memoryview, start: int, end: int
) -> list[tuple[bytes, int, int]]:
    """(name, nid, file_type) of one directory block."""
    count = _dirent_count(buffer, start, end)
    block = bytes(buffer[start:end])
    found = []
    dirents = list(DIRENT.iter_unpack(block[: DIRENT_SIZE * count]))
    offsets = [dirent[1] for dirent in dirents]
    offsets.append(len(block))
    for number, (nid, offset, kind, _) in enumerate(dirents):
        following = offsets[number + 1]
        if not offset < following <= len(block):
            raise IndexFormatError(f"tree: damaged directory block at {start}")
        found.append((block[offset:following], nid, kind))
    if b"\0" in found[-1][0]:  # a block that is not the last is padded
        found[-1] = (found[-1][0].partition(b"\0")[0], *found[-1][1:])
    return found


def _dirent_count(buffer: bytes | mmap | memoryview, start: int, end: int) -> int:
    names = buffer[start + 8] | buffer[start + 9] << 8 if end - start >= DIRENT_SIZE else 0
    if not DIRENT_SIZE <= names < end - start or names % DIRENT_SIZE:
        raise IndexFormatError(f"tree: damaged directory block at {start}")
    return names // DIRENT_SIZE


def _name(
    buffer: bytes | mmap | memoryview, start: int, end: int, number: int, count: int
) -> bytes:
    at = start + DIRENT_SIZE * number
    first = start + (buffer[at + 8] | buffer[at + 9] << 8)
    if number + 1 < count:
        at += DIRENT_SIZE
        return bytes(buffer[first : start + (buffer[at + 8] | buffer[at + 9] << 8)])
    return bytes(buffer[first:end]).partition(b"\0")[0]


def _first_name(buffer: bytes | mmap | memoryview, start: int, end: int) -> bytes:
    return _name(buffer, start, end, 0, _dirent_count(buffer, start, end))

"""FUSE's wire format, as much of it as a read-only file system needs. Standard library only.

Protocol 7, linux/fuse.h; numbers are in the machine's byte order.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct

log = logging.getLogger(__name__)

# opcodes
LOOKUP, FORGET, GETATTR, READLINK = 1, 2, 3, 5
OPEN, READ, STATFS, RELEASE = 14, 15, 17, 18
GETXATTR, LISTXATTR, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR = 22, 23, 25, 26, 27, 28, 29
INTERRUPT, DESTROY, BATCH_FORGET, READDIRPLUS = 36, 38, 42, 44
NOTIFY_RESEND = 7  # Linux 6.9+

# INIT flags
ASYNC_READ = 1 << 0
ATOMIC_O_TRUNC = 1 << 3
DO_READDIRPLUS = 1 << 13
ASYNC_DIO = 1 << 15
NO_OPEN_SUPPORT = 1 << 17
PARALLEL_DIROPS = 1 << 18
POSIX_ACL = 1 << 20
MAX_PAGES = 1 << 22
CACHE_SYMLINKS = 1 << 23
NO_OPENDIR_SUPPORT = 1 << 24

# open_flags
KEEP_CACHE = 1 << 1
CACHE_DIR = 1 << 3

ROOT = 1  # the root's inode number

IN_HEADER = struct.Struct("=IIQQIIIHH")  # length, opcode, unique, nodeid, uid, gid, pid, 2 unused
OUT_HEADER = struct.Struct("=IiQ")  # length, -errno, unique; a notification has its code for errno
INIT_IN = struct.Struct("=IIII")  # major, minor, max_readahead, flags
INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
READ_IN = struct.Struct("=QQI")  # handle, offset, size; READ, READDIR and READDIRPLUS
XATTR_IN = struct.Struct("=I4x")  # size
XATTR_OUT = struct.Struct("=I4x")
OPEN_OUT = struct.Struct("=QI4x")  # handle, open_flags
STATFS_OUT = struct.Struct("=QQQQQIII28x")
# ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize
ATTRIBUTES = struct.Struct("=QQQqqqIIIIIIIII4x")
ATTR_OUT_HEAD = struct.Struct("=QI4x")  # seconds and nanoseconds that they are valid
ENTRY_OUT_HEAD = struct.Struct("=QQQQII")  # nodeid, generation, entry and attributes valid
DIRENT = struct.Struct("=QQII")  # ino, position of the next one, length of the name, type
DIRENT_ALIGN = 8

FOREVER_S = 365 * 86_400


class Refusal(Exception):
    """A request's answer is this errno, and that is no fault: nothing is logged."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def reply(unique: int, body: bytes | bytearray = b"") -> tuple[bytes, bytes | bytearray]:
    """An answer in two pieces, for writev."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique), body


def error_reply(unique: int, number: int) -> bytes:
    """The answer that something failed, `number` being an errno."""
    return OUT_HEADER.pack(OUT_HEADER.size, -number, unique)


def entry(nodeid: int, attributes: bytes) -> bytes:
    """fuse_entry_out of something that never changes."""
    return ENTRY_OUT_HEAD.pack(nodeid, 0, FOREVER_S, FOREVER_S, 0, 0) + attributes


# Node 0 lets the kernel remember that there is nothing of this name.
NO_ENTRY = entry(0, bytes(ATTRIBUTES.size))


def dirent(ino: int, position: int, kind: int, name: bytes) -> bytes:
    """fuse_dirent with its padding."""
    padding = -(DIRENT.size + len(name)) % DIRENT_ALIGN
    return DIRENT.pack(ino, position, len(name), kind) + name + bytes(padding)


def reportable(number: int | None) -> int:
    """The errno to answer for an error's: ENOSYS would tell the kernel never to ask again."""
    return errno.EIO if not number or number == errno.ENOSYS else number


def request_resend(fuse_fd: int) -> bool:
    """Has the kernel queue again what was read and not answered. False before Linux 6.9."""
    with contextlib.suppress(OSError):
        os.write(fuse_fd, OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0))
        return True
    log.warning(
        "this kernel cannot send unanswered requests again: reads that were waiting when the"
        " previous server died hang until their process is killed"
    )
    return False

"""A FUSE connection from open(2) of /dev/fuse to the answered FUSE_INIT, without libfuse.

The keeper answers FUSE_INIT itself, so every server, the first one too, takes over a connection
that is already initialised: there is no moment at which a killed server leaves it unknown whether
the kernel has had its answer. Standard library only. Wire format: linux/fuse.h, protocol 7.
"""

import contextlib
import errno
import os
import select
from typing import NamedTuple

from clipshim.lazy import fuse_wire as wire
from clipshim.mounts import mountinfo, syscalls

FUSE_KERNEL_VERSION = 7
FUSE_MINOR = 31  # what is spoken here; max_pages came with 7.28
READ_BUFFER = 64 << 10  # more than FUSE_MIN_READ_BUFFER

WANTED = (
    wire.ASYNC_READ
    | wire.ATOMIC_O_TRUNC
    | wire.DO_READDIRPLUS  # without _AUTO: pyfuse3 answers no plain READDIR
    | wire.ASYNC_DIO
    | wire.PARALLEL_DIROPS
    | wire.MAX_PAGES
    | wire.CACHE_SYMLINKS
)
MAX_PAGES = 256  # 1 MiB a request, the kernel's own bound
MAX_WRITE = 128 << 10  # nothing is written; bounds the buffer a reader of the fd must bring
# Readahead of a layer whose registry is dead holds background slots until it times out: with few
# slots it would stop the readahead of every other layer.
MAX_BACKGROUND = 4096
INIT_TIMEOUT_MS = 30_000


class Connection(NamedTuple):
    """A connection that is initialised: its descriptor, and what the kernel can (INIT's flags)."""

    fd: int
    kernel_flags: int


def mount_fuse(target: str, *, nosuid: bool, posix_acl: bool = False) -> Connection:
    """Mounts a new FUSE connection read-only at `target`.

    `posix_acl`: access control lists are obeyed, and kept so that they are asked for once only.
    Raises OSError; nothing stays mounted then.
    """
    wanted = WANTED | (wire.POSIX_ACL if posix_acl else 0)
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        flags = syscalls.MS_RDONLY | syscalls.MS_NODEV | (syscalls.MS_NOSUID if nosuid else 0)
        data = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        syscalls.mount("clipshim", target, "fuse.clipshim", flags, data)
        try:
            kernel_flags = _answer_init(fd, wanted)
        except BaseException:
            syscalls.umount2(target, syscalls.MNT_DETACH)
            raise
    except BaseException:
        os.close(fd)
        raise
    return Connection(fd, kernel_flags)


def _answer_init(fd: int, wanted: int) -> int:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    if not poller.poll(INIT_TIMEOUT_MS):
        raise TimeoutError(errno.ETIMEDOUT, "the kernel sent no FUSE_INIT")
    request = os.read(fd, READ_BUFFER)
    length, opcode, unique, *_ = wire.IN_HEADER.unpack_from(request)
    if opcode != wire.INIT or length != len(request):
        raise OSError(errno.EPROTO, f"expected FUSE_INIT, got opcode {opcode}")
    fields = wire.INIT_IN.unpack_from(request, wire.IN_HEADER.size)
    os.writev(fd, wire.reply(unique, init_reply(*fields, wanted=wanted)))
    kernel_flags: int = fields[3]
    return kernel_flags


def init_reply(
    major: int, minor: int, max_readahead: int, flags: int, *, wanted: int = WANTED
) -> bytes:
    """The body of the answer to a FUSE_INIT request with these fields."""
    if major != FUSE_KERNEL_VERSION:
        raise OSError(errno.EPROTO, f"expected FUSE protocol 7, got {major}.{minor}")
    return wire.INIT_OUT.pack(
        FUSE_KERNEL_VERSION,
        min(minor, FUSE_MINOR),
        max_readahead,
        wanted & flags,
        MAX_BACKGROUND,
        MAX_BACKGROUND * 3 // 4,
        MAX_WRITE,
        1,  # time granularity: nanoseconds
        MAX_PAGES if flags & wire.MAX_PAGES else 0,
        0,
        0,
    )


def is_alive(fd: int) -> bool:
    """Whether the connection behind `fd` still has a mount; never blocks."""
    poller = select.poll()
    poller.register(fd, 0)
    return not poller.poll(0)  # POLLERR: aborted or unmounted everywhere


def set_readahead(target: str, kibibytes: int) -> None:
    """Raises the kernel's readahead on the FUSE mount at `target`; does not touch the mount."""
    mount = mountinfo.mount_at(target)
    if mount is None:
        return
    major, minor = os.major(mount.device), os.minor(mount.device)
    # slower, not wrong, without: sysfs may be read-only in a container
    with (
        contextlib.suppress(OSError),
        open(f"/sys/class/bdi/{major}:{minor}/read_ahead_kb", "w") as file,
    ):
        file.write(str(kibibytes))

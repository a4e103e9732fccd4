"""System calls that Python lacks, through ctypes. No policy.

Each wrapper raises OSError whose text begins with the name of the call, and what the kernel wrote
into the file system context's log, where there is one. Constants keep their header names. The
calls from 424 on have the same number on every architecture that clipshim runs on.
"""

import ctypes
import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

MS_RDONLY = 0x1  # linux/mount.h
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_NOATIME = 0x400
MS_BIND = 0x1000

MNT_DETACH = 0x2  # linux/fs.h
UMOUNT_NOFOLLOW = 0x8

AT_FDCWD = -100  # fcntl.h
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

OPEN_TREE_CLONE = 0x1  # linux/mount.h
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
FSOPEN_CLOEXEC = 0x1
FSMOUNT_CLOEXEC = 0x1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_IDMAP = 0x100000

RESOLVE_NO_MAGICLINKS = 0x2  # linux/openat2.h
RESOLVE_NO_SYMLINKS = 0x4
RESOLVE_BENEATH = 0x8
RESOLVE_IN_ROOT = 0x10

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
IN_DELETE = 0x200  # linux/inotify.h
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
CLONE_NEWUSER = 0x10000000  # linux/sched.h

OVERLAYFS_SUPER_MAGIC = 0x794C7630  # linux/magic.h
NFS_SUPER_MAGIC = 0x6969
FUSE_SUPER_MAGIC = 0x65735546
TMPFS_MAGIC = 0x01021994
RAMFS_MAGIC = 0x858458F6
EROFS_SUPER_MAGIC_V1 = 0xE0F5E1E2

_NR_OPEN_TREE = 428
_NR_MOVE_MOUNT = 429
_NR_FSOPEN = 430
_NR_FSCONFIG = 431
_NR_FSMOUNT = 432
_NR_OPENAT2 = 437
_NR_MOUNT_SETATTR = 442

_OPENAT2_TRIES = 64  # EAGAIN: something in the path was renamed while the kernel walked it
_CONTEXT_LOG_BYTES = 8192


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class _Statfs(ctypes.Structure):
    # asm-generic/statfs.h on 64-bit machines: f_type first; only that is read
    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_byte * 248))


_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.statfs.argtypes = (ctypes.c_char_p, ctypes.POINTER(_Statfs))
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.POINTER(_Statfs))
_libc.prctl.argtypes = (
    ctypes.c_int,
    ctypes.c_ulong,
    ctypes.c_ulong,
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_libc.inotify_init1.argtypes = (ctypes.c_int,)
_libc.inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)

_int, _uint, _str, _size_t = ctypes.c_int, ctypes.c_uint, ctypes.c_char_p, ctypes.c_size_t


def _fail(call: str, subject: str = "", detail: str = "") -> "NoReturn":
    number = ctypes.get_errno()
    text = f"{call}: {os.strerror(number)}" + (f": {detail}" if detail else "")
    if subject:
        raise OSError(number, text, subject)
    raise OSError(number, text)


def _bytes(value: "str | bytes | None") -> "bytes | None":
    if value is None:
        return None
    raw = os.fsencode(value)
    if b"\0" in raw:
        raise ValueError("embedded null byte")
    return raw


def mount(
    source: "str | bytes | None",
    target: "str | bytes",
    fstype: "str | None",
    flags: int = 0,
    data: "str | bytes | None" = None,
) -> None:
    """mount(2). `data` is cut at one page by the kernel: use fsopen for more."""
    if _libc.mount(_bytes(source), _bytes(target), _bytes(fstype), flags, _bytes(data)):
        _fail("mount", os.fsdecode(target))


def umount2(target: "str | bytes", flags: int = 0) -> None:
    """umount2(2)."""
    if _libc.umount2(_bytes(target), flags):
        _fail("umount2", os.fsdecode(target))


def open_tree(dir_fd: int, path: "str | bytes", flags: int) -> int:
    """open_tree(2): a descriptor of a mount; of a detached copy with OPEN_TREE_CLONE."""
    flags |= OPEN_TREE_CLOEXEC
    fd: int = _syscall(_NR_OPEN_TREE, _int(dir_fd), _str(_bytes(path)), _uint(flags))
    if fd < 0:
        _fail("open_tree", os.fsdecode(path))
    return fd


def move_mount(
    from_fd: int, from_path: "str | bytes", to_fd: int, to_path: "str | bytes", flags: int = 0
) -> None:
    """move_mount(2). Empty paths mean the descriptors themselves."""
    if not from_path:
        flags |= MOVE_MOUNT_F_EMPTY_PATH
    if not to_path:
        flags |= MOVE_MOUNT_T_EMPTY_PATH
    if _syscall(
        _NR_MOVE_MOUNT,
        _int(from_fd),
        _str(_bytes(from_path)),
        _int(to_fd),
        _str(_bytes(to_path)),
        _uint(flags),
    ):
        _fail("move_mount", os.fsdecode(to_path) or f"fd {to_fd}")


def fsopen(fstype: str) -> int:
    """fsopen(2): a new file system context."""
    fd: int = _syscall(_NR_FSOPEN, _str(_bytes(fstype)), _uint(FSOPEN_CLOEXEC))
    if fd < 0:
        _fail("fsopen", fstype)
    return fd


def fsconfig_string(fs_fd: int, key: str, value: "str | bytes") -> None:
    """fsconfig(2) with FSCONFIG_SET_STRING; the kernel takes up to 255 bytes of value."""
    if _syscall(
        _NR_FSCONFIG,
        _int(fs_fd),
        _uint(FSCONFIG_SET_STRING),
        _str(_bytes(key)),
        _str(_bytes(value)),
        _int(0),
    ):
        _fail("fsconfig", f"{key}={os.fsdecode(value)}", context_log(fs_fd))


def fsconfig_flag(fs_fd: int, key: str) -> None:
    """fsconfig(2) with FSCONFIG_SET_FLAG."""
    if _syscall(
        _NR_FSCONFIG, _int(fs_fd), _uint(FSCONFIG_SET_FLAG), _str(_bytes(key)), None, _int(0)
    ):
        _fail("fsconfig", key, context_log(fs_fd))


def fsconfig_create(fs_fd: int) -> None:
    """fsconfig(2) with FSCONFIG_CMD_CREATE: makes the superblock."""
    if _syscall(_NR_FSCONFIG, _int(fs_fd), _uint(FSCONFIG_CMD_CREATE), None, None, _int(0)):
        _fail("fsconfig create", "", context_log(fs_fd))


def fsmount(fs_fd: int, attributes: int = 0) -> int:
    """fsmount(2): a descriptor of a detached mount of the context's superblock."""
    fd: int = _syscall(_NR_FSMOUNT, _int(fs_fd), _uint(FSMOUNT_CLOEXEC), _uint(attributes))
    if fd < 0:
        _fail("fsmount", "", context_log(fs_fd))
    return fd


def context_log(fs_fd: int) -> str:
    """What the kernel wrote into a file system context's log, on one line; keeps errno."""
    kept = ctypes.get_errno()
    lines = []
    while True:
        try:
            line = os.read(fs_fd, _CONTEXT_LOG_BYTES)
        except OSError:  # ENODATA: all read
            break
        if not line:
            break
        lines.append(os.fsdecode(line.strip().partition(b" ")[2]))  # "e erofs: text"
    ctypes.set_errno(kept)
    return "; ".join(lines)


def mount_setattr(
    dir_fd: int,
    path: "str | bytes",
    *,
    set_attributes: int = 0,
    clear_attributes: int = 0,
    propagation: int = 0,
    userns_fd: int = 0,
    recursive: bool = False,
) -> None:
    """mount_setattr(2), Linux 5.12+. `userns_fd` goes with MOUNT_ATTR_IDMAP."""
    flags = (0 if path else AT_EMPTY_PATH) | (AT_RECURSIVE if recursive else 0)
    attributes = _MountAttr(set_attributes, clear_attributes, propagation, userns_fd)
    if _syscall(
        _NR_MOUNT_SETATTR,
        _int(dir_fd),
        _str(_bytes(path)),
        _uint(flags),
        ctypes.byref(attributes),
        _size_t(ctypes.sizeof(attributes)),
    ):
        _fail("mount_setattr", os.fsdecode(path) or f"fd {dir_fd}")


def openat2(
    dir_fd: int, path: "str | bytes", flags: int, mode: int = 0, *, resolve: int = 0
) -> int:
    """openat2(2), Linux 5.6+, always with O_CLOEXEC; tries again while the kernel says EAGAIN."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    arguments = (_int(dir_fd), _str(_bytes(path)), ctypes.byref(how), _size_t(ctypes.sizeof(how)))
    fd: int = _syscall(_NR_OPENAT2, *arguments)
    tries = 1
    while fd < 0 and ctypes.get_errno() in (errno.EAGAIN, errno.EINTR) and tries < _OPENAT2_TRIES:
        fd = _syscall(_NR_OPENAT2, *arguments)
        tries += 1
    if fd < 0:
        _fail("openat2", os.fsdecode(path))
    return fd


def fs_type(path_or_fd: "str | bytes | int") -> int:
    """The magic number of the file system that a path or descriptor lies on (statfs(2))."""
    buffer = _Statfs()
    if isinstance(path_or_fd, int):
        if _libc.fstatfs(path_or_fd, ctypes.byref(buffer)):
            _fail("fstatfs", f"fd {path_or_fd}")
    elif _libc.statfs(_bytes(path_or_fd), ctypes.byref(buffer)):
        _fail("statfs", os.fsdecode(path_or_fd))
    return int(buffer.f_type) & 0xFFFFFFFF


def unshare(flags: int) -> None:
    """unshare(2), which os has from Python 3.12 on."""
    if _libc.unshare(flags):
        _fail("unshare")


def prctl(option: int, argument: "Any" = 0) -> None:
    """prctl(2) for the options that take one number."""
    if _libc.prctl(option, argument, 0, 0, 0) < 0:
        _fail("prctl", str(option))


def inotify_init() -> int:
    """inotify_init1(2): a descriptor that does not block and is closed on exec."""
    fd: int = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        _fail("inotify_init1")
    return fd


def inotify_add_watch(fd: int, path: "str | bytes", mask: int) -> None:
    """inotify_add_watch(2)."""
    if _libc.inotify_add_watch(fd, _bytes(path), mask) < 0:
        _fail("inotify_add_watch", os.fsdecode(path))

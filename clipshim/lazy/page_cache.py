"""Asks the kernel whether a range of a file can be read without waiting (cachestat, Linux 6.5+).

For files whose file system knows no RWF_NOWAIT, as FUSE. The answer may be stale a moment later.
"""

from __future__ import annotations

import ctypes
import errno

SYS_CACHESTAT = 451  # the same on all architectures
PAGE = 4096


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Cachestat(ctypes.Structure):
    _fields_ = (
        ("nr_cache", ctypes.c_uint64),
        ("nr_dirty", ctypes.c_uint64),
        ("nr_writeback", ctypes.c_uint64),
        ("nr_evicted", ctypes.c_uint64),
        ("nr_recently_evicted", ctypes.c_uint64),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (
    ctypes.c_long,
    ctypes.c_long,
    ctypes.POINTER(_Range),
    ctypes.POINTER(_Cachestat),
    ctypes.c_long,
)
_known = True


def is_cached(fd: int, offset: int, length: int) -> bool:
    """Whether every page of the range is in the page cache; False if the kernel cannot say."""
    global _known
    if not _known or length <= 0:
        return False
    first = offset // PAGE
    pages = (offset + length - 1) // PAGE + 1 - first
    found = _Cachestat()
    wanted = _Range(first * PAGE, pages * PAGE)
    if _syscall(SYS_CACHESTAT, fd, ctypes.byref(wanted), ctypes.byref(found), 0):
        if ctypes.get_errno() in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            _known = False
        return False
    return bool(found.nr_cache >= pages)

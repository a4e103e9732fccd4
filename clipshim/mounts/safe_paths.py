"""Opens paths that somebody else may have planted symbolic links in (openat2(2)).

Kernels before 5.6 lack openat2: there the same rules are kept by walking component by component.
For paths of our own, os.open is enough.
"""

import errno
import os
import stat

from clipshim.mounts import syscalls

_MAX_LINKS = 40  # linux/namei.h MAXSYMLINKS
_O_PATH_DIR = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def open_beneath(dir_fd: int, path: str, flags: int) -> int:
    """Opens `path` beneath a directory; no symbolic link and no `..` that leaves it is followed.

    Raises OSError: ELOOP for a link, EXDEV for a path that leaves.
    """
    resolve = (
        syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
    )
    try:
        return syscalls.openat2(dir_fd, path, flags, resolve=resolve)
    except OSError as exc:
        if exc.errno != errno.ENOSYS:
            raise
    return _walk(dir_fd, path, flags, follow=False)


def open_in_root(root_fd: int, path: str, flags: int = os.O_PATH) -> int:
    """Opens `path` as a process whose root is that directory would; links stay inside of it."""
    resolve = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
    try:
        return syscalls.openat2(root_fd, path, flags, resolve=resolve)
    except OSError as exc:
        if exc.errno != errno.ENOSYS:
            raise
    return _walk(root_fd, path, flags, follow=True)


def open_real_directory(path: str) -> "tuple[int, str]":
    """(O_PATH descriptor, name) of a directory with every link in `path` resolved beforehand.

    The name and the descriptor mean the same directory: a link that appears in between is refused.
    """
    real = os.path.realpath(path)
    try:
        return syscalls.openat2(
            syscalls.AT_FDCWD, real, _O_PATH_DIR, resolve=syscalls.RESOLVE_NO_SYMLINKS
        ), real
    except OSError as exc:
        if exc.errno != errno.ENOSYS:
            raise
    root_fd = os.open("/", _O_PATH_DIR)
    try:
        return _walk(root_fd, real, _O_PATH_DIR, follow=False), real
    finally:
        os.close(root_fd)


def is_inside(path: str, directory: str) -> bool:
    """Whether an absolute, normalised path lies in a directory, by name."""
    return path.startswith(directory.rstrip("/") + "/")


def _walk(root_fd: int, path: str, flags: int, *, follow: bool) -> int:
    """What openat2 does, in user space: for kernels that lack it."""
    stack = [os.open(".", _O_PATH_DIR, dir_fd=root_fd)]  # from the root to where we are
    todo = [part for part in path.split("/") if part not in ("", ".")]
    links = 0
    try:
        while todo:
            part = todo.pop(0)
            if part == "..":
                if len(stack) > 1:
                    os.close(stack.pop())
                elif not follow:
                    raise OSError(errno.EXDEV, "path leaves its directory", path)
                continue
            fd = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=stack[-1])
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                try:
                    links += 1
                    if not follow or links > _MAX_LINKS:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                    target = os.readlink("", dir_fd=fd)
                finally:
                    os.close(fd)
                if target.startswith("/"):
                    while len(stack) > 1:
                        os.close(stack.pop())
                todo[:0] = [piece for piece in target.split("/") if piece not in ("", ".")]
                continue
            stack.append(fd)
        # the last component is open already: opening it again by its descriptor cannot be raced
        return os.open(f"/proc/self/fd/{stack[-1]}", flags | os.O_CLOEXEC)
    finally:
        for fd in stack:
            os.close(fd)

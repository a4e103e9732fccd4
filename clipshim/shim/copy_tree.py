"""Copies a directory of a root file system with everything that an image's tree can hold.

Owners, modes, times, extended attributes, hard links, links, holes, devices and pipes. Every
directory is opened beneath the two that the caller opened, without following a link, by one path:
trees nest deeper than there are descriptors. Which directories, and when, is volumes.py's.
"""

import errno
import os
import stat

from clipshim.mounts import safe_paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK = 1 << 20
_BLOCK = 4096  # a hole of less saves nothing
# overlayfs's own, which means something else elsewhere, and labels, which follow the place
_LEFT_ATTRIBUTES = ("trusted.overlay.", "user.overlay.", "security.selinux")


class Owners:
    """Whom files of the container's belong to on the host, by one user namespace's mappings.

    Engines shift the owners of their layers, and idmap.py those of the tree where the kernel can;
    elsewhere a tree has the image's own numbers. So a number of the host's range stays.
    """

    __slots__ = ("_gids", "_uids")

    def __init__(
        self,
        uids: "Sequence[tuple[int, int, int]]" = (),
        gids: "Sequence[tuple[int, int, int]]" = (),
    ) -> None:
        self._uids, self._gids = tuple(uids), tuple(gids)  # container's, host's, how many

    def of(self, facts: os.stat_result) -> "tuple[int, int]":
        """(uid, gid) on the host. Raises OSError (EOVERFLOW) for one that is not mapped."""
        return _mapped(self._uids, facts.st_uid), _mapped(self._gids, facts.st_gid)


def _mapped(mappings: "Sequence[tuple[int, int, int]]", number: int) -> int:
    if not mappings:
        return number
    if any(outside <= number < outside + count for _, outside, count in mappings):
        return number
    for inside, outside, count in mappings:
        if inside <= number < inside + count:
            return outside + number - inside
    raise OSError(errno.EOVERFLOW, f"owner {number} is not mapped in the user namespace")


def same_content(one_fd: int, other_fd: int) -> bool:
    """Whether two directories hold the same, by names and metadata; ends at the first difference.

    Files are compared by size, owner, mode and seconds, not by bytes; directories without times.
    """
    todo = ["."]
    while todo:
        path = todo.pop()
        one = _entries(one_fd, path)
        if one != _entries(other_fd, path, at_most=len(one)):
            return False
        todo += [f"{path}/{name}" for name, facts in one.items() if stat.S_ISDIR(int(facts[0]))]
    return True


def _entries(
    top_fd: int, path: str, *, at_most: "int | None" = None
) -> "dict[str, tuple[int | str, ...]]":
    """What compares of each entry; no metadata if there are more than `at_most`."""
    fd = safe_paths.open_beneath(top_fd, path, _DIRECTORY)
    try:
        names = []
        with os.scandir(fd) as entries:
            for entry in entries:
                names.append(entry.name)
                if at_most is not None and len(names) > at_most:
                    return dict.fromkeys(names, ())
        found = {}
        for name in names:
            try:
                found[name] = _compared(name, fd)
            except FileNotFoundError:
                continue  # overlayfs lists whiteouts that cover nothing
        return found
    finally:
        os.close(fd)


def _compared(name: str, fd: int) -> "tuple[int | str, ...]":
    facts = os.lstat(name, dir_fd=fd)
    common = (facts.st_mode, facts.st_uid, facts.st_gid)
    if stat.S_ISREG(facts.st_mode):
        return (*common, facts.st_size, int(facts.st_mtime))
    if stat.S_ISLNK(facts.st_mode):
        return (*common, os.readlink(name, dir_fd=fd))
    return (*common, facts.st_rdev)


def copy_tree(source_fd: int, target_fd: int, owners: Owners, *, leave: str = "") -> None:
    """Copies all below a directory into an empty one, and the directory's own metadata.

    `leave` names an entry at the top that is not copied. Raises OSError, with the path below the
    source as its file name.
    """
    directories = []
    links: dict[tuple[int, int], tuple[str, tuple[int, int]]] = {}
    todo = ["."]
    while todo:
        path = todo.pop()
        with _Both(source_fd, target_fd, path) as (source, target):
            at_top = leave if path == "." else ""
            below = _copy_entries(source, target, target_fd, path, owners, links, at_top)
        directories.append(path)
        todo += below
    for path in reversed(directories):  # children before parents, whose times they change
        with _Both(source_fd, target_fd, path) as (source, target):
            copy_metadata(source, target, os.fstat(source), owners)


class _Both:
    """The directories of one path below two others, open for as long as the block lasts."""

    __slots__ = ("_fds", "_path", "_tops")

    def __init__(self, one_fd: int, other_fd: int, path: str) -> None:
        self._tops, self._path = (one_fd, other_fd), path
        self._fds: list[int] = []

    def __enter__(self) -> "tuple[int, int]":
        try:
            for top in self._tops:
                self._fds.append(safe_paths.open_beneath(top, self._path, _DIRECTORY))
        except BaseException:
            self.__exit__()
            raise
        return self._fds[0], self._fds[1]

    def __exit__(self, *_: object) -> None:
        while self._fds:
            os.close(self._fds.pop())


def _copy_entries(
    source: int,
    target: int,
    target_top: int,
    path: str,
    owners: Owners,
    links: "dict[tuple[int, int], tuple[str, tuple[int, int]]]",
    leave: str,
) -> "list[str]":
    """Copies one directory's entries, directories empty; the paths of these."""
    below = []
    for name in os.listdir(source):
        if name == leave:
            continue
        try:
            facts = os.lstat(name, dir_fd=source)
        except FileNotFoundError:
            continue  # overlayfs lists whiteouts that cover nothing
        try:
            if stat.S_ISDIR(facts.st_mode):
                os.mkdir(name, 0o700, dir_fd=target)
                below.append(f"{path}/{name}")
                continue
            key = (facts.st_dev, facts.st_ino)
            if facts.st_nlink > 1 and key in links:
                _link(target_top, *links[key], name, target)
                continue
            _copy_one(source, target, name, facts, owners)
            if facts.st_nlink > 1:
                made = os.lstat(name, dir_fd=target)
                links[key] = (f"{path}/{name}", (made.st_dev, made.st_ino))
        except OSError as exc:
            whole = f"{path}/{name}".removeprefix("./")
            raise OSError(exc.errno, exc.strerror, whole) from exc
    return below


def _link(top_fd: int, path: str, made: "tuple[int, int]", name: str, target: int) -> None:
    """Another name for a file that was copied, if what lies at `path` still is that file."""
    fd = safe_paths.open_beneath(top_fd, path, os.O_PATH | os.O_NOFOLLOW)
    try:
        facts = os.fstat(fd)
        if (facts.st_dev, facts.st_ino) != made:
            raise OSError(errno.ESTALE, "a copy was replaced while others were made", path)
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=target, follow_symlinks=True)
    finally:
        os.close(fd)


def _copy_one(source: int, target: int, name: str, facts: os.stat_result, owners: Owners) -> None:
    """Copies what is no directory."""
    times = (facts.st_atime_ns, facts.st_mtime_ns)
    if stat.S_ISREG(facts.st_mode):
        read = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=source)
        try:
            write = os.open(name, _NEW_FILE, 0o600, dir_fd=target)
            try:
                _copy_data(read, write)
                os.fchown(write, *owners.of(facts))  # drops setuid bits and capabilities: first
                _copy_attributes(read, write)
                os.fchmod(write, stat.S_IMODE(facts.st_mode))
                os.utime(write, ns=times)
            finally:
                os.close(write)
        finally:
            os.close(read)
        return
    if stat.S_ISLNK(facts.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
    else:
        os.mknod(name, stat.S_IFMT(facts.st_mode) | 0o600, facts.st_rdev, dir_fd=target)
    os.chown(name, *owners.of(facts), dir_fd=target, follow_symlinks=False)
    _copy_attributes(f"/proc/self/fd/{source}/{name}", f"/proc/self/fd/{target}/{name}")
    if not stat.S_ISLNK(facts.st_mode):
        # no descriptor: opening a device or a pipe does something; O_PATH takes no fchmod
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=target)
        try:
            os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(facts.st_mode))
        finally:
            os.close(fd)
    os.utime(name, ns=times, dir_fd=target, follow_symlinks=False)


def _copy_data(read: int, write: int) -> None:
    """Copies bytes; what is a hole in the source, or holds zeros only, becomes a hole."""
    size = os.fstat(read).st_size
    zeros = bytes(_BLOCK)
    at = 0
    while at < size:
        try:
            start = os.lseek(read, at, os.SEEK_DATA)
            end = min(os.lseek(read, start, os.SEEK_HOLE), size)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # only a hole is left
                break
            start, end = at, size  # a file system that does not know
        at = start
        while at < end:
            data = os.pread(read, min(_CHUNK, end - at), at)
            if not data:
                raise OSError(errno.EIO, f"the file ends at {at} of {size} bytes")
            _write_blocks(write, data, at, zeros)
            at += len(data)
    os.ftruncate(write, size)


def _write_blocks(write: int, data: bytes, at: int, zeros: bytes) -> None:
    view = memoryview(data)
    start = 0
    while start < len(data):
        # runs of blocks that are not all zeros, in as few writes as there are runs
        end = start
        while end < len(data) and data[end : end + _BLOCK] != zeros[: len(data) - end]:
            end += _BLOCK
        end = min(end, len(data))
        while start < end:
            start += os.pwrite(write, view[start:end], at + start)
        start += _BLOCK


def copy_metadata(source: int, target: int, facts: os.stat_result, owners: Owners) -> None:
    """Gives one open directory another's attributes, and owner, mode and times of `facts`."""
    os.fchown(target, *owners.of(facts))
    _copy_attributes(source, target)
    os.fchmod(target, stat.S_IMODE(facts.st_mode))
    os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def _copy_attributes(source: "int | str", target: "int | str") -> None:
    follow = isinstance(source, int)  # Python wants it so for descriptors
    try:
        names = os.listxattr(source, follow_symlinks=follow)
    except OSError as exc:
        if exc.errno == errno.ENOTSUP:
            return
        raise
    for name in names:
        if name.startswith(_LEFT_ATTRIBUTES):
            continue
        try:
            value = os.getxattr(source, name, follow_symlinks=follow)
            os.setxattr(target, name, value, follow_symlinks=follow)
        except OSError as exc:
            if exc.errno not in (errno.ENOTSUP, errno.ENODATA):  # as engines do
                raise


def move_tree(source_fd: int, target_fd: int) -> None:
    """Moves all below a directory into another one of the same file system; what is there stays.

    Directories that both have get the moved one's metadata, the two themselves too. May be
    repeated after it was interrupted. Raises OSError.
    """
    directories = []
    todo = ["."]
    while todo:
        path = todo.pop()
        with _Both(source_fd, target_fd, path) as (source, target):
            directories.append((path, os.fstat(source)))
            todo += _move_entries(source, target, path)
    for path, facts in reversed(directories):
        with _Both(source_fd, target_fd, path) as (source, target):
            copy_metadata(source, target, facts, Owners())


def _move_entries(source: int, target: int, path: str) -> "list[str]":
    both = []
    for name in os.listdir(source):
        try:
            there = os.lstat(name, dir_fd=target)
        except FileNotFoundError:
            os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
            continue
        ours = os.lstat(name, dir_fd=source)
        if stat.S_ISDIR(there.st_mode) and stat.S_ISDIR(ours.st_mode):
            both.append(f"{path}/{name}")
    return both

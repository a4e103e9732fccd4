"""Shows a tree with the owners that a container with a user namespace expects (idmapped mounts).

Such a container's root is an ordinary user of the host. What belongs to root in the image would
belong to nobody in it, and could not be changed there. Engines shift the owners of what they
unpack; a tree is shifted by its mount (Linux 5.19 and newer, mode erofs).
"""

import errno
import os

from clipshim.mounts import syscalls
from clipshim.shim import child as children

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from clipshim.shim.bundle import Bundle


def map_owners(mount_fd: int, userns_fd: int) -> bool:
    """Shifts a detached mount's owners by a user namespace's mappings; False if that cannot be.

    Then the container sees the files as nobody's.
    """
    try:
        syscalls.mount_setattr(
            mount_fd, "", set_attributes=syscalls.MOUNT_ATTR_IDMAP, userns_fd=userns_fd
        )
    except OSError as exc:
        # a kernel or a file system (FUSE) that cannot, or a tree that is somebody's directory
        if exc.errno in (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP):
            return False
        raise
    return True


class MappedLayers:
    """An engine's layers as they were while it mounted its overlay of them.

    containers/storage (drivers/overlay/overlay.go) names the layers below ID/mapped/NUMBER, where
    it has its home directory mounted with shifted owners for that moment only.
    """

    __slots__ = ("_attached", "_lowers", "_userns_fd")

    def __init__(self, lowers: "Sequence[str]", userns_fd: int) -> None:
        self._lowers, self._userns_fd = lowers, userns_fd
        self._attached: list[str] = []

    def __enter__(self) -> None:
        try:
            for root in sorted({mapped_root(lower) for lower in self._lowers} - {""}):
                self._attach(root)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        while self._attached:
            # the overlay keeps a clone of the mount
            syscalls.umount2(self._attached.pop(), syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)

    def _attach(self, root: str) -> None:
        home = os.path.dirname(os.path.dirname(os.path.dirname(root)))
        fd = syscalls.open_tree(syscalls.AT_FDCWD, home, syscalls.OPEN_TREE_CLONE)
        try:
            if map_owners(fd, self._userns_fd):
                os.makedirs(root, 0o700, exist_ok=True)
                syscalls.move_mount(fd, "", syscalls.AT_FDCWD, root)
                self._attached.append(root)
        finally:
            os.close(fd)


def mapped_root(lower: str) -> str:
    """HOME/ID/mapped/NUMBER of a layer that is no longer there by this name; else empty."""
    head, found, rest = lower.rpartition("/mapped/")
    number, _, name = rest.partition("/")
    if not found or not number.isdigit() or not name.startswith("l/") or os.path.isdir(lower):
        return ""
    return f"{head}/mapped/{number}"


def user_namespace(bundle: "Bundle") -> int:
    """A descriptor of the container's user namespace, or of one with the same mappings.

    -1 if there is none, or what the bundle says of it is wrong: that is the low-level runtime's to
    refuse.
    """
    try:
        return _open_namespace(bundle) if bundle.maps_users else -1
    except (OSError, TypeError, ValueError, KeyError):
        return -1


def _open_namespace(bundle: "Bundle") -> int:
    if bundle.user_namespace:
        return os.open(bundle.user_namespace, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    linux = bundle.config["linux"]
    maps = {
        "uid_map": _lines(linux["uidMappings"]),
        "gid_map": _lines(linux.get("gidMappings") or []),
    }
    children.keep_children()
    ready_read, ready_write = os.pipe()
    done_read, done_write = os.pipe()
    child = os.fork()
    if child == 0:  # stays in a new user namespace until the descriptor of that is open
        try:
            os.close(done_write)
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            os.write(ready_write, b"1")
            os.read(done_read, 1)
        finally:
            os._exit(0)
    try:
        os.close(ready_write)
        os.close(done_read)
        if not os.read(ready_read, 1):
            raise OSError(errno.EPERM, "no user namespace can be made")
        for name, text in maps.items():
            fd = os.open(f"/proc/{child}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text)  # the kernel takes it whole or not at all
            finally:
                os.close(fd)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(done_write)
        os.close(ready_read)
        os.waitpid(child, 0)


def _lines(mappings: "list[dict[str, Any]]") -> bytes:
    """Mappings as user_namespaces(7) wants them."""
    rows = [f"{int(m['containerID'])} {int(m['hostID'])} {int(m['size'])}\n" for m in mappings]
    return "".join(rows).encode()

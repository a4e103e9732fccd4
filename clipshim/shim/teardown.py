"""Takes down what `create` made for a container: mounts, directories, the daemon's hold.

Used by delete, by a create that finds what a crash left, and by the node daemon's clean-up. It
works from the state file alone and may be repeated. A graft stays mounted: the engine mounted an
overlay at that place and takes down what it finds there.
"""

import errno
import os

from clipshim.errors import ClipError
from clipshim.mounts import mountinfo, syscalls
from clipshim.shim import bundle, daemon_client
from clipshim.shim.bundle_lock import BundleLock
from clipshim.shim.state import KEPT_CONFIG
from clipshim.shim.trace import trace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from clipshim.settings import Settings
    from clipshim.shim.state import ContainerState

_MAX_STACKED = 64
_MAX_DEPTH = 64


def tear_down(
    settings: "Settings",
    state: "ContainerState",
    *,
    keep_upper: bool = False,
    keep_directory: bool = False,
) -> None:
    """Removes a container's rootfs and directories, and tells the daemon.

    The caller holds the container's lock and knows that the runtime has forgotten the container.
    `keep_upper` leaves what the container wrote and its state, for `restore`; `keep_directory`
    leaves the locked directory, for a create. Raises OSError if something stayed.
    """
    for name in ("lower", "layers"):
        unmount_all(f"{state.directory}/{name}")
    if state.text("kind") == "own":
        unmount_all(f"{state.directory}/rootfs")
        if state.values.get("in_place"):
            _unmount_in_place(state)
        else:
            try:
                put_config_back(state)
            except ClipError:
                pass  # the engine's bundle may be gone or read-only; it is the engine's to remove
    trace("teardown-unmounted")
    for path in state.values.get("volumes") or ():
        from clipshim.shim import volumes  # only where create may have filled some

        volumes.clean_up(path)
    if not keep_upper:
        for path in (settings.upper_dir(state.key), settings.work_dir(state.key)):
            remove_tree(path)
        trace("teardown-upper")
        forget(settings, state.directory, keep_directory=keep_directory)


def forget(settings: "Settings", directory: str, *, keep_directory: bool = False) -> None:
    """Tells the daemon that a container is gone, and removes its directory, the lock last."""
    daemon_client.tell(
        settings.daemon_socket, {"op": "release", "container": os.path.basename(directory)}
    )
    trace("teardown-released")
    for name in ("rootfs", "lower", "layers"):
        try:
            os.rmdir(f"{directory}/{name}")
        except FileNotFoundError:
            continue
    names = [".state.json.tmp", "state.json", KEPT_CONFIG]
    if not keep_directory:
        names.append("lock")
    for name in names:
        try:
            os.unlink(f"{directory}/{name}")
        except FileNotFoundError:
            continue
    if not keep_directory:
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            return


def unmount_all(path: str) -> None:
    """Unmounts everything mounted at a path of ours, however often."""
    for _ in range(_MAX_STACKED):
        try:
            syscalls.umount2(path, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        except OSError as exc:
            if exc.errno in (errno.EINVAL, errno.ENOENT):  # not a mount point, or nothing there
                return
            raise


def remove_tree(path: str) -> None:
    """Removes a directory of ours with what containers wrote into it; follows no link.

    Does not cross into other mounts: a mount point in it makes this fail, as it should.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        _empty(fd)
    finally:
        os.close(fd)
    os.rmdir(path)


def _empty(top_fd: int) -> None:
    """Removes all below a directory without recursion: containers nest as deep as they like.

    Each level takes a descriptor, of which there may be few: what lies too deep is moved up first.
    """
    stack = [(top_fd, list(os.scandir(top_fd)), "")]
    moved, look_again = 0, False
    try:
        while stack:
            fd, entries, _ = stack[-1]
            if not entries:
                _, _, name = stack.pop()
                if stack:
                    os.close(fd)
                    os.rmdir(name, dir_fd=stack[-1][0])
                elif look_again:
                    look_again = False
                    stack.append((fd, list(os.scandir(fd)), name))
                continue
            entry = entries.pop()
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=fd)
                continue
            try:
                os.rmdir(entry.name, dir_fd=fd)
                continue
            except OSError:
                pass
            if len(stack) >= _MAX_DEPTH:
                moved, look_again = _move_up(entry.name, fd, top_fd, moved), True
                continue
            below = os.open(
                entry.name,
                os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                dir_fd=fd,
            )
            stack.append((below, list(os.scandir(below)), entry.name))
    finally:
        for fd, _, _ in stack[1:]:
            os.close(fd)


def _move_up(name: str, fd: int, top_fd: int, number: int) -> int:
    """Moves a directory to the top under a name with `number` or a higher one; the next number."""
    while True:
        try:
            os.rename(name, f".clipshim-{number}", src_dir_fd=fd, dst_dir_fd=top_fd)
            return number + 1
        except OSError as exc:  # a directory or a file of that name is there
            if exc.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            number += 1


def _unmount_in_place(state: "ContainerState") -> None:
    """Unmounts an own rootfs from root.path, if what is mounted there is that."""
    path, ours = state.text("rootfs"), state.text("upper")
    mount = mountinfo.mount_at(path) if ours else None
    if mount is not None and f"upperdir={ours}" in mount.super_options:
        syscalls.umount2(path, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)


def put_config_back(state: "ContainerState") -> None:
    """Makes config.json what it was before root.path was rewritten. Raises ClipError."""
    path, original = state.text("bundle"), state.text("original_root")
    if not path or not original:
        return
    with BundleLock(path):
        bundle.restore_root_path(path, state.text("rootfs"), original, state.kept_config)

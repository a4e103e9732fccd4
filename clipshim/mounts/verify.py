"""Checks that a mounted root file system is fit to start a container from.

runc refuses a mount target whose link count is 0 ("wandered into deleted directory"), and an empty
directory where the tree should be would start a container on nothing: each is found here, before
runc, and named in one error with path, expected and found. It changes nothing but a missing /proc.
"""

import os
import stat

from clipshim.errors import VerifyError
from clipshim.mounts import mountinfo, safe_paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def verify_tree(
    path: str, expected_device: int, top_symlinks: "Mapping[str, str] | None" = None
) -> None:
    """Checks that the directory `path` is the tree itself and not what lies beneath its mount.

    `top_symlinks` are links at its top that lead to something in it.
    """
    root_fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(root_fd).st_dev
        if found != expected_device:
            raise VerifyError(
                f"tree at {path}: expected device {expected_device:#x}, found {found:#x}",
                hint="the mount is not visible in this mount namespace",
            )
        for name in ("/", "/proc", "/usr"):
            try:
                _verify_directory(root_fd, f"tree {path}", name, min_links=2)
            except FileNotFoundError:
                continue  # missing directories are verify_rootfs's to judge
        for name, target in (top_symlinks or {}).items():
            _verify_link(root_fd, f"tree {path}", name, target)
    finally:
        os.close(root_fd)


def verify_rootfs(
    path: str,
    *,
    fstype: "str | None",
    has_usr: bool,
    top_symlinks: "Mapping[str, str]",
    readonly: bool = False,
) -> None:
    """Checks a merged root: the planned mount, /proc, /usr, links at the top.

    `fstype` is the file system that must be mounted exactly at `path`; None skips that check.
    /proc is created if the image has none. Raises VerifyError.
    """
    root_fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if fstype:
            _verify_mount(root_fd, path, fstype)
        # overlayfs gives directories that it merges from several layers one link (fs/overlayfs
        # ovl_getattr); what runc refuses is none at all. The tree's own are checked beforehand.
        links = 1 if fstype in ("overlay", "fuse.fuse-overlayfs") else 2
        where = f"rootfs {path}"
        _verify_directory(root_fd, where, "/", min_links=links)
        try:
            _verify_directory(root_fd, where, "/proc", min_links=links)
        except FileNotFoundError:
            if readonly:
                raise VerifyError(
                    f"rootfs {path}: /proc: expected a directory, found nothing",
                    hint="the root is read-only, so that it cannot be created",
                ) from None
            try:
                os.mkdir("proc", 0o555, dir_fd=root_fd)
            except FileExistsError:
                raise VerifyError(
                    f"rootfs {path}: /proc: expected a directory, found a link that leads nowhere"
                ) from None
            _verify_directory(root_fd, where, "/proc", min_links=links)
        if has_usr:
            try:
                _verify_directory(root_fd, where, "/usr", min_links=links)
            except FileNotFoundError:
                raise VerifyError(
                    f"rootfs {path}: /usr: expected a directory, found nothing"
                ) from None
        for name, target in top_symlinks.items():
            _verify_link(root_fd, where, name, target)
    finally:
        os.close(root_fd)


def _verify_mount(root_fd: int, path: str, fstype: str) -> None:
    try:
        mount = mountinfo.mount_of_fd(root_fd)
    except LookupError as exc:
        raise VerifyError(f"rootfs {path}: expected a mount of {fstype}: {exc}") from exc
    if mount.mount_point != path or mount.fstype != fstype:
        raise VerifyError(
            f"rootfs {path}: expected {fstype} mounted there, "
            f"found {mount.fstype} mounted at {mount.mount_point}"
        )


def _verify_directory(root_fd: int, where: str, name: str, *, min_links: int) -> None:
    """Raises FileNotFoundError when there is nothing, VerifyError when it is something else."""
    try:
        fd = safe_paths.open_in_root(root_fd, name)
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise VerifyError(f"{where}: {name}: expected a directory: {exc}") from exc
    try:
        facts = os.fstat(fd)
    finally:
        os.close(fd)
    if not stat.S_ISDIR(facts.st_mode):
        raise VerifyError(f"{where}: {name}: expected a directory, found mode {facts.st_mode:o}")
    if facts.st_nlink < min_links:
        raise VerifyError(
            f"{where}: {name}: expected at least {min_links} links, found {facts.st_nlink}",
            hint="runc would call this a deleted directory",
        )


def _verify_link(root_fd: int, where: str, name: str, target: str) -> None:
    """Checks a link at the top of the image whose target the image has (`bin -> usr/bin`)."""
    try:
        found = os.readlink(name, dir_fd=root_fd)
    except OSError:
        return  # a layer of the engine above the tree may have put something else there
    if found != target:
        return
    try:
        os.close(safe_paths.open_in_root(root_fd, name))
    except OSError as exc:
        raise VerifyError(
            f"{where}: /{name} -> {target}: expected the target, found none: {exc}"
        ) from exc

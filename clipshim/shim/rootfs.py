"""Makes a container's root file system out of a tree: an own rootfs, or a graft.

own    overlay over the tree with clipshim's upper and work directory, mounted at
       <run_dir>/<cid>/rootfs; the caller rewrites root.path
graft  the engine's own overlay, mounted again in place with the tree as its lowest layer (a stub)
       or instead of its layers (an image that was named); what is written stays the engine's

What cannot be grafted because it is no overlay (a bind mount, a directory) becomes an own rootfs
that has the engine's rootfs above the tree.
"""

import os

from clipshim.errors import MountError, VerifyError
from clipshim.mounts import graft, mountinfo, overlay, safe_paths, syscalls, verify
from clipshim.shim.trace import trace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from clipshim.settings import Settings
    from clipshim.shim.state import ContainerState
    from clipshim.shim.undo import Undo

_FUSE_OVERLAYFS = "fuse.fuse-overlayfs"


class Tree:
    """What the daemon says of a mounted tree, and a descriptor of a detached copy of its mount."""

    __slots__ = ("facts", "fd")

    def __init__(self, facts: "dict[str, Any]", fd: int) -> None:
        self.facts = facts
        self.fd = fd

    @property
    def has_usr(self) -> bool:
        """Whether the image has a directory /usr."""
        return self.facts.get("has_usr") is True

    @property
    def top_symlinks(self) -> "dict[str, str]":
        """Links at the top of the image whose targets it has."""
        found = self.facts.get("top_symlinks")
        if not isinstance(found, dict):
            return {}
        return {
            str(name): target
            for name, target in found.items()
            if isinstance(target, str) and "/" not in str(name)
        }


def engine_overlay(rootfs: str, run_dir: str) -> "graft.EngineOverlay | None":
    """The overlay that an engine mounted exactly at `rootfs`, None if there is none to graft."""
    fd, real = safe_paths.open_real_directory(rootfs)
    try:
        mount = mountinfo.mount_of_fd(fd)
    except LookupError:
        return None
    finally:
        os.close(fd)
    if mount.fstype == _FUSE_OVERLAYFS:
        return _fuse_overlay(mount, real)
    if mount.mount_point != real or mount.fstype != "overlay":
        return None
    engine = graft.read_engine_overlay(mount)
    # a create that was killed may have left a graft: its tree is not one of the engine's layers
    engine.lowers = tuple(
        name
        for name in engine.lowers
        if not (safe_paths.is_inside(name, run_dir) and name.endswith("/lower"))
    )
    return engine


def _fuse_overlay(mount: mountinfo.Mount, real: str) -> "graft.EngineOverlay | None":
    if mount.mount_point == real and (engine := graft.read_fuse_overlay(mount)) is not None:
        return engine
    for other in mountinfo.read_mounts():
        if other.device != mount.device or other.mount_point == mount.mount_point:
            continue
        if graft.read_fuse_overlay(other) is not None:
            # buildah's builds: a second fuse-overlayfs on the same layers would not be seen by the
            # first, from which the build takes its result
            raise MountError(
                f"rootfs {real}: expected an overlay mounted there, found a part of fuse-overlayfs "
                f"at {other.mount_point}, which would not see what the container writes",
                hint="build on stubs without mount_program in storage.conf, or on the full image",
            )
    return None


def mount_rootfs(
    settings: "Settings",
    state: "ContainerState",
    tree: Tree,
    engine: "graft.EngineOverlay | None",
    undo: "Undo",
    *,
    reuse_upper: bool = False,
    userns_fd: int = -1,
) -> str:
    """Mounts what the state plans; returns the rootfs. Raises MountError and VerifyError.

    Each thing that is made is pushed on `undo`, which the caller unwinds on failure. With
    `reuse_upper` the upper directory is there already and stays, whatever happens. With `userns_fd`
    the tree's owners are shifted as in that user namespace.
    """
    lower = f"{state.directory}/lower"
    try:
        expected_device = os.fstat(tree.fd).st_dev
        if userns_fd >= 0:
            from clipshim.shim import idmap  # only with a user namespace

            idmap.map_owners(tree.fd, userns_fd)
        with _Attached(tree.fd, lower):
            trace("create-attached")
            # what lies above the tree, once somebody has written there, may lack a link's target
            untouched = engine is None and not reuse_upper and not state.values.get("lowers")
            links = tree.top_symlinks
            verify.verify_tree(lower, expected_device, {} if untouched else links)
            if engine is not None:
                target = _mount_graft(engine, lower, undo, userns_fd)
            else:
                target = _mount_own(settings, state, lower, undo, reuse_upper=reuse_upper)
        trace("create-mounted")
    except OSError as exc:
        raise MountError(f"container {state.text('id')}: {exc}") from exc
    _verify(settings, tree, target, engine, links if untouched else {})
    trace("create-verified")
    return target


class _Attached:
    """The tree's mount, attached in our mount namespace for as long as the block lasts.

    A path of the daemon's may not exist here, or name the empty directory beneath the mount
    (buildah has a mount namespace of its own); the descriptor means the tree everywhere.
    """

    __slots__ = ("_fd", "_path")

    def __init__(self, fd: int, path: str) -> None:
        self._fd, self._path = fd, path

    def __enter__(self) -> None:
        _make_directory(self._path, 0o700)
        try:
            syscalls.move_mount(self._fd, "", syscalls.AT_FDCWD, self._path)
        except BaseException:
            os.rmdir(self._path)
            raise

    def __exit__(self, *_: object) -> None:
        # the overlay keeps a private clone of the mount
        syscalls.umount2(self._path, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        os.rmdir(self._path)


def _mount_graft(engine: "graft.EngineOverlay", lower: str, undo: "Undo", userns_fd: int) -> str:
    flags = syscalls.UMOUNT_NOFOLLOW
    layers = _EngineLayers(engine, userns_fd, f"{os.path.dirname(lower)}/layers")
    try:
        syscalls.umount2(engine.target, flags)
    except OSError as exc:
        raise MountError(
            f"rootfs {engine.target}: the engine's overlay cannot be replaced: {exc}"
        ) from exc
    if engine.lowers:  # none: what an interrupted create has left, which nobody can put back
        undo.push(_mount_again, engine, layers)
    trace("create-unmounted")
    if engine.volatile and engine.work:
        graft.forget_volatile(engine.work)
    layers.execute(engine.graft_plan(lower))
    undo.push(syscalls.umount2, engine.target, flags | syscalls.MNT_DETACH)
    return engine.target


def _mount_again(engine: "graft.EngineOverlay", layers: "_EngineLayers") -> None:
    if engine.volatile and engine.work:
        graft.forget_volatile(engine.work)
    layers.execute(engine.plan())


class _EngineLayers:
    """The layers that an engine's overlay, still mounted, is made of; plans are executed on them.

    With a user namespace the engine had them mounted with shifted owners while it mounted the
    overlay, and so must we.
    """

    __slots__ = ("_directory", "_found", "_is_fuse", "_userns_fd")

    def __init__(self, engine: "graft.EngineOverlay", userns_fd: int, directory: str) -> None:
        self._is_fuse, self._userns_fd, self._directory = engine.is_fuse, userns_fd, directory
        self._found = None
        if userns_fd >= 0:
            from clipshim.shim import mapped_layers  # only with a user namespace

            try:
                self._found = mapped_layers.find(engine)
            except (MountError, OSError):
                if not engine.hides_layers:
                    raise
                engine.lowers = ()  # the graft needs none; what was there nobody can put back

    def execute(self, plan: overlay.OverlayPlan) -> None:
        if self._userns_fd < 0:
            _execute(plan, fuse=self._is_fuse)
            return
        from clipshim.shim import idmap, mapped_layers  # only with a user namespace

        containerds = mapped_layers.Attached(self._found, plan, self._userns_fd, self._directory)
        with containerds, idmap.MappedLayers(plan.lowers, self._userns_fd):
            _execute(plan, fuse=self._is_fuse)


def _mount_own(
    settings: "Settings",
    state: "ContainerState",
    lower: str,
    undo: "Undo",
    *,
    reuse_upper: bool,
) -> str:
    upper, work, target = state.text("upper"), state.text("work"), state.text("rootfs")
    in_place = target if state.values.get("in_place") else ""
    if in_place:
        _refuse_another_rootfs(settings, in_place)
    for path in (os.path.dirname(upper), os.path.dirname(work)):
        os.makedirs(path, 0o700, exist_ok=True)
        overlay.refuse_volatile(path, "upper directory")
    for path, mode in ((work, 0o700), (upper, 0o755), (target, 0o755)):
        if (reuse_upper or path == in_place) and os.path.isdir(path):
            continue
        undo.push(_remove_made, path)
        _make_directory(path, mode)
        if path == upper:
            # the root of the rootfs is the upper directory's inode: it must look like the image's
            facts = os.stat(lower)
            os.chown(upper, facts.st_uid, facts.st_gid)
            os.chmod(upper, facts.st_mode & 0o7777)
    above = [name for name in state.values.get("lowers", ()) if isinstance(name, str)]
    if reuse_upper:
        graft.forget_volatile(work)
    # volatile: what a container wrote goes with it; without, unmounting writes out the whole disk
    options = (*overlay.FIXED_OPTIONS, overlay.VOLATILE)
    plan = overlay.OverlayPlan(target, [*above, lower], upper=upper, work=work, options=options)
    _execute(plan, fuse=settings.overlay == "fuse-overlayfs")
    undo.push(syscalls.umount2, target, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    return target


def _refuse_another_rootfs(settings: "Settings", path: str) -> None:
    """Two rootfs on top of each other: neither could be taken away without the other."""
    mount = mountinfo.mount_at(path)
    ours = f"upperdir={settings.upper_dir('')}"
    if mount is not None and any(option.startswith(ours) for option in mount.super_options):
        raise MountError(
            f"rootfs {path}: expected nothing mounted there, found another container's rootfs",
            hint="delete that container, or give each container with a user namespace a bundle",
        )


def _remove_made(path: str) -> None:
    from clipshim.shim.teardown import remove_tree  # only when something failed

    remove_tree(path)


def _make_directory(path: str, mode: int) -> None:
    os.mkdir(path, mode)
    os.chmod(path, mode)  # whatever the umask


def _execute(plan: overlay.OverlayPlan, *, fuse: bool) -> None:
    if not fuse:
        plan.execute()
        return
    from clipshim.shim import child, runtimes  # only with fuse-overlayfs

    program = runtimes.find_program("fuse-overlayfs")
    if not program:
        raise MountError(
            f"{plan.describe()}: the program fuse-overlayfs was not found",
            hint='install fuse-overlayfs, or set overlay = "kernel"',
        )
    code, text = child.run_quietly(overlay.fuse_overlayfs_command(plan, program))
    if code:
        raise MountError(f"{plan.describe()}: fuse-overlayfs ended with {code}: {text}")


def _verify(
    settings: "Settings",
    tree: Tree,
    target: str,
    engine: "graft.EngineOverlay | None",
    top_symlinks: "dict[str, str]",
) -> None:
    fuse = engine.is_fuse if engine is not None else settings.overlay == "fuse-overlayfs"
    try:
        verify.verify_rootfs(
            target,
            fstype=_FUSE_OVERLAYFS if fuse else "overlay",
            has_usr=tree.has_usr,
            top_symlinks=top_symlinks,
            readonly=engine is not None and (not engine.upper or "ro" in engine.mount_options),
        )
    except OSError as exc:
        raise VerifyError(f"rootfs {target}: {exc}") from exc

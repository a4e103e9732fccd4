"""Overlay mounts: a plan that says what will be mounted, and carries it out.

Kernel overlayfs through the new mount API, one layer a call, so that neither the number of layers
nor their names meet the page that mount(2) cuts its options at; on kernels without it, mount(2)
with short names. fuse-overlayfs when the configuration asks for it.
"""

import errno
import os

from clipshim.errors import MountError
from clipshim.mounts import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# index=off: an upper directory reused with other lower layers must mount (a graft after an engine's
# restart); metacopy=off: engines' diff and commit read files of the upper directory as whole.
FIXED_OPTIONS = ("index=off", "metacopy=off")
VOLATILE = "volatile"  # from Linux 5.10: nothing is ever synced, at unmounting neither
VOLATILE_FILE_SYSTEMS = {
    syscalls.TMPFS_MAGIC: "tmpfs",
    syscalls.RAMFS_MAGIC: "ramfs",
}

# filesystems/overlayfs.rst, "Upper and Lower"
_UNFIT_FILE_SYSTEMS = {
    syscalls.OVERLAYFS_SUPER_MAGIC: "overlayfs",
    syscalls.NFS_SUPER_MAGIC: "NFS",
    syscalls.FUSE_SUPER_MAGIC: "FUSE",
}
_CLASSIC_BYTES = 3000  # of names; mount(2) takes a page of options
_CONFIG_STRING_BYTES = 255  # fs/fsopen.c: longer values of fsconfig are refused
_ATTRIBUTES = {
    "ro": (syscalls.MOUNT_ATTR_RDONLY, syscalls.MS_RDONLY),
    "nosuid": (syscalls.MOUNT_ATTR_NOSUID, syscalls.MS_NOSUID),
    "nodev": (syscalls.MOUNT_ATTR_NODEV, syscalls.MS_NODEV),
    "noexec": (syscalls.MOUNT_ATTR_NOEXEC, syscalls.MS_NOEXEC),
    "noatime": (syscalls.MOUNT_ATTR_NOATIME, syscalls.MS_NOATIME),
}


class OverlayPlan:
    """One overlay mount. `lowers` from the uppermost to the lowest; no upper means read-only."""

    __slots__ = ("lowers", "mount_options", "options", "source", "target", "upper", "work")

    def __init__(
        self,
        target: str,
        lowers: "Sequence[str]",
        *,
        upper: "str | None" = None,
        work: "str | None" = None,
        options: "Sequence[str]" = FIXED_OPTIONS,
        mount_options: "Sequence[str]" = (),
        source: str = "overlay",
    ) -> None:
        self.target = target
        self.lowers = tuple(lowers)
        self.upper = upper
        self.work = work
        self.options = tuple(options)
        self.mount_options = tuple(mount_options)
        self.source = source

    def describe(self) -> str:
        """One line for messages and logs."""
        upper = f", upper {self.upper}" if self.upper else ""
        return f"overlay at {self.target}: lower {':'.join(self.lowers)}{upper}"

    def execute(self) -> None:
        """Mounts it; not volatile where the kernel cannot. Raises MountError."""
        try:
            try:
                self._mount_either_way()
            except OSError as exc:
                if exc.errno != errno.EINVAL or VOLATILE not in self.options:
                    raise
                self.options = tuple(option for option in self.options if option != VOLATILE)
                self._mount_either_way()
        except OSError as exc:
            raise MountError(f"{self.describe()}: {exc}", hint=self._hint(exc)) from exc

    def _hint(self, exc: OSError) -> "str | None":
        """What the kernel says in its log only."""
        if exc.errno != errno.EINVAL or not self.upper:
            return None
        kind = _UNFIT_FILE_SYSTEMS.get(syscalls.fs_type(self.upper))
        return f"overlayfs cannot write to {kind}: use ext4, xfs or btrfs" if kind else None

    def _mount_either_way(self) -> None:
        try:
            self._mount_new_api()
        except OSError as exc:
            # ENOSYS: before Linux 5.2; EINVAL: `lowerdir+` is of Linux 6.8
            if exc.errno not in (errno.ENOSYS, errno.EINVAL):
                raise
            self._mount_classic()

    def _mount_new_api(self) -> None:
        held: list[int] = []  # descriptors that stand for names that fsconfig does not take

        def name(path: str, *, unescaped: bool = False) -> str:
            fits = len(os.fsencode(path)) <= _CONFIG_STRING_BYTES
            if fits and not (unescaped and "\\" in path):
                return path
            held.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            return f"/proc/self/fd/{held[-1]}"

        context = syscalls.fsopen("overlay")
        try:
            syscalls.fsconfig_string(context, "source", self.source)
            for lower in self.lowers:
                syscalls.fsconfig_string(context, "lowerdir+", name(lower))
            if self.upper and self.work:
                # fs/overlayfs/params.c takes backslashes out of these two, whichever way they come
                upper, work = (name(path, unescaped=True) for path in (self.upper, self.work))
                syscalls.fsconfig_string(context, "upperdir", upper)
                syscalls.fsconfig_string(context, "workdir", work)
            for option in self.options:
                key, equals, value = option.partition("=")
                if equals:
                    syscalls.fsconfig_string(context, key, value)
                else:
                    syscalls.fsconfig_flag(context, key)
            syscalls.fsconfig_create(context)
            attributes = 0
            for option in self.mount_options:
                attributes |= _ATTRIBUTES.get(option, (0, 0))[0]
            mounted = syscalls.fsmount(context, attributes)
        finally:
            os.close(context)
            for fd in held:
                os.close(fd)
        try:
            syscalls.move_mount(mounted, "", syscalls.AT_FDCWD, self.target)
        finally:
            os.close(mounted)

    def _mount_classic(self) -> None:
        """mount(2) with the names as they are, or numbers of descriptors if those do not fit.

        mountinfo shows what was passed, and teardown.py looks for the upper directory there.
        """
        held: list[int] = []
        names = [name for name in (*self.lowers, self.upper, self.work) if name]
        size = sum(len(os.fsencode(name)) + 1 for name in names)
        plain = size <= _CLASSIC_BYTES and not any(c in name for name in names for c in "\\:,")

        def name(path: str) -> str:
            if plain:
                return os.path.abspath(path)
            held.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            return str(held[-1])

        flags = 0
        for option in self.mount_options:
            flags |= _ATTRIBUTES.get(option, (0, 0))[1]
        before = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            options = [f"lowerdir={':'.join(name(lower) for lower in self.lowers)}"]
            if self.upper and self.work:
                options += [f"upperdir={name(self.upper)}", f"workdir={name(self.work)}"]
            options += self.options
            os.chdir("/proc/self/fd")  # 1000 layers fit into one page, and nothing needs an escape
            syscalls.mount(self.source, self.target, "overlay", flags, ",".join(options))
        finally:
            os.fchdir(before)
            os.close(before)
            for fd in held:
                os.close(fd)


def refuse_volatile(path: str, what: str) -> None:
    """Raises MountError if a directory lies on tmpfs or ramfs, which a reboot or memory bounds."""
    kind = VOLATILE_FILE_SYSTEMS.get(syscalls.fs_type(path))
    if kind:
        raise MountError(
            f"{what} {path}: expected a persistent file system, found {kind}",
            hint="set state_dir in the configuration to a directory on a disk",
        )


def fuse_overlayfs_command(plan: OverlayPlan, program: str) -> "list[str]":
    """The command that mounts a plan with fuse-overlayfs, which then stays in the background.

    Raises MountError for a layer that it cannot name.
    """
    for lower in plan.lowers:
        if ":" in lower:
            raise MountError(
                f"{plan.describe()}: fuse-overlayfs takes no colon in a layer: {lower}",
                hint='use overlay = "kernel", or directories without a colon',
            )
    options = [f"lowerdir={':'.join(_escaped(lower) for lower in plan.lowers)}"]
    if plan.upper and plan.work:
        options += [f"upperdir={_escaped(plan.upper)}", f"workdir={_escaped(plan.work)}"]
    options += plan.mount_options
    return [program, "-o", ",".join(options), plan.target]


def _escaped(path: str) -> str:
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")

"""Reads how an engine mounted a container's overlay, and plans the same with a tree beneath it.

Kernel overlays are described by mountinfo, those of fuse-overlayfs by the engine's storage. What is
kept of the engine's options and what is not is decided here, in `graft_plan`; mounting is
overlay.py's. The parser takes what Linux 4.18 to 6.18 print in mountinfo.
"""

import os

from clipshim.errors import MountError
from clipshim.mounts import overlay

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from clipshim.mounts.mountinfo import Mount

_KEPT_OPTIONS = ("userxattr", "uuid", "context", "fscontext", "defcontext", "rootcontext")
_KEPT_MOUNT_OPTIONS = ("ro", "nosuid", "nodev", "noexec", "noatime")


class EngineOverlay:
    """An overlay as an engine mounted it, with absolute names."""

    __slots__ = (
        "hides_layers",
        "is_fuse",
        "lowers",
        "mount_options",
        "options",
        "source",
        "target",
        "upper",
        "volatile",
        "work",
    )

    def __init__(
        self,
        *,
        target: str,
        source: str,
        lowers: "Sequence[str]",
        upper: "str | None",
        work: "str | None",
        options: "Sequence[str]",
        mount_options: "Sequence[str]",
        volatile: bool,
        is_fuse: bool = False,
    ) -> None:
        self.target, self.source = target, source
        self.lowers, self.upper, self.work = tuple(lowers), upper, work
        self.options = tuple(options)  # as the kernel takes them, without layers
        self.mount_options = tuple(mount_options)
        self.volatile = volatile
        self.hides_layers = False  # a graft is to have the tree in place of the engine's layers
        self.is_fuse = is_fuse  # mounted by fuse-overlayfs, and to be mounted by it again

    def plan(self) -> overlay.OverlayPlan:
        """The engine's own mount again: what undoing a graft puts back."""
        return overlay.OverlayPlan(
            self.target,
            self.lowers,
            upper=self.upper,
            work=self.work,
            options=self.options,
            mount_options=self.mount_options,
            source=self.source,
        )

    def graft_plan(self, tree: str) -> overlay.OverlayPlan:
        """The same overlay with `tree` as its lowest layer, or as its only one.

        redirect_dir is not kept: a directory of the tree that was renamed with a redirect would be
        an empty one to the engine's diff and commit, which mount the layers without the tree.
        """
        kept = [option for option in self.options if option.partition("=")[0] in _KEPT_OPTIONS]
        options = [*overlay.FIXED_OPTIONS, *kept]
        if self.volatile:
            options.append("volatile")
        return overlay.OverlayPlan(
            self.target,
            (tree,) if self.hides_layers else (*self.lowers, tree),
            upper=self.upper,
            work=self.work,
            options=options,
            mount_options=self.mount_options,
            source=self.source,
        )


def read_engine_overlay(mount: "Mount") -> EngineOverlay:
    """Takes an overlay mount apart. Raises MountError for what cannot be grafted."""
    lowers: list[str] = []
    upper = work = None
    options: list[str] = []
    volatile = False
    for option in _rejoined(mount.super_options):
        key, equals, value = option.partition("=")
        if key == "lowerdir":
            lowers = split_lowerdir(value)
        elif key == "lowerdir+":
            lowers.append(value)
        elif key == "datadir+":
            raise MountError(
                f"overlay at {mount.mount_point}: expected ordinary layers, found data-only ones"
            )
        elif key == "upperdir":
            upper = value
        elif key == "workdir":
            work = value
        elif option in ("volatile", "fsync=volatile"):  # the latter is Linux 6.18's
            volatile = True
        elif key not in ("rw", "ro", "seclabel", "lowerdir_count") and (
            equals or key == "userxattr"
        ):
            options.append(option)
    if not lowers:
        raise MountError(
            f"overlay at {mount.mount_point}: expected layers, found none in mountinfo"
        )
    if volatile:
        options.append("volatile")
    base = _base_of_relative_names(mount.mount_point, [*lowers, upper, work])
    kept = [name for name in mount.options.split(",") if name in _KEPT_MOUNT_OPTIONS]
    return EngineOverlay(
        target=mount.mount_point,
        source=mount.source,
        lowers=[_absolute(name, base) for name in lowers],
        upper=_absolute(upper, base) if upper else None,
        work=_absolute(work, base) if work else None,
        options=options,
        mount_options=kept,
        volatile=volatile,
    )


def read_fuse_overlay(mount: "Mount") -> "EngineOverlay | None":
    """Takes a fuse-overlayfs mount of podman's or buildah's apart; None if it is another's.

    mountinfo does not say what it is made of. containers/storage (drivers/overlay/overlay.go) does:
    beside the mount point `merged` lie `diff`, `work` and the file `lower`, the names of the layers
    relative to the directory above. The layers' whiteouts are files `.wh.NAME`, which kernel
    overlayfs does not know.
    """
    directory, name = os.path.split(mount.mount_point)
    home = os.path.dirname(directory)
    upper, work = f"{directory}/diff", f"{directory}/work"
    if name != "merged" or os.path.lexists(f"{upper}1"):  # diff1: a layer in several directories
        return None
    try:
        with open(f"{directory}/lower", "rb") as file:
            names = os.fsdecode(file.read().strip()).split(":")
    except OSError:
        return None
    lowers = [f"{home}/{short}" for short in names]
    if not all(short.startswith("l/") for short in names) or not all(
        os.path.isdir(path) for path in (upper, work, *lowers)
    ):
        return None  # a layer of an additional store
    return EngineOverlay(
        target=mount.mount_point,
        source=mount.source,
        lowers=lowers,
        upper=upper,
        work=work,
        options=(),
        mount_options=[o for o in mount.options.split(",") if o in _KEPT_MOUNT_OPTIONS],
        volatile=False,
        is_fuse=True,
    )


def split_lowerdir(value: str) -> "list[str]":
    r"""Splits `a:b:c`, where `\:` `\,` and `\\` stand for the characters themselves.

    Raises MountError for data-only layers (`::`).
    """
    names: list[str] = []
    name: list[str] = []
    characters = iter(value)
    for character in characters:
        if character == "\\":
            name.append(next(characters, "\\"))
        elif character == ":":
            names.append("".join(name))
            name = []
        else:
            name.append(character)
    names.append("".join(name))
    if "" in names:
        raise MountError(
            f"overlay layers {value!r}: expected ordinary layers, found data-only ones"
        )
    return names


def forget_volatile(work: str) -> None:
    """Lets a work directory of a volatile overlay be mounted again.

    overlayfs.rst "Volatile mount": the kernel refuses while `work/incompat/volatile` exists. The
    mount that left it was taken down a moment ago, in order, by us.
    """
    marker = f"{work}/work/incompat/volatile"
    try:
        os.unlink(f"{marker}/dirty")
    except FileNotFoundError:
        pass
    try:
        os.rmdir(marker)
    except FileNotFoundError:
        pass


def _rejoined(options: "Sequence[str]") -> "list[str]":
    """Options with the values in quotes whole again: `context="u:r:t:s0:c1,c2"` of SELinux."""
    whole: list[str] = []
    open_quote = False
    for option in options:
        if open_quote:
            whole[-1] += f",{option}"
        else:
            whole.append(option)
        open_quote = whole[-1].count('"') % 2 == 1
    return [option.replace('="', "=", 1).removesuffix('"') for option in whole]


def _base_of_relative_names(mount_point: str, names: "Sequence[str | None]") -> str:
    """The directory that an engine stood in when it mounted with relative names.

    Docker and podman use `l/<short>` below their storage root, which is a parent of the upper
    directory and of the mount point; which one is found by trying.
    """
    relative = [name for name in names if name and not name.startswith("/")]
    if not relative:
        return "/"
    starts = [name for name in names if name and name.startswith("/")] + [mount_point]
    for start in starts:
        directory = os.path.dirname(start)
        while directory != "/":
            if all(os.path.isdir(os.path.join(directory, name)) for name in relative):
                return directory
            directory = os.path.dirname(directory)
    raise MountError(
        f"overlay at {mount_point}: layer {relative[0]}: not found beneath any parent directory"
    )


def _absolute(name: str, base: str) -> str:
    path = os.path.join(base, name)
    if "\\" in path and not os.path.isdir(path):
        # kernels before 6.5 show upperdir and workdir as they were escaped at mount(2)
        plain = "".join(split_lowerdir(path))
        if os.path.isdir(plain):
            return plain
    return path

"""The layers of an overlay that containerd mounted with shifted owners: found, and shifted again.

For a container with a user namespace containerd makes an idmapped mount of the layers' directory at
`<temp>/ovl-idmapped<number>`, names the layers there to overlayfs, and takes that mount away again
(containerd, core/mount/mount_linux.go, doPrepareIDMappedOverlay). mountinfo then names directories
that are gone. They are not made again by these names: `<temp>` is /tmp, where anybody may have put
something else. Not for the tree, nor for podman's way of doing the same: idmap.
"""

import os

from clipshim.errors import MountError
from clipshim.mounts import syscalls
from clipshim.shim import idmap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from clipshim.mounts.graft import EngineOverlay
    from clipshim.mounts.overlay import OverlayPlan

_MARK = "/ovl-idmapped"
_STUB_FILE = ".clip/index.clip"


class Found:
    """A directory that holds layers, and where each one, by its name in mountinfo, lies in it."""

    __slots__ = ("home", "names")

    def __init__(self, home: str, names: "dict[str, str]") -> None:
        self.home, self.names = home, names


def find(engine: "EngineOverlay") -> "Found | None":
    """What containerd's layers are clones of; None if they are there by name, or not containerd's.

    To be called while the engine's overlay is mounted. The layers lie where the upper directory
    does: `<snapshots>/<number>/fs`. containerd 2 clones what all of them have in common, so that of
    several `<number>/fs` is left in their names; of a single one nothing is: that is the layer
    whose index the overlay shows. containerd 1.7 counts them. Raises MountError if they are not
    found.
    """
    lowers = [name for name in engine.lowers if _MARK in name and not os.path.isdir(name)]
    if not lowers or not engine.upper:
        return None
    own, name = os.path.split(engine.upper)
    snapshots = os.path.dirname(own)
    if len(engine.lowers) == 1:
        home = _layer_with_stub(engine.target, snapshots, name)
        found = Found(home, {lowers[0]: ""})
    else:
        home = snapshots
        found = Found(home, {lower: "/".join(lower.split("/")[-2:]) for lower in lowers})
    if not home or not all(_is_layer(home, way, name) for way in found.names.values()):
        raise MountError(
            f"overlay at {engine.target}: layer {lowers[0]}: expected a directory, found none",
            hint="name the image in the annotation io.clipshim.image instead of running its stub",
        )
    return found


def _is_layer(home: str, way: str, name: str) -> bool:
    number, _, rest = way.partition("/")
    return not way or (number.isdigit() and rest == name and os.path.isdir(f"{home}/{way}"))


def _layer_with_stub(target: str, snapshots: str, name: str) -> str:
    # overlayfs shows a lower file's own inode number where all layers lie on one file system
    wanted = os.lstat(f"{target}/{_STUB_FILE}").st_ino
    found = []
    for number in os.listdir(snapshots):
        layer = f"{snapshots}/{number}/{name}"
        try:
            facts = os.lstat(f"{layer}/{_STUB_FILE}")
        except OSError:
            continue
        if facts.st_ino == wanted:
            found.append(layer)
    return found[0] if len(found) == 1 else ""


class Attached:
    """The layers at a directory of ours, and named so by the plan, for as long as the block lasts.

    The overlay keeps clones of the mount.
    """

    __slots__ = ("_directory", "_found", "_plan", "_userns_fd")

    def __init__(
        self, found: "Found | None", plan: "OverlayPlan", userns_fd: int, directory: str
    ) -> None:
        self._found, self._plan = found, plan
        self._userns_fd, self._directory = userns_fd, directory

    def __enter__(self) -> None:
        found = self._found
        if found is None:
            return
        fd = syscalls.open_tree(syscalls.AT_FDCWD, found.home, syscalls.OPEN_TREE_CLONE)
        try:
            if not idmap.map_owners(fd, self._userns_fd):
                raise MountError(f"{found.home}: the owners of its files cannot be shifted")
            os.mkdir(self._directory, 0o700)
            try:
                syscalls.move_mount(fd, "", syscalls.AT_FDCWD, self._directory)
            except BaseException:
                os.rmdir(self._directory)
                raise
        finally:
            os.close(fd)
        self._plan.lowers = tuple(
            f"{self._directory}/{found.names[name]}".rstrip("/") if name in found.names else name
            for name in self._plan.lowers
        )

    def __exit__(self, *_: object) -> None:
        if self._found is not None:
            syscalls.umount2(self._directory, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
            os.rmdir(self._directory)

"""What Python programs call: clipshim.index_image, mount_index and OverlayMounter."""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipshim.cli.daemon_calls import call_for_tree, release
from clipshim.cli.images import destination, finish, path_of
from clipshim.errors import MountError, UsageError
from clipshim.mounts import mountinfo, overlay, syscalls
from clipshim.node.hand_mounts import HandMounts
from clipshim.settings import load_settings

if TYPE_CHECKING:
    from clipshim.index.builder import Progress
    from clipshim.registry.access import RegistryAccess

_TREE_TYPES = ("erofs", "fuse.clipshim")
BUSY_PATIENCE_S = 2.0
BUSY_PAUSE_S = 0.01


def index_image(
    image: str,
    output: str | os.PathLike[str] | None = None,
    *,
    platform: str | None = None,
    spacing: int | None = None,
    embed: bool = False,
    access: RegistryAccess | None = None,
    progress: Progress | None = None,
) -> Path:
    """Makes the index of `image` and returns its path; without `output`, in the local store.

    `spacing` is the number of bytes between checkpoints. Raises ClipError.
    """
    from clipshim.index.builder import BuildOptions, build_index
    from clipshim.registry.access import RegistryAccess
    from clipshim.registry.sources import open_source

    settings = load_settings()
    given: dict[str, Any] = {"embed": embed}
    if spacing is not None:
        given["spacing"] = spacing
    source = open_source(
        image, platform=platform, access=access or RegistryAccess.from_settings(settings)
    )
    wanted = None if output is None else Path(output)
    with destination(settings, wanted) as path:
        build_index(source, path, BuildOptions(**given), progress)
        return finish(settings, path, source.reference, wanted)


@dataclass(frozen=True, slots=True)
class MountedTree:
    """A tree mounted by hand. Leaving the `with` block unmounts it."""

    directory: Path
    reference: str
    index_digest: str
    image_id: str
    mode: str

    def __enter__(self) -> MountedTree:
        return self

    def __exit__(self, *_: object) -> None:
        umount_index(self.directory)

    def describe(self) -> dict[str, str]:
        """For JSON."""
        return {
            "directory": str(self.directory),
            "reference": self.reference,
            "index_digest": self.index_digest,
            "image_id": self.image_id,
            "mode": self.mode,
        }


def mount_index(
    index: str | os.PathLike[str], directory: str | os.PathLike[str], *, mode: str = "auto"
) -> MountedTree:
    """Mounts the tree of an index (file, digest or image in the local store), read-only.

    Starts the node daemon if none runs. Raises ClipError; nothing stays mounted then.
    """
    settings = load_settings()
    target = Path(os.path.realpath(directory))
    if not target.is_dir():
        raise UsageError(f"{directory}: expected an existing directory", hint="make it first")
    if mountinfo.mount_at(str(target)) is not None:
        raise UsageError(f"{target}: something is mounted there already")
    key = _hold_key(target)
    path = path_of(settings, os.fspath(index))
    with open(path, "rb") as file:
        reply, tree = call_for_tree(settings, file.fileno(), f"file:{path}", key, mode)
    try:
        syscalls.move_mount(tree, "", syscalls.AT_FDCWD, str(target))
    except OSError as exc:
        release(settings, key)
        raise MountError(f"tree at {target}: {exc}") from exc
    finally:
        os.close(tree)
    return MountedTree(
        target, str(reply["reference"]), str(reply["index_digest"]), str(reply["image_id"]),
        str(reply["mode"]),
    )  # fmt: skip


def umount_index(directory: str | os.PathLike[str]) -> None:
    """Takes a tree away that mount_index has mounted. Raises MountError."""
    settings = load_settings()
    target = os.path.realpath(directory)
    mount = mountinfo.mount_at(target)
    if mount is None:
        raise MountError(f"{target}: nothing is mounted there")
    key = _hold_key(Path(target))
    # a daemon that died whole has forgotten its holds; an unpacked image looks like any directory
    if mount.fstype not in _TREE_TYPES and key not in HandMounts(settings.run_dir).all():
        raise MountError(
            f"{target}: expected a tree, found {mount.fstype} that clipshim has not mounted",
            hint="umount(8) takes other mounts away",
        )
    _unmount(target)
    release(settings, key)


class OverlayMounter:
    """A writable root file system over an index: what a container would see.

        with OverlayMounter("app.clip", "/mnt/app", state="/var/tmp/app") as rootfs:
            subprocess.run(["chroot", rootfs, "sh"])

    `state` keeps what was written (`upper` and `work` in it); it must not lie on tmpfs.
    """

    def __init__(
        self,
        index: str | os.PathLike[str],
        directory: str | os.PathLike[str],
        *,
        state: str | os.PathLike[str],
        mode: str = "auto",
    ) -> None:
        self._index = index
        self._directory = Path(os.path.realpath(directory))
        self._state = Path(os.path.realpath(state))
        self._mode = mode
        self._undo = ExitStack()

    def mount(self) -> Path:
        """Mounts tree and overlay; returns the root's path. Raises ClipError, leaving nothing."""
        with ExitStack() as undo:
            new = not (self._state / "upper").exists()
            for name in ("lower", "upper", "work"):
                (self._state / name).mkdir(parents=True, exist_ok=True)
            undo.enter_context(mount_index(self._index, self._state / "lower", mode=self._mode))
            lower, upper, work = (str(self._state / name) for name in ("lower", "upper", "work"))
            if new:  # the root is the upper directory's inode: it must look like the image's
                facts = os.stat(lower)
                os.chown(upper, facts.st_uid, facts.st_gid)
                os.chmod(upper, stat.S_IMODE(facts.st_mode))
            plan = overlay.OverlayPlan(str(self._directory), [lower], upper=upper, work=work)
            try:
                plan.execute()
            except MountError as exc:
                raise MountError(exc.message, hint="state must lie on ext4, xfs or btrfs") from exc
            undo.callback(_unmount, str(self._directory))
            self._undo = undo.pop_all()
        return self._directory

    def umount(self) -> None:
        """Takes both mounts away; what was written stays in `state`. Twice is once."""
        self._undo.close()

    def __enter__(self) -> Path:
        return self.mount()

    def __exit__(self, *_: object) -> None:
        self.umount()


def _unmount(target: str) -> None:
    deadline = time.monotonic() + BUSY_PATIENCE_S
    while True:
        try:
            syscalls.umount2(target, syscalls.UMOUNT_NOFOLLOW)
        except OSError as exc:
            # The daemon closes its own descriptors of a mount only after it has answered.
            if exc.errno == errno.EBUSY and time.monotonic() < deadline:
                time.sleep(BUSY_PAUSE_S)
                continue
            busy = exc.errno == errno.EBUSY
            hint = "a program is using it: see `fuser -vm DIR`" if busy else None
            raise MountError(f"{target}: {exc}", hint=hint) from exc
        return


def _hold_key(directory: Path) -> str:
    """What the daemon knows a mount by hand as."""
    return f"mount:{directory}"

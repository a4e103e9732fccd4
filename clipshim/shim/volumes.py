"""Fills an engine's new volumes with what the image holds where they are mounted.

Docker and podman do so before they call the runtime, from what they see: of a stub that is nearly
nothing. `create` does it again from the whole tree, for volumes that hold just what the engine has
copied, before a container's first start. Which mounts are such volumes is read from the engine's
own records, never guessed by a path alone; how a directory is copied is copy_tree.py's.

    <volumes>/<name>/            the engine's directory of one volume; locked (flock) in use
        _data/                   the volume
            .clipshim-filling/   what is being copied, until it is whole: then its entries move up
        .clipshim-volume         the record, which no container can reach: one word

    filling   being copied: if nobody holds the lock, what is there is thrown away
    moving    copied, entries are being moved up: whoever comes next goes on with it
    filled    done; podman fills a volume once in its life, whatever is removed from it later
"""

import errno
import os
import stat

from clipshim.errors import MountError
from clipshim.mounts import safe_paths, syscalls
from clipshim.shim import copy_tree, json_text
from clipshim.shim.state import lock_file
from clipshim.shim.teardown import remove_tree
from clipshim.shim.trace import trace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from clipshim.shim.bundle import Bundle

STAGE = ".clipshim-filling"
RECORD = ".clipshim-volume"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_RECORD_BYTES = 16 << 20
_LOCK_WAIT_S = 600.0  # another container's create fills the volume from a registry
_NEVER = "0001-01-01T"  # Go's zero time
_DOCKER_FILES = ("hostname", "hosts", "resolv.conf")


class Volume:
    """One mount of a local volume, as the engine's records describe it."""

    __slots__ = ("by_podman", "data", "destination", "name")

    def __init__(self, name: str, data: str, destination: str, *, by_podman: bool) -> None:
        self.name, self.data, self.destination = name, data, destination
        self.by_podman = by_podman


def find_volumes(found: "Bundle", container_id: str) -> "list[Volume]":
    """The local volumes that the engine would fill at this start; none if it is not known."""
    binds = [
        (mount["source"], mount["destination"], mount.get("options"))
        for mount in found.mounts
        if mount.get("type") == "bind"
        and isinstance(mount.get("source"), str)
        and isinstance(mount.get("destination"), str)
    ]
    volumes = _docker_volumes(binds, container_id)
    if volumes is None:
        volumes = _podman_volumes(binds, found.path, container_id)
    once = {volume.data: volume for volume in reversed(volumes)}  # the first mount of each
    return [once[path] for path in sorted(once)]  # everybody locks in the same order


def _docker_volumes(
    binds: "list[tuple[str, str, Any]]", container_id: str
) -> "list[Volume] | None":
    """By Docker's own record of the container; None if Docker has none."""
    for root in _docker_roots(binds):
        record = _docker_record(f"{root}/containers/{container_id}/config.v2.json")
        if record is None or record.get("ID") != container_id:
            continue
        state, points = record.get("State"), record.get("MountPoints")
        started = state.get("StartedAt") if isinstance(state, dict) else None
        if not isinstance(started, str) or not started.startswith(_NEVER):
            return []  # Docker fills volumes when it makes a container, not when one starts again
        found = []
        for source, destination, _ in binds:
            point = points.get(destination) if isinstance(points, dict) else None
            name = _docker_name(point)
            if name and source == f"{root}/volumes/{name}/_data":
                found.append(Volume(name, source, destination, by_podman=False))
        return found
    return None


def _docker_roots(binds: "list[tuple[str, str, Any]]") -> "list[str]":
    """Docker's data-root: it binds <data-root>/containers/<ID>/hostname and others, with and
    without user namespaces, whatever stores the layers."""
    roots: list[str] = []
    for source, destination, _ in binds:
        directory, name = os.path.split(source)
        containers = os.path.dirname(directory)
        if name in _DOCKER_FILES and destination == f"/etc/{name}":
            root = containers.removesuffix("/containers")
            if root != containers and root.startswith("/") and root not in roots:
                roots.append(root)
    return roots


def _docker_record(path: str) -> "dict[str, Any] | None":
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        facts = os.fstat(fd)
        is_roots = facts.st_uid == 0 and not facts.st_mode & 0o022
        if not stat.S_ISREG(facts.st_mode) or not is_roots or facts.st_size > _MAX_RECORD_BYTES:
            return None
        record = json_text.loads(_read(fd))
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)
    return record if isinstance(record, dict) else None


def _docker_name(point: "Any") -> str:
    """The name of a local volume that is to be filled; "" for any other mount point."""
    if not isinstance(point, dict) or point.get("Type") != "volume":
        return ""
    name, mode, spec = point.get("Name"), point.get("Relabel"), point.get("Spec")
    if point.get("Driver") != "local" or not isinstance(name, str) or not _is_name(name):
        return ""
    if isinstance(mode, str) and "nocopy" in mode.split(","):
        return ""
    options = spec.get("VolumeOptions") if isinstance(spec, dict) else None
    return "" if isinstance(options, dict) and options.get("NoCopy") else name


def _podman_volumes(
    binds: "list[tuple[str, str, Any]]", bundle: str, container_id: str
) -> "list[Volume]":
    """By the place of podman's bundle, <graph root>/<driver>-containers/<ID>/userdata."""
    containers = bundle.removesuffix(f"/{container_id}/userdata")
    graph_root, driver = os.path.split(containers)
    if containers == bundle or not driver.endswith("-containers"):
        return []
    directories = (_told_to_conmon(container_id), f"{graph_root}/volumes")
    found = []
    for source, destination, options in binds:
        top, tail = os.path.split(source)
        directory, name = os.path.split(top)
        if tail != "_data" or directory not in directories or not _is_name(name):
            continue
        if isinstance(options, list) and "nocopy" in options:
            continue
        found.append(Volume(name, source, destination, by_podman=True))
    return found


def _told_to_conmon(container_id: str) -> str:
    """Where podman keeps volumes, as it has told conmon, our parent, to tell it later; or ""."""
    try:
        with open(f"/proc/{os.getppid()}/cmdline", "rb") as file:
            words = [os.fsdecode(word) for word in file.read().split(b"\0")]
    except OSError:
        return ""
    if os.path.basename(words[0]) != "conmon" or container_id not in words:
        return ""
    for at, word in enumerate(words):
        if word == "--volumepath":  # --exit-command-arg --volumepath --exit-command-arg PATH
            return "".join(words[at + 2 : at + 3])
    return ""


def _is_name(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


class NewVolumes:
    """A container's volumes that are still as the engine made them, locked until close()."""

    __slots__ = ("_locked", "owners")

    def __init__(
        self, found: "Bundle", volumes: "Iterable[Volume]", *, has_engines_copy: bool
    ) -> None:
        """Looks at them; the engine's rootfs must be mounted still.

        Without `has_engines_copy` only empty volumes are new: the engine has copied from an image
        that has nothing to do with the tree. Raises MountError.
        """
        self.owners = _owners(found)
        self._locked: list[_LockedVolume] = []
        try:
            for volume in volumes:
                self._look_at(volume, found.rootfs if has_engines_copy else "")
        except BaseException:
            self.close()
            raise

    def _look_at(self, volume: Volume, rootfs: str) -> None:
        try:
            locked = _LockedVolume.open(volume)
            if locked is None:
                return  # the runtime will say so
            self._locked.append(locked)
            if not locked.is_new(rootfs):
                self._locked.pop().close()
        except TimeoutError as exc:
            raise MountError(
                f"volume {volume.name}: another container's create has been filling it for "
                f"{_LOCK_WAIT_S:.0f} s"
            ) from exc
        except OSError as exc:
            raise MountError(f"volume {volume.name}: {exc}") from exc

    def fill(self, rootfs: str) -> None:
        """Copies what the whole root file system holds there. Raises MountError.

        What was copied is removed again on failure; volumes that were filled stay so, as when an
        engine's own create fails later.
        """
        for locked in self._locked:
            volume = locked.volume
            try:
                locked.fill(rootfs, self.owners)
            except OSError as exc:
                raise _fill_error(volume, exc) from exc
        self.close()

    @property
    def paths(self) -> "list[str]":
        """The directories that fill() is going to write to, for who cleans up after a crash."""
        return [locked.volume.data for locked in self._locked]

    def close(self) -> None:
        """Lets others at the volumes."""
        while self._locked:
            self._locked.pop().close()


def _fill_error(volume: Volume, exc: OSError) -> MountError:
    where = f"volume {volume.name}: filling it from {volume.destination} of the image"
    if isinstance(exc.filename, str):
        where += f": {exc.filename.removeprefix('./')}"
    hint = "mount it with the option nocopy to begin with an empty one"
    if exc.errno == errno.EIO:
        hint = "the node daemon's log says why a part of the image cannot be read"
    return MountError(f"{where}: {exc.strerror or exc}", hint=hint)


def _owners(found: "Bundle") -> copy_tree.Owners:
    linux = found.config.get("linux")
    linux = linux if isinstance(linux, dict) else {}
    return copy_tree.Owners(_triples(linux.get("uidMappings")), _triples(linux.get("gidMappings")))


def _triples(mappings: "Any") -> "list[tuple[int, int, int]]":
    keys = ("containerID", "hostID", "size")
    rows = [row for row in mappings or () if isinstance(row, dict)]
    return [
        (row[keys[0]], row[keys[1]], row[keys[2]])
        for row in rows
        if all(isinstance(row.get(key), int) for key in keys)
    ]


class _LockedVolume:
    """One volume with its lock held; what an interrupted create left in it is dealt with."""

    __slots__ = ("_data_fd", "_directory_fd", "volume")

    def __init__(self, volume: Volume, directory_fd: int) -> None:
        self.volume = volume
        self._directory_fd = directory_fd
        self._data_fd = -1

    @classmethod
    def open(cls, volume: Volume, *, wait_s: float = _LOCK_WAIT_S) -> "_LockedVolume | None":
        """None if there is no such directory, or a link in its place. Raises OSError."""
        try:
            opened = cls(volume, os.open(os.path.dirname(volume.data), _DIRECTORY))
        except OSError:
            return None
        try:
            lock_file(opened._directory_fd, wait_s)
            try:
                opened._data_fd = os.open("_data", _DIRECTORY, dir_fd=opened._directory_fd)
            except OSError:
                opened.close()
                return None
            opened._recover()
        except BaseException:
            opened.close()
            raise
        return opened

    def close(self) -> None:
        """Releases the lock."""
        for fd in (self._data_fd, self._directory_fd):
            if fd >= 0:
                os.close(fd)
        self._data_fd = self._directory_fd = -1

    def is_new(self, rootfs: str) -> bool:
        """Whether nothing but the engine's own copy is in the volume."""
        if not self.volume.by_podman:
            # a tmpfs is empty at every mount, and what Docker copied at its first one is lost
            on_disk = syscalls.fs_type(self._data_fd) != syscalls.TMPFS_MAGIC
            return on_disk and self._is_as_made(rootfs)
        if self._recorded() == "filled":
            return False
        is_new = self._is_as_made(rootfs)
        if not is_new:
            self._record("filled")  # it must not be filled either when it has been emptied
        return is_new

    def _is_as_made(self, rootfs: str) -> bool:
        if not os.listdir(self._data_fd):
            return True
        engines = _open_in(rootfs, self.volume.destination) if rootfs else -1
        if engines < 0:
            return False
        try:
            return copy_tree.same_content(engines, self._data_fd)
        finally:
            os.close(engines)

    def fill(self, rootfs: str, owners: copy_tree.Owners) -> None:
        """Copies, then moves into place. Raises OSError; then the volume is as it was."""
        source = _open_in(rootfs, self.volume.destination)
        try:
            if source >= 0 and not self._is_whole(source):
                self._copy(source, owners)
        finally:
            if source >= 0:
                os.close(source)
        self._record("filled" if self.volume.by_podman else "")

    def _is_whole(self, source: int) -> bool:
        """Whether the engine has copied everything, from a stub that has it."""
        if not os.listdir(self._data_fd):
            return False  # an empty directory has an owner and a mode too
        return copy_tree.same_content(source, self._data_fd)

    def _copy(self, source: int, owners: copy_tree.Owners) -> None:
        self._record("filling")
        try:
            os.mkdir(STAGE, 0o700, dir_fd=self._data_fd)
            stage = os.open(STAGE, _DIRECTORY, dir_fd=self._data_fd)
            try:
                copy_tree.copy_tree(source, stage, owners, leave=STAGE)
                trace("volume-copied")
                self._record("moving")
            finally:
                os.close(stage)
        except BaseException:
            self._discard()
            raise
        trace("volume-moving")
        self._move()
        trace("volume-moved")

    def _move(self) -> None:
        stage = os.open(STAGE, _DIRECTORY, dir_fd=self._data_fd)
        try:
            copy_tree.move_tree(stage, self._data_fd)
            facts = os.fstat(self._data_fd)
        finally:
            os.close(stage)
        self._remove_stage()
        os.utime(self._data_fd, ns=(facts.st_atime_ns, facts.st_mtime_ns))

    def _recover(self) -> None:
        """Ends what a create that was killed has begun."""
        recorded = self._recorded()
        if recorded == "filling":
            self._discard()
        elif recorded == "moving":
            try:
                self._move()
            except FileNotFoundError:
                pass  # it was killed after the last move
            self._record("filled")

    def _discard(self) -> None:
        self._remove_stage()
        self._record("")

    def _remove_stage(self) -> None:
        remove_tree(f"/proc/self/fd/{self._data_fd}/{STAGE}")

    def _recorded(self) -> str:
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(RECORD, flags, dir_fd=self._directory_fd)
        except FileNotFoundError:
            return ""
        try:
            return os.read(fd, 100).decode("ascii", "replace").strip()
        finally:
            os.close(fd)

    def _record(self, word: str) -> None:
        """Replaces the record; none for an empty word."""
        if not word:
            try:
                os.unlink(RECORD, dir_fd=self._directory_fd)
            except FileNotFoundError:
                pass
            return
        draft = f"{RECORD}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(draft, flags, 0o600, dir_fd=self._directory_fd)
        try:
            os.write(fd, f"{word}\n".encode())
        finally:
            os.close(fd)
        os.rename(draft, RECORD, src_dir_fd=self._directory_fd, dst_dir_fd=self._directory_fd)


def clean_up(data: str) -> None:
    """Ends what a create that was killed has begun in a volume, unless another create is at it."""
    volume = Volume(os.path.basename(os.path.dirname(data)), data, "", by_podman=False)
    record = f"{os.path.dirname(data)}/{RECORD}"
    if not os.path.lexists(record):
        return
    try:
        locked = _LockedVolume.open(volume, wait_s=0.0)
        if locked is not None:
            locked.close()
    except OSError:
        return  # it is locked, or gone, or cannot be changed: the next create looks again


def _open_in(rootfs: str, destination: str) -> int:
    """A directory as the container would see it; -1 if there is none. Raises OSError."""
    root = os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return safe_paths.open_in_root(root, destination, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return -1
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            return -1
        raise
    finally:
        os.close(root)


def _read(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, 1 << 20):
        parts.append(part)
    return b"".join(parts)

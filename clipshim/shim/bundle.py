"""Reads and replaces config.json of an OCI bundle, as a document whose unknown fields survive.

Only what clipshim needs is looked at; judging the rest is the low-level runtime's task.
"""

import os

from clipshim.errors import BundleError
from clipshim.shim import json_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_CONFIG_BYTES = 16 << 20


class Bundle:
    """One bundle directory with its config.json."""

    __slots__ = ("config", "path", "raw")

    def __init__(self, path: str, config: "dict[str, Any]", raw: bytes) -> None:
        self.path = path  # absolute, links resolved
        self.config = config
        self.raw = raw  # config.json as it was read

    @property
    def annotations(self) -> "dict[str, str]":
        """The annotations whose values are strings."""
        found = self.config.get("annotations")
        if not isinstance(found, dict):
            return {}
        return {key: value for key, value in found.items() if isinstance(value, str)}

    @property
    def root_path(self) -> str:
        """root.path as written; empty if there is none."""
        root = self.config.get("root")
        path = root.get("path") if isinstance(root, dict) else None
        return path if isinstance(path, str) else ""

    @property
    def rootfs(self) -> str:
        """root.path as an absolute name; empty if there is none."""
        return os.path.normpath(os.path.join(self.path, self.root_path)) if self.root_path else ""

    @property
    def mounts(self) -> "list[dict[str, Any]]":
        """The mounts as written."""
        found = self.config.get("mounts")
        return [m for m in found if isinstance(m, dict)] if isinstance(found, list) else []

    @property
    def may_have_volumes(self) -> bool:
        """Whether a mount may be a local volume of Docker's or podman's, which end in /_data."""
        return any(str(mount.get("source")).endswith("/_data") for mount in self.mounts)

    @property
    def maps_users(self) -> bool:
        """Whether the container's users are others on the host (a user namespace)."""
        linux = self.config.get("linux")
        mapped = isinstance(linux, dict) and bool(linux.get("uidMappings"))
        return mapped or bool(self.user_namespace)

    @property
    def user_namespace(self) -> str:
        """The path of the user namespace that the container is to join; empty if there is none."""
        linux = self.config.get("linux")
        spaces = linux.get("namespaces") if isinstance(linux, dict) else None
        for space in spaces if isinstance(spaces, list) else ():
            if isinstance(space, dict) and space.get("type") == "user":
                path = space.get("path")
                return path if isinstance(path, str) else ""
        return ""

    def set_root_path(self, path: str) -> None:
        """Replaces root.path in config.json: the whole new file or the whole old one is there."""
        root = self.config.setdefault("root", {})
        root["path"] = path
        self.replace(json_text.dumps(self.config).encode())

    def replace(self, data: bytes) -> None:
        """Replaces config.json, keeping its owner and mode."""
        name = f"{self.path}/config.json"
        temporary = f"{self.path}/.config.json.clipshim"
        try:
            before = os.stat(name)
            try:
                os.unlink(temporary)
            except FileNotFoundError:
                pass
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(temporary, flags, 0o600)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                os.fchown(fd, before.st_uid, before.st_gid)
                os.fchmod(fd, before.st_mode & 0o7777)
                if not _orders_renames(fd):
                    os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, name)
        except OSError as exc:
            try:
                os.unlink(temporary)
            except OSError:
                pass  # it was not made, or the directory takes no changes
            raise BundleError(
                f"{name}: cannot be replaced: {exc}",
                hint="root.path in it is rewritten while the container exists",
            ) from exc


def _orders_renames(fd: int) -> bool:
    """Whether the file system writes a file out before a rename over another one.

    ext4 (auto_da_alloc) and btrfs do, tmpfs outlives no crash; there a sync would cost every start
    of a container 1 to 30 ms, by how busy the disk is.
    """
    from clipshim.mounts import syscalls  # loaded already where there is an index

    return syscalls.fs_type(fd) in (0xEF53, 0x9123683E, syscalls.TMPFS_MAGIC)  # linux/magic.h


def read_bundle(path: str) -> "Bundle | None":
    """The bundle in a directory; None if the low-level runtime has to say what is wrong with it."""
    real = os.path.realpath(path)
    try:
        fd = os.open(f"{real}/config.json", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        chunks = []
        size = 0
        while chunk := os.read(fd, 1 << 20):
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_CONFIG_BYTES:
                return None
    except OSError:
        return None
    finally:
        os.close(fd)
    return parse_bundle(real, b"".join(chunks))


def parse_bundle(path: str, raw: bytes) -> "Bundle | None":
    """A bundle with this config.json; None if it is not one that can be rewritten."""
    try:
        config = json_text.loads(raw)
    except ValueError:
        return None
    return Bundle(path, config, raw) if isinstance(config, dict) else None


def keep_original(path: str, raw: bytes) -> None:
    """Writes config.json's bytes to a file of ours, for restore_root_path."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, 0o600)  # process.env may hold secrets
    try:
        view = memoryview(raw)
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)


def kept_original(path: str, now: "Bundle") -> bytes:
    """The bytes that were kept, if `now` is what clipshim made of them; else none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return b""
    try:
        raw = os.read(fd, MAX_CONFIG_BYTES)
    except OSError:
        return b""
    finally:
        os.close(fd)
    before = parse_bundle(now.path, raw)
    if before is None:
        return b""
    root = before.config.setdefault("root", {})
    if not isinstance(root, dict):
        return b""
    root["path"] = now.root_path
    return raw if json_text.dumps(before.config).encode() == now.raw else b""


def restore_root_path(bundle_path: str, ours: str, original: str, kept: str) -> None:
    """Puts config.json back if root.path is still the one that clipshim wrote; else does nothing.

    Byte for byte from the file `kept`, unless somebody changed something else in the meantime: then
    only root.path becomes `original` again.
    """
    bundle = read_bundle(bundle_path)
    if bundle is None or not original or bundle.root_path != ours:
        return
    raw = kept_original(kept, bundle)
    if raw:
        bundle.replace(raw)
    else:
        bundle.set_root_path(original)

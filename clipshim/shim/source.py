"""Finds out which index a container names, if any. Everything it reads is a tenant's to write.

In this order: the annotation io.clipshim.index (a file in the bundle or in one of index_dirs, or a
digest in the local store), the annotation io.clipshim.image, the file /.clip/index.clip in the
engine's rootfs (a stub), and the image name that CRI writes, which is only looked up: an ordinary
container stays one. Files are opened here and go to the daemon as descriptors.
"""

import os
import stat

from clipshim.errors import NotFoundError, PolicyError
from clipshim.shim.bundle import Bundle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from clipshim.settings import Settings

INDEX_ANNOTATION = "io.clipshim.index"
IMAGE_ANNOTATION = "io.clipshim.image"
STUB_PATH = ".clip/index.clip"
_CRI_TYPES = ("io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType")
_CRI_IMAGES = ("io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName")


class Source:
    """Where the index of a container comes from. Owns `fd`, an open index file, if there is one."""

    __slots__ = ("fd", "is_stub", "request")

    def __init__(self, request: "dict[str, Any]", fd: int = -1, *, is_stub: bool = False) -> None:
        self.request = request  # "source" of the daemon's mount request
        self.fd = fd
        self.is_stub = is_stub

    def close(self) -> None:
        """Closes the index file."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def is_optional(self) -> bool:
        """Whether the container runs as an ordinary one if there is no index."""
        return bool(self.request.get("engine_named"))


def names_index(bundle: Bundle) -> bool:
    """Whether a container may name an index: cheap, loads nothing, opens nothing."""
    annotations = bundle.annotations
    if any(annotations.get(name) == "sandbox" for name in _CRI_TYPES):
        return False
    if INDEX_ANNOTATION in annotations or IMAGE_ANNOTATION in annotations:
        return True
    if any(name in annotations for name in _CRI_IMAGES):
        return True
    try:
        # a hostile link in .clip makes this a wrong guess at worst: find_source opens it safely
        return bool(bundle.rootfs) and stat.S_ISREG(
            os.lstat(f"{bundle.rootfs}/{STUB_PATH}").st_mode
        )
    except (OSError, ValueError):
        return False


def find_source(bundle: Bundle, settings: "Settings") -> "Source | None":
    """The source that a bundle names. Raises PolicyError and NotFoundError."""
    annotations = bundle.annotations
    index = annotations.get(INDEX_ANNOTATION)
    if index is not None:
        if index.startswith("sha256:"):
            return Source({"digest": index})
        return _file_source(index, bundle, settings)
    image = annotations.get(IMAGE_ANNOTATION)
    if image is not None:
        return Source({"image": image, "engine_named": False})
    stub_fd = _open_stub(bundle.rootfs)
    if stub_fd >= 0:
        return Source({"fd": True, "origin": "stub"}, stub_fd, is_stub=True)
    for name in _CRI_IMAGES:
        if annotations.get(name) and os.path.exists(f"{settings.index_store}/names.json"):
            return Source({"image": annotations[name], "engine_named": True})
    return None


def _file_source(value: str, bundle: Bundle, settings: "Settings") -> Source:
    from clipshim.mounts import safe_paths  # only with an index: ctypes, 4 ms

    where = f"annotation {INDEX_ANNOTATION}: {value!r}"
    if value.startswith("/"):
        normal = os.path.normpath(value)
        for directory in settings.index_dirs:
            base = os.path.normpath(directory)
            if os.path.isabs(base) and safe_paths.is_inside(normal, base):
                return Source(
                    {"fd": True, "origin": f"file:{normal}"},
                    _open_index(base, normal[len(base.rstrip("/")) + 1 :], where),
                )
        raise PolicyError(
            f"{where}: expected a file in one of index_dirs",
            hint=f"index_dirs is {settings.index_dirs}; add the file's directory to it",
        )
    if "/" in value or value in ("", ".", "..") or "\0" in value:
        raise PolicyError(
            f"{where}: expected a digest, a file name in the bundle, or an absolute path"
        )
    return Source(
        {"fd": True, "origin": f"file:{bundle.path}/{value}"},
        _open_index(bundle.path, value, where),
    )


def _open_index(directory: str, name: str, where: str) -> int:
    from clipshim.mounts import safe_paths

    try:
        base_fd, _ = safe_paths.open_real_directory(directory)
        try:
            fd = safe_paths.open_beneath(base_fd, name, _READ)
        finally:
            os.close(base_fd)
    except FileNotFoundError as exc:
        raise NotFoundError(f"{where}: no such file in {directory}") from exc
    except OSError as exc:
        raise PolicyError(f"{where}: cannot be opened beneath {directory}: {exc}") from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise PolicyError(f"{where}: expected a regular file")
    return fd


def _open_stub(rootfs: str) -> int:
    """Opens the index in a stub's rootfs, or returns -1 if it is no stub."""
    if not rootfs or not os.path.lexists(f"{rootfs}/{STUB_PATH}"):
        return -1
    from clipshim.mounts import safe_paths

    try:
        root_fd, _ = safe_paths.open_real_directory(rootfs)
        try:
            fd = safe_paths.open_beneath(root_fd, STUB_PATH, _READ)
        finally:
            os.close(root_fd)
    except OSError:
        return -1  # a link somewhere: not what a stub has
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        return -1
    return fd


# O_NONBLOCK: opening a planted FIFO must not wait
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY

"""Mounts EROFS images from files, with layer files as devices; finds out whether the kernel can.

It does not read or write images, but for the 1.5 kB one that the probe mounts. Format: Linux
Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h.
"""

import errno
import os
import struct

from clipshim.errors import MountError
from clipshim.mounts import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MOUNT_ATTRIBUTES = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NODEV
_PROBE_TEXT = b"clipshim probe\n".ljust(512, b"\0")


def mount_erofs(meta_path: str, devices: "Sequence[str]", target: str) -> None:
    """Mounts the image in the file `meta_path` at `target`, read-only.

    `devices` are the layer files, in the order of the image's device table. Raises MountError.
    """
    fd = mount_erofs_fd(meta_path, devices)
    try:
        syscalls.move_mount(fd, "", syscalls.AT_FDCWD, target)
    except OSError as exc:
        raise MountError(f"erofs at {target}: {exc}") from exc
    finally:
        os.close(fd)


def mount_erofs_fd(meta_path: str, devices: "Sequence[str]") -> int:
    """As mount_erofs, but returns a descriptor of the detached mount, which the caller owns."""
    try:
        context = syscalls.fsopen("erofs")
    except OSError as exc:
        raise MountError(f"erofs image {meta_path}: {exc}", hint=_hint(exc)) from exc
    try:
        syscalls.fsconfig_string(context, "source", meta_path)
        for device in devices:  # one call each: mount(2) would cut the list at one page
            syscalls.fsconfig_string(context, "device", device)
        # device nodes of images mean nothing on the host; overlayfs shows them to containers,
        # which may open them as their own mount and device cgroup allow
        syscalls.fsconfig_create(context)
        return syscalls.fsmount(context, MOUNT_ATTRIBUTES)
    except OSError as exc:
        detail = f"{exc}"
        if exc.errno == errno.ENOENT:  # the kernel does not say which
            lost = [path for path in (meta_path, *devices) if not os.path.exists(path)]
            detail += f": {', '.join(lost[:3])}" if lost else ""
        raise MountError(f"erofs image {meta_path}: {detail}", hint=_hint(exc)) from exc
    finally:
        os.close(context)


def probe_erofs(directory: str) -> "str | None":
    """Why EROFS images in files below `directory` cannot be mounted here, or None when they can.

    Mounts a tiny image with one device and reads a file through it; nothing stays behind. Raises
    OSError where that cannot be tried: a full or read-only disk says nothing about the kernel.
    """
    meta, device = (
        f"{directory}/.erofs-probe.{os.getpid()}",
        f"{directory}/.erofs-data.{os.getpid()}",
    )
    try:
        for path, content in ((meta, probe_image()), (device, _PROBE_TEXT)):
            with open(path, "wb") as file:
                file.write(content)
        return _try_mount(meta, device)
    finally:
        for path in (meta, device):
            try:
                os.unlink(path)
            except OSError:
                continue


def _try_mount(meta: str, device: str) -> "str | None":
    try:
        mounted = mount_erofs_fd(meta, [device])
        try:
            fd = os.open("f", os.O_RDONLY | os.O_CLOEXEC, dir_fd=mounted)
            try:
                data = os.pread(fd, 512, 0)
            finally:
                os.close(fd)
        finally:
            os.close(mounted)
    except MountError as exc:
        return exc.message
    except OSError as exc:
        return str(exc)
    return None if data == _PROBE_TEXT else "an EROFS mount from files returned wrong data"


def probe_image() -> bytes:
    """An EROFS image of 512-byte blocks: a root directory and `f`, one block in device 1."""
    directory = struct.pack("<QHBxQHBxQHBx", 40, 36, 2, 40, 37, 2, 43, 39, 1) + b"...f"
    superblock = struct.pack(
        "<IIIBBHQQIIII16s16sIHHH",
        syscalls.EROFS_SUPER_MAGIC_V1,
        0,  # no checksum: feature_compat says so
        0,
        9,  # blkszbits
        0,
        40,  # root nid: byte 1280
        2,
        0,
        0,
        4,  # blocks
        0,
        0,
        bytes(16),
        bytes(16),
        0x4 | 0x8,  # chunked files, device table
        0,
        1,  # extra devices
        1152 // 128,  # the device table, right behind the superblock
    )
    image = bytearray(2048)
    image[1024 : 1024 + len(superblock)] = superblock
    image[1152 + 64 : 1152 + 68] = struct.pack("<I", 1)  # device 1 has one block
    # compact inodes: format (data layout << 1), xattrs, mode, nlink, size, -, union, ino, ids, -
    root = struct.pack("<HHHHIIIIHHI", 2 << 1, 0, 0o40755, 2, len(directory), 0, 0, 1, 0, 0, 0)
    image[1280 : 1280 + 32 + len(directory)] = root + directory
    file = struct.pack("<HHHHIIIIHHI", 4 << 1, 0, 0o100444, 1, 512, 0, 0x20, 2, 0, 0, 0)
    image[1376 : 1376 + 40] = file + struct.pack("<HHI", 0, 1, 0)  # chunk 0: device 1, block 0
    return bytes(image)


def _hint(exc: OSError) -> "str | None":
    if exc.errno == errno.ENODEV:
        return 'the kernel has no EROFS; set mode = "fuse" or load the module erofs'
    if exc.errno == errno.ENOTBLK:
        return 'file-backed EROFS needs Linux 6.12 and a file not on tmpfs; mode = "fuse" does not'
    return None

"""The checks of `clipshim doctor`. Each returns findings; none changes or raises anything.

Features are found by trying them, not by the kernel's version: distributions patch kernels.
"""

from __future__ import annotations

import enum
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipshim.errors import ClipError
from clipshim.mounts import erofs, mountinfo, syscalls
from clipshim.settings import Settings, load_settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OLDEST_KERNEL = (4, 18)
MEMORY_FILE_SYSTEMS = {syscalls.TMPFS_MAGIC: "tmpfs", syscalls.RAMFS_MAGIC: "ramfs"}
VERSION_TIMEOUT_S = 30.0
PING_TIMEOUT_S = 10.0
ENGINE_PROCESSES = ("dockerd", "containerd", "crio", "conmon", "kubelet")


class Level(enum.Enum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `remedy` says what to do about it."""

    level: Level
    check: str
    message: str
    remedy: str | None = None


def run_checks(registries: Sequence[str]) -> list[Finding]:
    """All checks, in the order in which a person would want to read them."""
    findings: list[Finding] = []
    try:
        settings = load_settings()
        exists = os.path.exists(settings.path)
        note = settings.path if exists else f"{settings.path} is not there: defaults"
        findings.append(Finding(Level.OK, "configuration", note))
    except ClipError as exc:
        findings.append(Finding(Level.BROKEN, "configuration", exc.message, exc.hint))
        settings = Settings()
    findings.extend([*check_kernel(), *check_root()])
    if findings[-1].check == "user":
        return findings  # the rest is for root's eyes: it would all look broken
    checks = {
        "fuse": check_fuse(),
        "directories": check_directories(settings),
        "overlay": check_overlay(settings),
        "erofs": check_erofs(settings),
        "runtime": check_runtime(settings),
        "daemon": check_daemon(settings),
        "mounts": check_mounts(settings),
        "orphans": check_orphans(settings),
        "namespaces": check_namespaces(settings),
        "registry": check_registries(settings, registries),
    }
    for name, check in checks.items():
        try:
            findings.extend(check)
        except (OSError, ClipError) as exc:
            findings.append(Finding(Level.BROKEN, name, f"could not be checked: {exc}"))
    return findings


def check_kernel() -> Iterator[Finding]:
    """Linux 4.18: the first with what FUSE and overlayfs need here."""
    release = os.uname().release
    found = re.match(r"(\d+)\.(\d+)", release)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < OLDEST_KERNEL:
        yield Finding(
            Level.BROKEN, "kernel", f"expected Linux 4.18 or newer, got {release}",
            "boot a newer kernel",
        )  # fmt: skip
    else:
        yield Finding(Level.OK, "kernel", release)


def check_root() -> Iterator[Finding]:
    """Mounts need root."""
    if os.geteuid() != 0:
        yield Finding(
            Level.BROKEN, "user", f"expected root, got user {os.geteuid()}",
            "sudo clipshim doctor",
        )  # fmt: skip


def check_fuse(device: str = "/dev/fuse") -> Iterator[Finding]:
    """The FUSE device opens."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        yield Finding(
            Level.BROKEN, "fuse", f"{device} is missing",
            "modprobe fuse; in a container, pass the device through",
        )  # fmt: skip
    except OSError as exc:
        yield Finding(
            Level.BROKEN, "fuse", f"{device}: {exc.strerror}", "run as root on the host itself"
        )
    else:
        yield Finding(Level.OK, "fuse", device)


def check_directories(settings: Settings) -> Iterator[Finding]:
    """State lies on persistent storage that overlayfs can write to, and only root can reach it."""
    for key in ("state_dir", "run_dir"):
        path = getattr(settings, key)
        existing = _existing(path)
        magic = syscalls.fs_type(existing)
        if key == "state_dir" and magic in MEMORY_FILE_SYSTEMS:
            yield Finding(
                Level.BROKEN, key, f"{path} lies on {MEMORY_FILE_SYSTEMS[magic]}",
                f"set {key} in {settings.path} to a directory on a disk",
            )  # fmt: skip
        elif key == "state_dir" and magic == syscalls.OVERLAYFS_SUPER_MAGIC:
            yield Finding(
                Level.BROKEN, key, f"{path} lies on overlayfs, which cannot hold upper directories",
                f"mount a disk there, or set {key} in {settings.path}",
            )  # fmt: skip
        else:
            yield Finding(Level.OK, key, path)
        if existing == path:
            facts = os.stat(path)
            if facts.st_uid != 0 or facts.st_mode & 0o022:
                yield Finding(
                    Level.BROKEN, key,
                    f"{path}: owner {facts.st_uid}, mode {facts.st_mode & 0o7777:04o}: "
                    "others could write there",
                    f"chown root {path}; chmod 0700 {path}",
                )  # fmt: skip
    usage = shutil.disk_usage(_existing(settings.state_dir))
    if usage.free < settings.min_free_bytes:
        yield Finding(
            Level.NOTE, "disk",
            f"{usage.free >> 20} MiB free at {settings.state_dir}: nothing more is cached",
            "make room, or lower cache_bytes",
        )  # fmt: skip


def check_overlay(settings: Settings) -> Iterator[Finding]:
    """An overlay with upper and work where containers would have theirs."""
    if settings.overlay == "fuse-overlayfs":
        program = shutil.which("fuse-overlayfs")
        if program is None:
            yield Finding(
                Level.BROKEN, "overlay", "fuse-overlayfs is not installed",
                'apt-get install fuse-overlayfs, or set overlay = "kernel"',
            )  # fmt: skip
        else:
            yield Finding(Level.OK, "overlay", program)
        return
    if os.geteuid() != 0:
        return
    try:
        with tempfile.TemporaryDirectory(
            prefix=".doctor-", dir=_existing(settings.state_dir)
        ) as base:
            _probe_overlay(base)
    except OSError as exc:
        yield Finding(
            Level.BROKEN, "overlay", str(exc),
            "modprobe overlay; state_dir must be on ext4, xfs or btrfs",
        )  # fmt: skip
    else:
        yield Finding(Level.OK, "overlay", "kernel overlayfs")


def _probe_overlay(base: str) -> None:
    for name in ("lower", "upper", "work", "merged"):
        os.mkdir(f"{base}/{name}")
    options = (
        f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work,index=off,metacopy=off"
    )
    syscalls.mount("overlay", f"{base}/merged", "overlay", 0, options)
    syscalls.umount2(f"{base}/merged", syscalls.MNT_DETACH)


def check_erofs(settings: Settings) -> Iterator[Finding]:
    """Whether the kernel shows trees by itself."""
    if settings.mode == "fuse" or os.geteuid() != 0:
        return
    try:
        reason = erofs.probe_erofs(_existing(settings.state_dir))
    except OSError as exc:
        yield Finding(
            Level.BROKEN, "erofs", f"cannot be tried: {exc}",
            f"make {settings.state_dir} writable, with room on its file system",
        )  # fmt: skip
        return
    if reason is None:
        yield Finding(Level.OK, "erofs", "the kernel mounts trees itself")
    elif settings.mode == "erofs":
        yield Finding(Level.BROKEN, "erofs", reason, 'set mode = "auto"')
    else:
        yield Finding(
            Level.NOTE, "erofs", f"{reason}: trees are shown through FUSE, which is slower",
            "Linux 6.12 or newer with EROFS",
        )  # fmt: skip


def check_runtime(settings: Settings) -> Iterator[Finding]:
    """The runtime that does the real work."""
    from clipshim.shim.runtimes import find_runtime

    try:
        path = find_runtime(settings.runtimes, shutil.which("clipshim") or "")
    except ClipError as exc:
        yield Finding(Level.BROKEN, "runtime", exc.message, exc.hint)
        return
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, timeout=VERSION_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        yield Finding(Level.BROKEN, "runtime", f"{path} --version: {exc}", "reinstall it")
        return
    text = done.stdout.decode(errors="replace").strip().splitlines()
    if done.returncode != 0 or not text:
        yield Finding(
            Level.BROKEN, "runtime", f"{path} --version: exit status {done.returncode}",
            "reinstall it",
        )  # fmt: skip
    else:
        yield Finding(Level.OK, "runtime", f"{path} ({text[0]})")


def check_daemon(settings: Settings) -> Iterator[Finding]:
    """The node daemon answers."""
    from clipshim.cli.daemon_calls import call, is_running

    if not is_running(settings):
        yield Finding(
            Level.NOTE, "daemon", "not running",
            "nothing: the first container starts it; systemctl enable --now clipshim keeps it",
        )  # fmt: skip
        return
    try:
        reply = call(settings, {"op": "ping"}, start=False, timeout_s=PING_TIMEOUT_S)
    except ClipError as exc:
        yield Finding(
            Level.BROKEN, "daemon", exc.message,
            f"its log; else end the server, which {settings.run_dir}/keeper.json names: the keeper "
            "starts another and containers go on",
        )  # fmt: skip
        return
    yield Finding(Level.OK, "daemon", f"version {reply.get('version')}, process {reply.get('pid')}")


def check_mounts(settings: Settings) -> Iterator[Finding]:
    """Mounts of ours that answer no more, or that belong to no container."""
    from clipshim.cli.mount_probe import probe

    ours = (settings.run_dir + "/", settings.state_dir + "/")
    points = [m.mount_point for m in mountinfo.read_mounts() if m.mount_point.startswith(ours)]
    bad = False
    for point, trouble in probe(list(dict.fromkeys(points))):
        if trouble is not None:
            bad = True
            yield Finding(
                Level.BROKEN, "mounts", f"{point}: {trouble}",
                "clipshim daemon --replace repairs it; else clipshim gc",
            )  # fmt: skip
        parts = point.removeprefix(settings.run_dir + "/").split("/")
        if (
            point.startswith(settings.run_dir + "/")
            and parts[-1] == "rootfs"
            and not os.path.exists(f"{settings.container_dir(parts[0])}/state.json")
        ):
            bad = True
            yield Finding(
                Level.NOTE, "mounts", f"{point}: mounted, but no container has it", "clipshim gc"
            )
    if not bad:
        yield Finding(Level.OK, "mounts", "none stale")


def check_orphans(settings: Settings) -> Iterator[Finding]:
    """Upper directories that belong to no container."""
    uppers = f"{settings.state_dir}/upper"
    try:
        names = sorted(os.listdir(uppers))
    except FileNotFoundError:
        return
    orphans = [
        name for name in names if not os.path.exists(f"{settings.container_dir(name)}/state.json")
    ]
    if orphans:
        yield Finding(
            Level.NOTE, "orphans",
            f"{len(orphans)} upper directories without a container, such as {orphans[0]}",
            "clipshim gc",
        )  # fmt: skip
    else:
        yield Finding(Level.OK, "orphans", "no rootfs without a container")


def check_namespaces(settings: Settings) -> Iterator[Finding]:
    """Whether engines see the file systems that the daemon sees."""
    import psutil

    from clipshim.cli.daemon_calls import call, is_running

    if not is_running(settings):
        return
    try:
        reply = call(settings, {"op": "ping"}, start=False, timeout_s=PING_TIMEOUT_S)
    except ClipError:
        return  # check_daemon says so
    daemon = _mount_namespace(int(reply.get("pid") or 0))
    if daemon is None:
        return
    elsewhere = []
    for process in psutil.process_iter(["pid", "name"]):
        if process.info["name"] in ENGINE_PROCESSES:
            space = _mount_namespace(process.info["pid"])
            if space is not None and space != daemon:
                elsewhere.append(f"{process.info['name']} ({process.info['pid']})")
    if elsewhere:
        yield Finding(
            Level.NOTE, "namespaces",
            f"{', '.join(elsewhere)}: in another mount name space than the daemon",
            f"works as long as {settings.state_dir} is the same there; else take PrivateMounts "
            "and the like out of the units",
        )  # fmt: skip
    else:
        yield Finding(Level.OK, "namespaces", "engines and daemon share one")


def check_registries(settings: Settings, names: Sequence[str]) -> Iterator[Finding]:
    """Registries that were asked about, or that the configuration names, answer."""
    from clipshim.cli.registry_check import ping_registry

    configured = [name for name in settings.allowed_registries if "*" not in name]
    for name in dict.fromkeys([*names, *configured]):
        try:
            status = ping_registry(settings, name)
        except ClipError as exc:
            yield Finding(
                Level.BROKEN, "registry", exc.message,
                exc.hint or "check the network, proxies, mirrors in " + settings.certs_dir,
            )  # fmt: skip
        else:
            yield Finding(Level.OK, "registry", f"{name}: {status}")


def _mount_namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return None


def _existing(path: str) -> str:
    """`path`, or the nearest directory above it that exists."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path

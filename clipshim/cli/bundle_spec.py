"""From an image's configuration to the config.json of an OCI bundle. Pure: no files, no index.

Sources: OCI image specification, "Conversion to OCI Runtime Configuration"; Docker's defaults for
capabilities and masked paths; `runc spec` for mounts and name spaces.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clipshim.errors import BundleError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

INDEX_ANNOTATION = "io.clipshim.index"
DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Docker's defaults: what ordinary images are built and tested with.
CAPABILITIES = [
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
    "CAP_MKNOD", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP",
    "CAP_SETUID", "CAP_SYS_CHROOT",
]  # fmt: skip
MASKED_PATHS = [
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys",
    "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list",
    "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
]  # fmt: skip
READONLY_PATHS = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
# Labels become annotations, but an annotation can steer a runtime (org.systemd.property.*,
# run.oci.*, io.clipshim.*) and labels are the image author's: only harmless names pass.
HARMLESS_LABELS = "org.opencontainers.image."


@dataclass(frozen=True, slots=True)
class User:
    """The numbers behind a USER, as Docker resolves it."""

    uid: int = 0
    gid: int = 0
    additional_gids: list[int] = field(default_factory=list)


def resolve_user(user: str, passwd: bytes | None, group: bytes | None) -> User:
    """The numbers behind `user[:group]`, names or numbers, empty for root.

    `passwd` and `group` are the image's files, None if it has none. An explicit group leaves the
    user without supplementary groups, as in Docker. Raises NotFoundError for an unknown name.
    """
    user_part, _, group_part = user.partition(":")
    user_part = user_part or "0"
    name, uid, gid = None, None, 0
    for fields in _records(passwd, 7):
        number, primary = _number(fields[2]), _number(fields[3])
        if number is not None and primary is not None and user_part in (fields[0], str(number)):
            name, uid, gid = fields[0], number, primary
            break
    if uid is None:
        uid = _number(user_part)
        if uid is None:
            raise NotFoundError(
                f"user {user!r}: {user_part!r} is not in the image's /etc/passwd",
                hint="name the user by number",
            )
    if group_part:
        for fields in _records(group, 4):
            number = _number(fields[2])
            if number is not None and group_part in (fields[0], str(number)):
                return User(uid, number, [number])
        number = _number(group_part)
        if number is None:
            raise NotFoundError(
                f"user {user!r}: group {group_part!r} is not in the image's /etc/group",
                hint="name the group by number",
            )
        return User(uid, number, [number])
    # The primary group is among the supplementary ones: without it a program can drop it and
    # gain what the group is denied (CVE-2022-36109).
    gids = [gid]
    for fields in _records(group, 4):
        number = _number(fields[2])
        if name is not None and number is not None and name in fields[3].split(","):
            gids.append(number)
    return User(uid, gid, list(dict.fromkeys(gids)))


def command_of(
    config: dict[str, Any], arguments: Sequence[str], entrypoint: Sequence[str] | None = None
) -> list[str]:
    """The program and its arguments: `arguments` replace the image's Cmd, not its Entrypoint."""
    chosen = list(entrypoint) if entrypoint is not None else _strings(config, "Entrypoint")
    # As in Docker: another entry point does not get the Cmd that was meant for the image's own.
    defaults = [] if entrypoint is not None else _strings(config, "Cmd")
    command = [*chosen, *(arguments or defaults)]
    if not command or not command[0]:
        raise BundleError(
            "the image has neither Entrypoint nor Cmd",
            hint="name the program: clipshim bundle IMAGE DIR -- PROGRAM ARGS",
        )
    return command


def config_of(image_config: dict[str, Any]) -> dict[str, Any]:
    """What the image says about its containers. Raises BundleError."""
    config = image_config.get("config") or {}
    if not isinstance(config, dict):
        raise BundleError("image configuration: config: expected an object")
    return config


def volumes_of(image_config: dict[str, Any]) -> list[str]:
    """The absolute paths that the image declares as volumes. Raises BundleError."""
    volumes = config_of(image_config).get("Volumes") or {}
    if not isinstance(volumes, dict):
        raise BundleError("image configuration: Volumes: expected an object")
    return [p for p in sorted(volumes) if p.startswith("/") and ".." not in p.split("/")]


def runtime_spec(
    image_config: dict[str, Any],
    *,
    index_name: str,
    user: User,
    arguments: Sequence[str] = (),
    entrypoint: Sequence[str] | None = None,
    terminal: bool = False,
    host_network: bool = False,
    cgroup_namespace: bool = False,
    hostname: str = "clipshim",
    missing_volumes: Sequence[str] = (),
) -> dict[str, Any]:
    """config.json for an image; `index_name` is the index's file name inside the bundle.

    `image_config` is the whole OCI image configuration. A volume is a directory like any other
    here, kept as long as the container is; `missing_volumes` are those that the image declares
    but has no directory for, and get a tmpfs. (runc's tmpcopyup for all of them would hold data
    in memory and fails at a FIFO.)
    Raises BundleError when the configuration holds a value of the wrong shape.
    """
    config = config_of(image_config)
    env = _strings(config, "Env")
    if not any(item.startswith("PATH=") for item in env):
        env = [DEFAULT_PATH, *env]
    if terminal and not any(item.startswith("TERM=") for item in env):
        env.append("TERM=xterm")
    cwd = config.get("WorkingDir") or "/"
    if not isinstance(cwd, str):
        raise BundleError("image configuration: WorkingDir: expected a string")
    held = CAPABILITIES if user.uid == 0 else []
    namespaces = ["pid", "ipc", "uts", "mount"]
    if not host_network:
        namespaces.insert(1, "network")
    if cgroup_namespace:
        namespaces.append("cgroup")
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": terminal,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.additional_gids},
            "args": command_of(config, arguments, entrypoint),
            "env": env,
            "cwd": cwd if cwd.startswith("/") else f"/{cwd}",
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": held,
                "permitted": held,
            },
            "noNewPrivileges": False,
        },
        "root": {"path": "rootfs", "readonly": False},
        "hostname": hostname,
        "mounts": [
            *_mounts(host_network=host_network),
            *map(_volume_mount, missing_volumes),
        ],
        "annotations": _annotations(image_config, config, index_name),
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": name} for name in namespaces],
            "maskedPaths": MASKED_PATHS,
            "readonlyPaths": READONLY_PATHS,
        },
    }


def _mounts(*, host_network: bool) -> list[dict[str, Any]]:
    def mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
        return {
            "destination": destination, "type": kind, "source": source, "options": list(options),
        }  # fmt: skip

    mounts = [
        mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
        mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        mount(
            "/dev/pts", "devpts", "devpts",
            "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5",
        ),
        mount(
            "/dev/shm", "tmpfs", "shm",  # noqa: S108  (in the container)
            "nosuid", "noexec", "nodev", "mode=1777", "size=65536k",
        ),
        mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
        mount(
            "/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro"
        ),
    ]  # fmt: skip
    if host_network:
        for path in ("/etc/hosts", "/etc/resolv.conf"):
            mounts.append(mount(path, "bind", path, "rbind", "ro"))  # noqa: PERF401
    return mounts


def _volume_mount(path: str) -> dict[str, Any]:
    return {
        "destination": path,
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["nosuid", "nodev", "relatime", "mode=755"],
    }


def _annotations(
    image_config: dict[str, Any], config: dict[str, Any], index_name: str
) -> dict[str, str]:
    annotations: dict[str, str] = {}
    for name, key in (
        ("os", "os"), ("architecture", "architecture"), ("author", "author"),
        ("created", "created"),
    ):  # fmt: skip
        value = image_config.get(key)
        if isinstance(value, str) and value:
            annotations[f"{HARMLESS_LABELS}{name}"] = value
    stop_signal = config.get("StopSignal")
    if isinstance(stop_signal, str) and stop_signal:
        annotations[f"{HARMLESS_LABELS}stopSignal"] = stop_signal
    ports = config.get("ExposedPorts")
    if isinstance(ports, dict) and ports:
        annotations[f"{HARMLESS_LABELS}exposedPorts"] = ",".join(sorted(ports))
    labels = config.get("Labels")
    if isinstance(labels, dict):
        annotations |= {
            label: value
            for label, value in labels.items()
            if label.startswith(HARMLESS_LABELS) and isinstance(value, str)
        }
    annotations[INDEX_ANNOTATION] = index_name
    return annotations


def _strings(config: dict[str, Any], key: str) -> list[str]:
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BundleError(f"image configuration: {key}: expected a list of strings, got {value!r}")
    return list(value)


def _records(text: bytes | None, fields: int) -> list[list[str]]:
    """The well-formed lines of a passwd or group file; short ones are padded as Docker does."""
    records = []
    for line in (text or b"").decode("utf-8", "surrogateescape").splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        parts = line.split(":")
        records.append([*parts, *[""] * (fields - len(parts))])
    return records


def _number(text: str) -> int | None:
    if text.isascii() and text.isdigit() and int(text) < 1 << 32:
        return int(text)
    return None

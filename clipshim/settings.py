"""The configuration: /etc/clipshim/config.toml, every key with a working default.

One definition for the runtime's fast path, the node daemon and the command line, so standard
library only; a TOML parser is loaded only when the file exists. Not for the state of anything.
"""

import os

from clipshim.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_CONFIG = "/etc/clipshim/config.toml"
CONFIG_ENV = "CLIPSHIM_CONFIG"
_MAX_RUN_DIR = 90  # sun_path of unix(7) holds 107 bytes

# key: (default, what it is for). Sizes in bytes, times in seconds.
DEFAULTS: "dict[str, tuple[Any, str]]" = {
    "runtimes": (["runc", "crun"], "low-level runtimes, tried in order: names or absolute paths"),
    "state_dir": ("/var/lib/clip", "indexes, cached spans, upper directories; persistent storage"),
    "run_dir": ("/run/clip", "sockets, mounts and container state; gone after a reboot"),
    "mode": ("auto", "how trees are shown: auto, erofs or fuse"),
    "overlay": ("kernel", "what makes the rootfs: kernel or fuse-overlayfs"),
    "allowed_registries": (
        ["*"],
        "registries that containers may name in annotations: host names, * as wildcard",
    ),
    "index_dirs": ([], "directories whose .clip files containers may name in annotations"),
    "index_on_demand": (False, "index an image at create if no index is found for it"),
    "fallback": ("fail", "when an image cannot be started lazily: fail, or unpack it whole"),
    "node_credentials": (
        False,
        "use the node's registry credentials for images that containers name in annotations",
    ),
    "cache_bytes": (20 << 30, "bound of the layer store, least recently used spans go first"),
    "memory_bytes": (128 << 20, "bound of span data that the server holds in memory"),
    "min_free_bytes": (256 << 20, "free space that the layer store leaves on its file system"),
    "prefetch": ("profile", "what is fetched ahead: none, profile or all"),
    "parallel_fetches": (8, "ranged requests at a time, on demand and ahead together"),
    "connect_timeout_s": (10.0, "to open a connection to a registry"),
    "read_timeout_s": (30.0, "without a byte from a registry before a request is tried again"),
    "fetch_deadline_s": (120.0, "after which a read that the registry does not answer is an error"),
    "daemon_timeout_s": (120.0, "that the runtime waits for the node daemon"),
    "linger_s": (60.0, "that an unused tree stays mounted for the next container"),
    "plain_http": ([], "registries spoken to without TLS; loopback always may be"),
    "certs_dir": ("/etc/containerd/certs.d", "mirrors and certificates, as containerd reads them"),
    "metrics_address": ("", "host:port of a Prometheus endpoint; empty for none"),
    "log_format": ("text", "of the daemon's log: text or json"),
    "log_level": ("info", "of the daemon's log: debug, info, warning or error"),
}
CHOICES = {
    "mode": ("auto", "erofs", "fuse"),
    "overlay": ("kernel", "fuse-overlayfs"),
    "fallback": ("fail", "unpack"),
    "prefetch": ("none", "profile", "all"),
    "log_format": ("text", "json"),
    "log_level": ("debug", "info", "warning", "error"),
}


class Settings:
    """One value a key of DEFAULTS, and the paths that follow from them."""

    __slots__ = (*DEFAULTS, "path")

    runtimes: "list[str]"
    state_dir: str
    run_dir: str
    mode: str
    overlay: str
    allowed_registries: "list[str]"
    index_dirs: "list[str]"
    index_on_demand: bool
    fallback: str
    node_credentials: bool
    cache_bytes: int
    memory_bytes: int
    min_free_bytes: int
    prefetch: str
    parallel_fetches: int
    connect_timeout_s: float
    read_timeout_s: float
    fetch_deadline_s: float
    daemon_timeout_s: float
    linger_s: float
    plain_http: "list[str]"
    certs_dir: str
    metrics_address: str
    log_format: str
    log_level: str
    path: str  # the file that was read, or would have been

    def __init__(self, values: "dict[str, Any] | None" = None, *, path: str = "") -> None:
        self.path = path
        for key, (default, _) in DEFAULTS.items():
            setattr(self, key, list(default) if isinstance(default, list) else default)
        for key, value in (values or {}).items():
            setattr(self, key, _checked(key, value, path))

    @property
    def daemon_socket(self) -> str:
        """The node daemon's control socket."""
        return f"{self.run_dir}/daemon.sock"

    @property
    def layers_mount(self) -> str:
        """The node's one FUSE mount of layer files."""
        return f"{self.run_dir}/layers"

    @property
    def index_store(self) -> str:
        """The local store of indexes."""
        return f"{self.state_dir}/indexes"

    @property
    def layer_store(self) -> str:
        """The local store of spans."""
        return f"{self.state_dir}/layers"

    def container_dir(self, cid: str) -> str:
        """State and mount points of one container."""
        return f"{self.run_dir}/{cid}"

    def upper_dir(self, cid: str) -> str:
        """What one container has written."""
        return f"{self.state_dir}/upper/{cid}"

    def work_dir(self, cid: str) -> str:
        """Overlayfs's work directory of one container."""
        return f"{self.state_dir}/work/{cid}"

    def tree_mount(self, image_id: str) -> str:
        """Where the tree of an image is mounted in the daemon's mount namespace."""
        return f"{self.state_dir}/mnts/{image_id}/ro"


def load_settings(path: "str | None" = None) -> Settings:
    """Reads `path`, else $CLIPSHIM_CONFIG, else the default file, which may be missing.

    Raises ConfigError, which names the file and the key.
    """
    named = path or os.environ.get(CONFIG_ENV)
    chosen = named or DEFAULT_CONFIG
    try:
        with open(chosen, "rb") as file:
            text = file.read().decode()
        values = _read_flat(text)
        if values is None:
            import tomllib  # only for what is not flat: it imports re and typing, 10 ms

            values = tomllib.loads(text)
    except FileNotFoundError:
        if named:
            raise ConfigError(
                f"configuration {chosen}: no such file", hint=f"create it, or unset {CONFIG_ENV}"
            ) from None
        return Settings(path=chosen)
    except OSError as exc:
        raise ConfigError(f"configuration {chosen}: {exc.strerror}") from exc
    except ValueError as exc:  # TOMLDecodeError and bad UTF-8
        raise ConfigError(f"configuration {chosen}: {exc}") from exc
    return Settings(values, path=chosen)


def _read_flat(text: str) -> "dict[str, Any] | None":
    """Reads TOML that has one plain `key = value` a line; None for anything else.

    That is what configurations look like, and every start of a container reads one.
    """
    values: dict[str, Any] = {}
    for line in text.split("\n"):
        stripped = line.strip(" \t\r")
        if not stripped or stripped.startswith("#"):
            if not stripped.isprintable():
                return None
            continue
        key, equals, raw = (part.strip(" \t") for part in stripped.partition("="))
        if not equals or key not in DEFAULTS or key in values:
            return None
        if raw.startswith("[") and raw.endswith("]"):
            inner = raw[1:-1].strip(" \t").removesuffix(",")
            items = [_plain(item.strip(" \t")) for item in inner.split(",")] if inner else []
            if not all(isinstance(item, str) for item in items):
                return None
            values[key] = items
        else:
            value = _plain(raw)
            if value is None:
                return None
            values[key] = value
    return values


def _plain(raw: str) -> "str | int | bool | None":
    """A string without escapes, a decimal number or a truth value; None for anything else."""
    if len(raw) >= 2 and raw[0] == raw[-1] == '"':
        inner = raw[1:-1]
        return inner if inner.isprintable() and '"' not in inner and "\\" not in inner else None
    if raw in ("true", "false"):
        return raw == "true"
    if raw == "0" or (raw.isascii() and raw.isdigit() and raw[0] != "0"):
        return int(raw)
    return None


def _checked(key: str, value: "Any", path: str) -> "Any":
    where = f"configuration {path}: " if path else ""
    if key not in DEFAULTS:
        raise ConfigError(f"{where}unknown key {key!r}", hint=f"known keys: {', '.join(DEFAULTS)}")
    default = DEFAULTS[key][0]
    if isinstance(default, bool):
        good, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, (int, float)):
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
        expected = "a number of 0 or more"
        if good and isinstance(default, int) and not isinstance(value, int):
            good, expected = False, "a whole number"
    elif isinstance(default, list):
        good = isinstance(value, list) and all(isinstance(item, str) for item in value)
        expected = "a list of strings"
    else:
        good, expected = isinstance(value, str), "a string"
    if good and key in CHOICES and value not in CHOICES[key]:
        good, expected = False, "one of " + ", ".join(CHOICES[key])
    if good and key in ("state_dir", "run_dir", "certs_dir"):
        good, expected = os.path.isabs(value), "an absolute path"
    if good and key == "run_dir":
        good = len(os.fsencode(value)) <= _MAX_RUN_DIR
        expected = f"at most {_MAX_RUN_DIR} bytes, since sockets lie in it"
    if not good:
        raise ConfigError(f"{where}{key}: expected {expected}, got {value!r}")
    if key in ("state_dir", "run_dir"):
        return os.path.normpath(value)
    return float(value) if isinstance(default, float) else value

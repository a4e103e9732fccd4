"""What clipshim knows of one container: <run_dir>/<cid>/state.json, and the lock beside it.

    <run_dir>/<cid>/
        lock         held (flock) while a verb works on the container; survives nobody's death
        state.json   the plan, written before the first mount, so that whatever a crash leaves
                     behind can be found and taken down by the next one
        config.json  the bundle's, as it was before root.path was rewritten
        rootfs/      mount point of an own rootfs
        lower/       where the tree is attached while the overlay is being mounted

`delete` gets no bundle, so that a container is keyed by runc's root directory and its ID.
"""

import fcntl
import os
import sys

from clipshim.errors import MountError, StoreError
from clipshim.shim import json_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from clipshim.settings import Settings

STATE_VERSION = 1
KEPT_CONFIG = "config.json"
DEFAULT_ROOT = "/run/runc"
MAX_STATE_BYTES = 4 << 20
# What else lies in run_dir: an ID of that name gets the longer key. The daemon's files that are not
# here end in .lock or .sock; a test compares this with what a daemon makes.
_LAYERS = "layers"
_RESERVED_NAMES = (_LAYERS, "keeper.json", "hand-mounts.json", "hand-mounts.json.new")
_RESERVED_START = ".keeper.json."  # a draft


def default_root(runtime: str) -> str:
    """Where a low-level runtime keeps its state if --root does not say so."""
    if os.path.basename(runtime) != "crun":
        return DEFAULT_ROOT
    # crun heeds the variable for root too, as after `sudo -E`; runc only in a user namespace
    own = os.environ.get("XDG_RUNTIME_DIR")
    return f"{own}/crun" if own else "/run/crun"


def container_key(container_id: str, root: str) -> str:
    """The key of a container: its ID, and a digest of runc's root if that is not the default."""
    real = os.path.realpath(root)
    if real == os.path.realpath(DEFAULT_ROOT) and _is_plain(container_id):
        return container_id
    return f"{container_id}-{_sha256_hex(os.fsencode(real))[:8]}"


def is_valid_id(container_id: str) -> bool:
    """Whether an ID is a name that runc could accept, and safe as a file name."""
    return (
        0 < len(container_id) <= 240
        and container_id not in (".", "..")
        and "/" not in container_id
        and "\0" not in container_id
    )


class ContainerState:
    """One container's state file. A field that is not there is None."""

    __slots__ = ("directory", "values")

    def __init__(self, directory: str, values: "dict[str, Any]") -> None:
        self.directory = directory
        self.values = values

    def text(self, name: str) -> str:
        """A field that is a string, or "" where it is missing."""
        value = self.values.get(name)
        return value if isinstance(value, str) else ""

    @property
    def key(self) -> str:
        """The container's key, which names its directory."""
        return os.path.basename(self.directory)

    @property
    def runtime_directory(self) -> str:
        """Where the low-level runtime keeps its own state of the container."""
        return os.path.join(self.text("root") or DEFAULT_ROOT, self.text("id"))

    @property
    def kept_config(self) -> str:
        """Where the bundle's config.json is kept as it was."""
        return f"{self.directory}/{KEPT_CONFIG}"

    def is_gone(self) -> bool:
        """Whether the low-level runtime knows the container no more (or never did)."""
        return not os.path.lexists(self.runtime_directory)

    @property
    def is_checkpointed(self) -> bool:
        """Whether what the container wrote is being kept for a restore."""
        return self.values.get("checkpointed") is True

    def save(self, **changes: "Any") -> None:
        """Writes the file with changes; whole or not at all."""
        self.values.update(changes)
        temporary = f"{self.directory}/.state.json.tmp"
        fd = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            rest = memoryview(json_text.dumps(self.values).encode())
            while rest:  # a disk that is nearly full takes a part first
                rest = rest[os.write(fd, rest) :]
        finally:
            os.close(fd)
        # no fsync: run_dir does not outlive a reboot, and rename orders it for everybody who reads
        os.rename(temporary, f"{self.directory}/state.json")


def load_state(settings: "Settings", key: str) -> "ContainerState | None":
    """The state of a container, None if there is none. Raises StoreError for a damaged file."""
    directory = settings.container_dir(key)
    try:
        fd = os.open(f"{directory}/state.json", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        raw = os.read(fd, MAX_STATE_BYTES)
    finally:
        os.close(fd)
    try:
        values = json_text.loads(raw)
    except ValueError as exc:
        raise StoreError(f"{directory}/state.json: {exc}", hint="clipshim gc removes it") from exc
    if not isinstance(values, dict) or values.get("version") != STATE_VERSION:
        raise StoreError(f"{directory}/state.json: expected version {STATE_VERSION}")
    return ContainerState(directory, values)


def load_for_removal(
    settings: "Settings", key: str, container_id: str, root: str
) -> "ContainerState | None":
    """As load_state, but a damaged file gives what follows from the key, enough to tear down."""
    try:
        return load_state(settings, key)
    except StoreError:
        values = {"version": STATE_VERSION, "kind": "own", "id": container_id, "root": root}
        return ContainerState(settings.container_dir(key), values)


def list_states(settings: "Settings") -> "list[str]":
    """The keys of all containers that have a directory, complete or not."""
    try:
        entries = list(os.scandir(settings.run_dir))
    except FileNotFoundError:
        return []
    return sorted(
        entry.name
        for entry in entries
        if entry.is_dir(follow_symlinks=False)
        and entry.name != _LAYERS
        and os.path.lexists(f"{entry.path}/lock")
    )


class ContainerLock:
    """The lock of one container, held from entering the block to leaving it.

    Creates the container's directory; leaves it there for the holder to remove.
    """

    __slots__ = ("_fd", "_path", "_wait_s")

    def __init__(self, settings: "Settings", key: str, *, wait_s: float) -> None:
        self._path = settings.container_dir(key)
        self._wait_s = wait_s
        self._fd = -1

    def __enter__(self) -> "ContainerLock":
        while True:
            make_private(os.path.dirname(self._path))
            make_private(self._path)
            try:
                fd = os.open(f"{self._path}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue  # the holder before us has removed the directory
            try:
                lock_file(fd, self._wait_s)
                if os.fstat(fd).st_nlink:
                    self._fd = fd
                    return self
            except (BlockingIOError, TimeoutError):
                os.close(fd)
                raise StoreError(
                    f"container {os.path.basename(self._path)}: another process works on it"
                ) from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # locked what had just been removed: look again

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        self._fd = -1


def lock_file(fd: int, wait_s: float) -> None:
    """Locks (flock), waiting at most so long. Raises BlockingIOError or TimeoutError."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        if wait_s <= 0:
            raise
    import signal  # only when somebody else holds the lock

    def expired(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, wait_s)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_private(path: str) -> None:
    """Creates a directory that only root can enter; refuses a link or somebody else's."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        facts = os.lstat(path)
        if facts.st_mode & 0o170000 != 0o040000 or facts.st_uid != os.geteuid():
            raise MountError(f"{path}: expected a directory of root's own") from None
        if facts.st_mode & 0o077:
            os.chmod(path, 0o700)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        make_private(path)


def _is_plain(container_id: str) -> bool:
    return not (
        container_id in _RESERVED_NAMES
        or container_id.startswith(_RESERVED_START)
        or container_id.endswith((".lock", ".sock"))
    )


def _sha256_hex(data: bytes) -> str:
    try:  # not hashlib, which loads OpenSSL: 4 ms
        sha256 = __import__("_sha2" if sys.version_info >= (3, 12) else "_sha256").sha256
    except ImportError:
        from hashlib import sha256
    return str(sha256(data).hexdigest())

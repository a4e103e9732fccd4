"""The keeper: the part of the node daemon that must not die, so it does next to nothing.

It holds what would break containers if it were closed: the FUSE connections of the layers mount
and of every tree shown in mode fuse, and the listening socket. It starts the server and the tree
servers and starts them again when they die. It never reads a FUSE mount, speaks no RPC and opens
no index. Standard library only.

    keeper ─┬─ server           control socket, listening socket, layers connection
            └─ tree_server …    one FUSE connection each

Should the keeper itself be killed, the server starts a new one with `--adopt`, which finds the
descriptors it inherits in that argument and the processes in keeper.json.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import sys

from clipshim.errors import ClipError, DaemonError
from clipshim.mounts import mountinfo
from clipshim.node import foster, fuse_connection, own_cgroup, sd_notify
from clipshim.node.control import close_all
from clipshim.node.keeper_loop import Keeper, mount_layers, note_early_signals, unmount_all
from clipshim.node.keeper_state import STATE_NAME, KeeperState, new_generation, read_state
from clipshim.node.kept_settings import keep, settings_of_daemon
from clipshim.node.processes import ProcessId, raise_limits
from clipshim.settings import CONFIG_ENV, Settings

log = logging.getLogger("clipshim.node.keeper")

BACKLOG = 1024
ENDING_TIMEOUT_S = 60  # for a daemon that has removed its socket already


def resolve_directories(settings: Settings) -> None:
    """Paths as mountinfo will name them; resolving them later could touch a FUSE mount."""
    settings.run_dir = os.path.realpath(settings.run_dir)
    settings.state_dir = os.path.realpath(settings.state_dir)


def make_private_directory(path: str) -> None:
    """Makes `path`, for root alone. Raises DaemonError if it belongs to somebody else."""
    os.makedirs(path, mode=0o700, exist_ok=True)
    status = os.stat(path)
    if status.st_uid != os.geteuid():
        raise DaemonError(
            f"{path}: expected an owner of uid {os.geteuid()}, got {status.st_uid}",
            hint="remove it or choose another directory in the configuration",
        )
    if status.st_mode & 0o077:
        os.chmod(path, 0o700)


def start_fresh(settings: Settings) -> Keeper | None:
    """A keeper with everything new, or with what systemd kept; None if a daemon runs already."""
    for path in (settings.run_dir, settings.state_dir):
        make_private_directory(path)
    lock_fd = _lock(f"{settings.run_dir}/daemon.lock", settings.daemon_socket)
    if lock_fd is None:
        return None
    kept = sd_notify.inherited_fds()
    before = read_state(settings.run_dir)
    layers_fd = kept.pop("layers", -1)
    mounted = mountinfo.mount_at(settings.layers_mount)
    tree_fds: dict[str, int] = {}
    if layers_fd >= 0 and mounted and before and fuse_connection.is_alive(layers_fd):
        state = before
        for image_id in list(state.trees):
            fd = kept.pop(f"tree-{image_id}", -1)
            if fd >= 0 and fuse_connection.is_alive(fd):
                tree_fds[image_id] = fd
            else:
                close_all([fd] if fd >= 0 else [])
                del state.trees[image_id]
                sd_notify.forget_fd(f"tree-{image_id}")
        log.info("goes on with the connections that systemd kept")
    else:
        close_all([layers_fd] if layers_fd >= 0 else [])
        if mounted is not None:
            log.warning("removing a dead layers mount; containers that need uncached data are lost")
        unmount_all(settings.layers_mount)
        os.makedirs(settings.layers_mount, mode=0o700, exist_ok=True)
        layers_fd = mount_layers(settings)
        state = KeeperState(new_generation())
    for name, fd in kept.items():
        os.close(fd)
        sd_notify.forget_fd(name)
    keeper = Keeper(
        settings,
        state,
        lock_fd=lock_fd,
        listener_fd=_listen(settings.daemon_socket),
        layers_fd=layers_fd,
        tree_fds=tree_fds,
    )
    keeper.adopt_trees()
    keeper.start_server()
    return keeper


def adopt(settings: Settings, text: str) -> Keeper:
    """A keeper in the place of one that died or executed itself anew."""
    raw = json.loads(text)
    known = raw.get("known")  # who started us knows better than a file on a disk that was full
    state = read_state(settings.run_dir)
    if state is None:
        if known is None:
            raise DaemonError(f"{settings.run_dir}/{STATE_NAME}: missing or damaged")
        state = KeeperState(known["generation"])
    if known is not None:
        state.generation, state.server = known["generation"], ProcessId(*known["server"])
    tree_fds = {image_id: int(fd) for image_id, fd in raw["trees"].items()}
    for fd in (raw["listener"], raw["layers"], raw["lock"], *tree_fds.values()):
        if fd >= 0:
            os.set_inheritable(fd, False)
    state.trees = {i: tree for i, tree in state.trees.items() if i in tree_fds}
    for image_id in [i for i in tree_fds if i not in state.trees]:
        os.close(tree_fds.pop(image_id))
    keeper = Keeper(
        settings,
        state,
        lock_fd=raw["lock"],
        listener_fd=raw["listener"],
        layers_fd=raw["layers"],
        tree_fds=tree_fds,
    )
    sd_notify.notify(f"MAINPID={os.getpid()}")
    keeper.adopt_trees()
    if raw["control"] is not None:
        keeper.adopt_server(raw["control"])
    else:
        keeper.start_server()
    return keeper


def _lock(path: str, socket_path: str) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if os.path.exists(socket_path):
            os.close(fd)
            return None
        _lock_when_it_ends(fd, path)
    return fd


def _lock_when_it_ends(fd: int, path: str) -> None:
    """Waits for a daemon that has removed its socket. Raises DaemonError if it goes on."""

    def expired(*_: object) -> None:
        raise DaemonError(
            f"{path}: held by a daemon without a socket",
            hint="end the processes that keeper.json beside it names, then try again",
        )

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(ENDING_TIMEOUT_S)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _listen(path: str) -> int:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(before)
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock.detach()


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -I -m clipshim.node.keeper`."""
    parser = argparse.ArgumentParser(prog="clipshim.node.keeper")
    parser.add_argument("--config", help="configuration file")
    parser.add_argument("--adopt", help=argparse.SUPPRESS)
    parser.add_argument(
        "--ready-fd", type=int, help="written to and closed when clients can connect"
    )
    parser.add_argument("--own-cgroup", action="store_true", help="leave the caller's cgroup")
    parser.add_argument("--container-dir", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.config:
        os.environ[CONFIG_ENV] = options.config
    if options.adopt:
        note_early_signals()
    raise_limits()
    try:
        settings = settings_of_daemon(fresh=not options.adopt)
        resolve_directories(settings)
        keep(settings)
        if options.own_cgroup:
            own_cgroup.move_self()
        if options.container_dir:
            foster.stand_between(options.container_dir)
        keeper = adopt(settings, options.adopt) if options.adopt else _start(settings)
    except (ClipError, OSError) as exc:
        log.error("cannot start: %s", exc)
        return exc.exit_code if isinstance(exc, ClipError) else 1
    if options.ready_fd is not None:
        with contextlib.suppress(OSError):
            os.write(options.ready_fd, b"ready\n")
            os.close(options.ready_fd)
    if keeper is None:
        log.info("a daemon runs already", extra={"run_dir": settings.run_dir})
        return 0
    return keeper.run()


def _start(settings: Settings) -> Keeper | None:
    """Starts while holding start.lock, so that whoever finds daemon.lock taken can connect."""
    make_private_directory(settings.run_dir)
    fd = os.open(f"{settings.run_dir}/start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        return start_fresh(settings)
    finally:
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main())

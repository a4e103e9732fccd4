"""Starts the node daemon when the first container needs it.

The daemon outlives its caller: a session and a cgroup of its own, no descriptor of the caller's but
/dev/null, its log and the pipe that it says "ready" through. Which of several started at once stays
is the keeper's decision.
"""

import fcntl
import os
import sys

from clipshim.errors import DaemonError
from clipshim.shim import child as children
from clipshim.shim import daemon_client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from clipshim.settings import Settings

# of the engine's environment: never an image's, whose variables are in config.json
_KEPT_VARIABLES = (
    "HOME",
    "DOCKER_CONFIG",
    "REGISTRY_AUTH_FILE",
    "XDG_RUNTIME_DIR",
    "XDG_CONFIG_HOME",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
    "TZ",
)
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def ask_daemon(
    settings: "Settings",
    request: "dict[str, Any]",
    *,
    fds: "Sequence[int]" = (),
    on_progress: "Callable[[dict[str, Any]], None] | None" = None,
    at_most_s: float = float("inf"),
    container_dir: str = "",
) -> daemon_client.Reply:
    """daemon_client.ask with the configured socket and timeout; starts a daemon if none runs.

    A daemon that the create of a container starts is kept away from the engine until
    `container_dir` is deleted (node/foster.py).
    """
    path, timeout_s = settings.daemon_socket, min(settings.daemon_timeout_s, at_most_s)
    try:
        return daemon_client.ask(
            path, request, fds=fds, timeout_s=timeout_s, on_progress=on_progress
        )
    except daemon_client.NoDaemonError:
        start_daemon(settings, container_dir)
    return daemon_client.ask(path, request, fds=fds, timeout_s=timeout_s, on_progress=on_progress)


def start_daemon(settings: "Settings", container_dir: str = "") -> None:
    """Starts a daemon unless one answers; returns when clients can connect. Raises DaemonError."""
    os.makedirs(settings.run_dir, mode=0o700, exist_ok=True)
    os.makedirs(settings.state_dir, mode=0o700, exist_ok=True)
    lock_fd = os.open(
        f"{settings.run_dir}/autostart.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
    )
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX)
        try:  # lock, then look again: another create may have started it
            daemon_client.ask(
                settings.daemon_socket, {"op": "ping"}, timeout_s=settings.daemon_timeout_s
            ).close()
        except daemon_client.NoDaemonError:
            _start(settings, container_dir)
    finally:
        os.close(lock_fd)


def _start(settings: "Settings", container_dir: str) -> None:
    log_path = f"{settings.state_dir}/daemon.log"
    command = [sys.executable, "-I", "-m", "clipshim.node.keeper", "--own-cgroup"]
    if os.path.exists(settings.path):
        command += ["--config", settings.path]
    if container_dir:
        command += ["--container-dir", container_dir]
    ready_read, ready_write = os.pipe()
    command += ["--ready-fd", "3"]
    children.keep_children()
    child = os.fork()
    if child == 0:
        try:
            _become_daemon(command, log_path, ready_write)
        except BaseException:
            os._exit(127)
        finally:
            os._exit(127)
    os.close(ready_write)
    try:
        os.waitpid(child, 0)  # the first of two forks; it ends at once
        if not _wait_readable(ready_read, settings.daemon_timeout_s):
            raise DaemonError(
                f"node daemon: not ready within {settings.daemon_timeout_s:g} s",
                hint=f"its log is {log_path}",
            )
        if not os.read(ready_read, 64):
            raise DaemonError(
                f"node daemon: ended while starting: {_last_line(log_path)}",
                hint=f"its log is {log_path}",
            )
    finally:
        os.close(ready_read)


def _become_daemon(command: "list[str]", log_path: str, ready_fd: int) -> None:
    """In the child: two forks, so that the daemon is nobody's child and never gets a terminal."""
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    os.umask(0o022)
    ready_copy = fcntl.fcntl(ready_fd, fcntl.F_DUPFD_CLOEXEC, 10)
    null_fd = fcntl.fcntl(os.open("/dev/null", os.O_RDWR), fcntl.F_DUPFD_CLOEXEC, 10)
    log_fd = fcntl.fcntl(
        os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600),
        fcntl.F_DUPFD_CLOEXEC,
        10,
    )
    os.dup2(null_fd, 0)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    os.dup2(ready_copy, 3)  # dup2 leaves it inheritable
    os.closerange(4, _highest_fd() + 1)
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    environment["PATH"] = _DEFAULT_PATH
    environment["LANG"] = "C.UTF-8"
    _default_signals()
    os.execve(command[0], command, environment)  # noqa: S606 - no shell is what we want


def _default_signals() -> None:
    import signal  # only when a daemon starts

    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _highest_fd() -> int:
    try:
        return max(int(name) for name in os.listdir("/proc/self/fd"))
    except (OSError, ValueError):
        return 65535


def _wait_readable(fd: int, timeout_s: float) -> bool:
    import select  # only when a daemon starts

    return bool(select.select([fd], [], [], timeout_s)[0])


def _last_line(path: str) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().split(b"\n")
    except OSError as exc:
        return f"no log: {exc}"
    found = [line for line in lines if line.strip()]
    return os.fsdecode(found[-1]) if found else "it wrote nothing"

"""A foster parent for a daemon that a container's create has started, so that nobody waits for it.

What orphans are left below an engine's process that adopts them (PR_SET_CHILD_SUBREAPER) are its
children until it ends. At the end of a container podman's conmon stops adopting, and then waits
for every child that it has, before it ends itself; podman 5 waits for conmon. So a node daemon
that conmon had adopted would keep `podman run` waiting for ever.

    conmon ── foster ── keeper ── server …

No process can leave an ancestor that adopts, but whoever is orphaned after it has stopped goes to
init. So the foster parent stays between the two until the container that it was started for is
being deleted and its own parent adopts no more, and then ends. It adopts the daemon's processes
itself, should the keeper be killed meanwhile. Not for a daemon that a person or an init system
has started. Standard library only.
"""

import os
import select
import signal
import sys

from clipshim.mounts import syscalls

# Between two looks once the container goes: an engine may have its delete done before conmon has
# stopped adopting, and nothing tells when that is.
_DELAYS_S = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, *(1.0,) * 10, *(5.0,) * 10)
_GONE = syscalls.IN_DELETE | syscalls.IN_DELETE_SELF | syscalls.IN_MOVE_SELF


def stand_between(container_dir: str) -> None:
    """Returns in a child, which goes on as the daemon; this process becomes the foster parent."""
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)  # kept over execve, not by the child
    if os.fork() == 0:
        return
    try:
        os.closerange(3, 1024)  # the starter's pipe; the rest closes on exec
        program = [sys.executable, "-I", "-m", "clipshim.node.foster", container_dir]
        os.execv(program[0], program)  # noqa: S606 - no shell is what we want
    finally:
        os._exit(1)


def parent_adopts() -> bool:
    """Whether this process's parent adopts now: makes an orphan, and looks who its parent is."""
    parent = os.getppid()
    if parent == 1:
        return False  # init waits for nobody
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 0)
    try:
        go_read, go_write = os.pipe()
        answer_read, answer_write = os.pipe()
        middle = os.fork()
        if middle == 0:
            try:
                if os.fork() == 0:
                    os.close(go_write)
                    os.read(go_read, 1)  # ends when the other side is closed: middle is gone then
                    os.write(answer_write, b"%d" % os.getppid())
            finally:
                os._exit(0)
        os.close(go_read)
        os.close(answer_write)
        os.waitpid(middle, 0)
        os.close(go_write)
        answer = os.read(answer_read, 32)
        os.close(answer_read)
        return int(answer or b"0") == parent
    finally:
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)


def _reap() -> bool:
    """Whether any child is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _watch(container_dir: str) -> int:
    fd = syscalls.inotify_init()
    try:
        syscalls.inotify_add_watch(fd, container_dir, _GONE)
    except FileNotFoundError:  # the create has failed already
        os.close(fd)
        return -1
    return fd


def _watch_parent() -> int:
    try:
        return os.pidfd_open(os.getppid())
    except OSError:  # it ended between the two calls
        return -1


def _drain(fd: int) -> None:
    try:
        while os.read(fd, 65536):
            pass
    except BlockingIOError:
        return


def wait_until_unneeded(container_dir: str) -> None:
    """Returns when the daemon has ended, or may be left to whoever adopts it."""
    child_fd, child_write = os.pipe()
    for fd in (child_fd, child_write):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(child_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    container_fd, parent_fd = _watch(container_dir), _watch_parent()
    looks = iter(_DELAYS_S if container_fd < 0 or parent_fd < 0 else ())
    while _reap() and os.getppid() != 1:
        delay_s = next(looks, None)
        if delay_s is None and not os.path.exists(container_dir):
            return  # whoever adopts goes on living, and so waits for nobody: not a conmon
        fds = [fd for fd in (child_fd, container_fd, parent_fd) if fd >= 0]
        ready = select.select(fds, [], [], delay_s)[0]
        if container_fd in ready:
            _drain(container_fd)
            looks = iter(_DELAYS_S)
        elif parent_fd in ready:  # the next one that adopts is the parent now
            os.close(parent_fd)
            parent_fd = _watch_parent()
            looks = iter(_DELAYS_S)
        elif not ready and not parent_adopts():
            return
        _drain(child_fd)


if __name__ == "__main__":
    wait_until_unneeded(sys.argv[1])

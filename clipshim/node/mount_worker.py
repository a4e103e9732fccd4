"""Mounts, unmounts and clones trees for the server, in a process of its own.

A thread of the server must not do this: mount(2) of an EROFS image whose devices lie on the
server's own FUSE mount waits for the server, and a server killed while one of its threads waits
so cannot die: the thread waits for an answer that only its own process could give. This process
can wait: the next server answers it. Standard library only.

One request at a time, each under <run_dir>/worker.lock: the worker of the next server waits until
the last one's request is over, and then sees its outcome.
"""

import contextlib
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Iterator

from clipshim.errors import ClipError
from clipshim.mounts import erofs, mountinfo, syscalls
from clipshim.node.control import Message, close_all, receive_message, send_message


class Worker:
    """Answers requests until the server closes its end."""

    def __init__(self, sock: socket.socket, lock_path: str) -> None:
        self._sock = sock
        self._lock_path = lock_path

    def run(self) -> None:
        """Until the end of the server."""
        while True:
            try:
                request, fds = receive_message(self._sock)
            except (EOFError, ConnectionError):
                return
            close_all(fds)
            reply_fds: list[int] = []
            try:
                with self._locked():
                    reply: Message = {"ok": True} | self._do(request, reply_fds)
            except (ClipError, OSError, KeyError, ValueError) as exc:
                hint = exc.hint if isinstance(exc, ClipError) else None
                text = exc.message if isinstance(exc, ClipError) else str(exc)
                reply = {"ok": False, "error": text, "hint": hint}
            try:
                send_message(self._sock, reply | {"id": request.get("id")}, reply_fds)
            except ConnectionError:
                return
            finally:
                close_all(reply_fds)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _do(self, request: Message, reply_fds: list[int]) -> Message:
        match request.get("op"):
            case "probe":
                return {"reason": erofs.probe_erofs(request["directory"])}
            case "mount_erofs":
                self._mount(request["primary"], request["devices"], request["target"])
            case "mount_bind":
                self._bind(request["source"], request["target"])
            case "clone":
                if not mountinfo.is_mount_point(request["target"]):
                    raise FileNotFoundError(f"{request['target']}: nothing is mounted there")
                reply_fds.append(
                    syscalls.open_tree(
                        syscalls.AT_FDCWD, request["target"], syscalls.OPEN_TREE_CLONE
                    )
                )
            case "unmount":
                return {"removed": self._unmount(request["target"])}
            case other:
                raise ValueError(f"mount worker: unknown request {other!r}")
        return {}

    def _mount(self, primary: str, devices: list[str], target: str) -> None:
        if mountinfo.mount_at(target) is not None:
            return  # by the worker of the last server, whose answer nobody heard
        os.makedirs(target, mode=0o700, exist_ok=True)
        erofs.mount_erofs(primary, devices, target)

    def _bind(self, source: str, target: str) -> None:
        if mountinfo.mount_at(target) is not None:
            return
        os.makedirs(target, mode=0o700, exist_ok=True)
        fd = syscalls.open_tree(syscalls.AT_FDCWD, source, syscalls.OPEN_TREE_CLONE)
        try:
            attributes = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NODEV
            syscalls.mount_setattr(fd, "", set_attributes=attributes)
            syscalls.move_mount(fd, "", syscalls.AT_FDCWD, target)
        finally:
            os.close(fd)

    def _unmount(self, target: str) -> bool:
        """Detaches all that is mounted at `target`; also removes the empty mount point."""
        removed = False
        while mountinfo.mount_at(target) is not None:
            syscalls.umount2(target, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
            removed = True
        for directory in (target, os.path.dirname(target)):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        return removed


def main() -> int:
    """Entry point of `python -I -m clipshim.node.mount_worker SOCKET_FD LOCK_PATH`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when this ends
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        Worker(sock, sys.argv[2]).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())

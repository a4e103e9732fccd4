"""Asks the node daemon: JSON lines over its unix socket, descriptors by SCM_RIGHTS.

One request a connection. Every operation may be repeated: when the server is replaced in the middle
of a request the connection ends early, and the client asks again. Starting a daemon is
daemon_start.py's.
"""

import os
import sys
import time

# the C half only: `socket` builds enums and imports selectors, 5 ms
from _socket import (
    AF_UNIX,
    MSG_CMSG_CLOEXEC,
    SCM_RIGHTS,
    SOCK_CLOEXEC,
    SOCK_STREAM,
    SOL_SOCKET,
    socket,
)

from clipshim import errors
from clipshim.errors import ClipError, DaemonError
from clipshim.shim import json_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

MAX_REPLY_BYTES = 64 << 20
MAX_FDS = 16
_RETRY_PAUSE_S = 0.02  # between two attempts while nobody accepts; not a wait for readiness
_INT_BYTES = 4


class NoDaemonError(DaemonError):
    """Nobody listens on the daemon's socket."""


class Reply:
    """The final reply to a request. The descriptors belong to whoever holds it."""

    __slots__ = ("fds", "values")

    def __init__(self, values: "dict[str, Any]", fds: "list[int]") -> None:
        self.values = values
        self.fds = fds

    def take_fd(self) -> int:
        """The first descriptor; the caller closes it."""
        if not self.fds:
            raise DaemonError("node daemon: expected a descriptor with its reply, got none")
        return self.fds.pop(0)

    def close(self) -> None:
        """Closes the descriptors that nobody took."""
        while self.fds:
            os.close(self.fds.pop())


def ask(
    socket_path: str,
    request: "dict[str, Any]",
    *,
    fds: "Sequence[int]" = (),
    timeout_s: float,
    on_progress: "Callable[[dict[str, Any]], None] | None" = None,
) -> Reply:
    """Sends one request and waits for its final reply, at most `timeout_s` seconds in all.

    Raises NoDaemonError when nobody listens, what the daemon reports as the class of errors.py that
    it names, and DaemonError for everything else.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection = _connect(socket_path, deadline)
            try:
                return _exchange(connection, request, fds, deadline, on_progress)
            finally:
                connection.close()
        except _InterruptedReplyError as exc:
            if time.monotonic() + _RETRY_PAUSE_S >= deadline:
                raise DaemonError(
                    f"node daemon at {socket_path}: {request.get('op')}: {exc}",
                    hint="its log says why: daemon.log in the state directory, or the journal",
                ) from exc
            time.sleep(_RETRY_PAUSE_S)
        except TimeoutError as exc:
            raise DaemonError(
                f"node daemon at {socket_path}: {request.get('op')}: no reply in {timeout_s:g} s",
                hint="raise daemon_timeout_s, or look at clipshim status",
            ) from exc
        except PermissionError as exc:
            raise DaemonError(
                f"node daemon at {socket_path}: {exc.strerror}", hint="run it as root"
            ) from exc
        except OSError as exc:
            raise DaemonError(f"node daemon at {socket_path}: {request.get('op')}: {exc}") from exc


def tell(socket_path: str, request: "dict[str, Any]") -> None:
    """Sends a request whose reply nobody needs; does nothing if no daemon listens."""
    try:
        connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        try:
            connection.settimeout(1.0)
            connection.connect(socket_path)
            connection.sendall(_line(request))
        finally:
            connection.close()
    except OSError:
        return


class _InterruptedReplyError(Exception):
    """The connection ended before the final reply."""


def _connect(path: str, deadline: float) -> socket:
    connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    try:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError) as exc:
        connection.close()
        raise NoDaemonError(
            f"node daemon: nobody listens at {path}", hint="start it with: clipshim daemon"
        ) from exc
    except BlockingIOError as exc:  # unix(7): the queue of the listening socket is full
        connection.close()
        raise _InterruptedReplyError("too many clients are waiting") from exc
    except BaseException:
        connection.close()
        raise
    return connection


def _exchange(
    connection: socket,
    request: "dict[str, Any]",
    fds: "Sequence[int]",
    deadline: float,
    on_progress: "Callable[[dict[str, Any]], None] | None",
) -> Reply:
    line = _line(request)
    received: list[int] = []
    try:
        try:
            if fds:  # with the first byte
                rights = b"".join(fd.to_bytes(_INT_BYTES, sys.byteorder) for fd in fds)
                sent = connection.sendmsg([line], [(SOL_SOCKET, SCM_RIGHTS, rights)])
                line = line[sent:]
            connection.sendall(line)
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise _InterruptedReplyError("connection closed while asking") from exc
        buffer = bytearray()
        while True:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data, ancillary, _, _ = connection.recvmsg(
                    1 << 16, 1024 * _INT_BYTES, MSG_CMSG_CLOEXEC
                )
            except ConnectionResetError as exc:
                raise _InterruptedReplyError("connection reset") from exc
            for level, kind, rights in ancillary:
                if level == SOL_SOCKET and kind == SCM_RIGHTS:
                    received += [
                        int.from_bytes(rights[i : i + _INT_BYTES], sys.byteorder)
                        for i in range(0, len(rights) - _INT_BYTES + 1, _INT_BYTES)
                    ]
            if not data:
                raise _InterruptedReplyError("connection closed without a reply")
            buffer += data
            while (end := buffer.find(b"\n")) >= 0:
                values = _object(bytes(buffer[:end]))
                del buffer[: end + 1]
                if "ok" in values:
                    reply = Reply(_checked(values), received)
                    received = []
                    return reply
                if on_progress and isinstance(values.get("progress"), dict):
                    on_progress(values["progress"])
            if len(buffer) > MAX_REPLY_BYTES or len(received) > MAX_FDS:
                raise DaemonError("node daemon: reply too long")
    finally:
        for fd in received:
            os.close(fd)


def _line(request: "dict[str, Any]") -> bytes:
    return json_text.dumps(request).encode() + b"\n"


def _object(line: bytes) -> "dict[str, Any]":
    try:
        values = json_text.loads(line)
    except ValueError as exc:
        raise DaemonError(f"node daemon: reply is not JSON: {exc}") from exc
    if not isinstance(values, dict):
        raise DaemonError("node daemon: reply is not an object")
    return values


def _checked(values: "dict[str, Any]") -> "dict[str, Any]":
    if values["ok"] is True:
        return values
    kind = getattr(errors, str(values.get("kind")), None)
    if not (isinstance(kind, type) and issubclass(kind, ClipError)):
        kind = DaemonError
    hint = values.get("hint")
    raise kind(str(values.get("error", "unknown error")), hint=str(hint) if hint else None)

"""The daemon's protocol on its socket: one JSON object a line, descriptors by SCM_RIGHTS.

A request is one line of at most MAX_REQUEST bytes; its descriptors come with its first byte. The
answer is any number of {"progress": …} lines and one final line with "ok". Only the daemon's own
user is served. A client that is slow, silent or hostile costs its own task and nothing else.
"""

import errno
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from clipshim.errors import ClipError, DaemonError, UsageError, remedy
from clipshim.node.control import MAX_FDS, close_all, fds_of

log = logging.getLogger(__name__)

MAX_REQUEST = 64 << 10
MAX_CONNECTIONS = 2048
IDLE_S = 300.0  # between requests of a connection
LINE_S = 30.0  # from a request's first byte to its last
SEND_S = 30.0  # a client that does not read its answer is cut off
_UCRED = struct.Struct("3i")

Answer = dict[str, Any]


class Request:
    """One request: its fields, its descriptors, and a way to tell progress."""

    def __init__(
        self, fields: dict[str, Any], fds: list[int], tell: Callable[[Answer], Awaitable[None]]
    ) -> None:
        self.fields = fields
        self.fds = fds  # the server closes what is left here after the answer
        self.reply_fds: list[int] = []  # closed after they were sent
        self._tell = tell

    @property
    def op(self) -> str:
        """What is asked for."""
        return str(self.fields.get("op"))

    def text(self, key: str) -> str:
        """A string that must be there. Raises UsageError."""
        value = self.fields.get(key)
        if not isinstance(value, str) or not value:
            raise UsageError(f"request {self.op}: {key}: expected text, got {value!r}")
        return value

    def optional_text(self, key: str) -> str | None:
        """A string, or None if it is null or missing."""
        return None if self.fields.get(key) is None else self.text(key)

    def flag(self, key: str) -> bool:
        """A boolean, false if missing."""
        value = self.fields.get(key, False)
        if not isinstance(value, bool):
            raise UsageError(f"request {self.op}: {key}: expected true or false, got {value!r}")
        return value

    async def progress(self, what: Answer) -> None:
        """Sends a progress line."""
        await self._tell({"progress": what})


Handler = Callable[[Request], Awaitable[Answer]]


class RpcServer:
    """Serves the listening socket with a table of operations."""

    def __init__(self, listener_fd: int, handlers: dict[str, Handler]) -> None:
        self._listener = trio.socket.from_stdlib_socket(socket.socket(fileno=listener_fd))
        self._handlers = handlers
        self._limit = trio.CapacityLimiter(MAX_CONNECTIONS)
        self._uid = os.geteuid()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accepts until cancelled; connections end with it."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                try:
                    sock, _ = await self._listener.accept()
                except OSError as exc:  # EMFILE and the like: others must go on being served
                    log.error("accept: %s", exc)
                    await trio.sleep(0.1)
                    continue
                nursery.start_soon(self._connection, sock)

    def close(self) -> None:
        """Closes this process's copy of the listening socket."""
        self._listener.close()

    async def _connection(self, sock: trio.socket.SocketType) -> None:
        with sock:
            try:
                raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
                pid, uid, _ = _UCRED.unpack(raw)
                if uid != self._uid:
                    log.warning("refused a client", extra={"client_pid": pid, "client_uid": uid})
                    return
                async with self._limit:
                    await self._requests(Connection(sock))
            except (OSError, EOFError, trio.TooSlowError):
                return  # the client went away, or will not listen
            except Exception:
                log.exception("connection failed")

    async def _requests(self, connection: "Connection") -> None:
        while True:
            try:
                received = await connection.receive()
            except DaemonError as exc:
                await connection.send(failure(exc))
                return
            if received is None:
                return
            request = Request(received[0], received[1], connection.send)
            try:
                answer = await self._answer(request)
                # before the answer: the client unmounts the file system that its file lies on
                close_all(request.fds)
                request.fds.clear()
                await connection.send(answer, request.reply_fds)
            finally:
                close_all(request.fds)
                close_all(request.reply_fds)

    async def _answer(self, request: Request) -> Answer:
        handler = self._handlers.get(request.op)
        try:
            if handler is None:
                raise UsageError(
                    f"unknown request {request.op!r}", hint="client and daemon differ in version"
                )
            return {"ok": True} | await handler(request)
        except ClipError as exc:
            return failure(exc)
        except OSError as exc:
            log.error("request %s failed: %s", request.op, exc)
            return failure(DaemonError(f"{request.op}: {exc}", hint=remedy(exc)))
        except (EOFError, trio.TooSlowError) as exc:
            log.exception("request %s failed", request.op)
            return failure(DaemonError(f"{request.op}: {str(exc) or type(exc).__name__}"))
        except Exception as exc:
            log.exception("request %s failed", request.op)
            return failure(
                DaemonError(
                    f"{request.op}: {type(exc).__name__}: {exc}", hint="see the daemon's log"
                )
            )


class Connection:
    """Lines and descriptors of one client."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._sending = trio.Lock()

    async def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next request, or None at the end. Raises DaemonError for what is no request."""
        try:
            return await self._receive()
        finally:
            close_all(self._fds)
            self._fds = []

    async def _receive(self) -> tuple[dict[str, Any], list[int]] | None:
        with trio.CancelScope() as scope:
            scope.deadline = trio.current_time() + (LINE_S if self._buffer else IDLE_S)
            while (end := self._buffer.find(b"\n")) < 0:
                if len(self._buffer) > MAX_REQUEST:
                    raise DaemonError(f"request of more than {MAX_REQUEST} bytes")
                data, ancillary, flags, _ = await self._sock.recvmsg(
                    MAX_REQUEST, socket.CMSG_SPACE(MAX_FDS * 4)
                )
                self._fds += fds_of(ancillary)
                if flags & socket.MSG_CTRUNC:
                    raise DaemonError(
                        "descriptors of a request were lost: the daemon has too many open files",
                        hint=remedy(OSError(errno.EMFILE, "")),
                    )
                if len(self._fds) > MAX_FDS:
                    raise DaemonError(f"request with more than {MAX_FDS} descriptors")
                if not data:
                    return None
                if not self._buffer:
                    scope.deadline = trio.current_time() + LINE_S
                self._buffer += data
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                raise DaemonError("request is not JSON") from None
            if not isinstance(fields, dict):
                raise DaemonError("request is not a JSON object")
            fds, self._fds = self._fds, []
            return fields, fds
        return None  # too slow

    async def send(self, answer: Answer, fds: list[int] | None = None) -> None:
        """One line; descriptors with its first byte. Raises TooSlowError if nobody reads."""
        data = json.dumps(answer, separators=(",", ":"), default=str).encode() + b"\n"
        async with self._sending:
            with trio.fail_after(SEND_S):
                sent = 0
                if fds:
                    packed = struct.pack(f"{len(fds)}i", *fds)
                    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)]
                    sent = await self._sock.sendmsg([data], ancillary)
                while sent < len(data):
                    sent += await self._sock.send(data[sent:])


def failure(error: ClipError) -> Answer:
    """The final line for an error."""
    return {
        "ok": False,
        "error": error.message,
        "hint": error.hint,
        "kind": type(error).__name__,
        "exit_code": error.exit_code,
    }

"""Messages with file descriptors over SOCK_SEQPACKET pairs: keeper, server and mount worker.

A message is one packet: a JSON object, and at most MAX_FDS descriptors. One that is too large for a
packet (the layers of an image may be a thousand) goes as a file in memory, whose descriptor is then
the first. Standard library only.
"""

import array
import errno
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

MAX_MESSAGE = 128 << 10  # below the default send buffer of a unix socket, 208 KiB
MAX_LARGE = 16 << 20
MAX_FDS = 16
_LARGE = "large_message"  # the size of what is in the first descriptor

Message = dict[str, Any]


def control_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends, both close-on-exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send_message(sock: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Sends one message. The descriptors stay open in the sender. Raises OSError."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE:
        fd = in_memory(data)
        try:
            send_message(sock, {_LARGE: len(data)}, (fd, *fds))
        finally:
            os.close(fd)
        return
    ancillary = []
    if fds:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())]
    sock.sendmsg([data], ancillary)


def receive_message(sock: socket.socket) -> tuple[Message, list[int]]:
    """One message and its descriptors, which the caller then owns.

    Raises EOFError when the other end is closed, and BlockingIOError on a non-blocking socket.
    """
    data, ancillary, _flags, _ = sock.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(MAX_FDS * 4))
    fds = fds_of(ancillary)
    if not data:
        close_all(fds)
        raise EOFError("control socket closed")
    try:
        message = json.loads(data)
    except ValueError:
        close_all(fds)
        raise
    if isinstance(message, dict) and _LARGE in message and fds:
        large = fds.pop(0)
        try:
            message = json.loads(read_memory(large))
        except (OSError, ValueError) as exc:
            close_all(fds)
            raise ValueError(f"large control message: {exc}") from exc
        finally:
            os.close(large)
    if not isinstance(message, dict):
        close_all(fds)
        raise ValueError("control message is not an object")
    return message, fds


def in_memory(data: bytes) -> int:
    """A descriptor of a file in memory that holds `data`; the caller owns it. Raises OSError."""
    if len(data) > MAX_LARGE:
        raise OSError(errno.EMSGSIZE, f"message of {len(data)} bytes, at most {MAX_LARGE}")
    fd = os.memfd_create("message", os.MFD_CLOEXEC)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_memory(fd: int) -> bytes:
    """What in_memory put there. Raises OSError."""
    size = min(os.fstat(fd).st_size, MAX_LARGE)
    data = bytearray()
    while part := os.pread(fd, size - len(data), len(data)):
        data += part
    return bytes(data)


def fds_of(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors in what recvmsg returned, close-on-exec already (PEP 446)."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


def close_all(fds: Sequence[int]) -> None:
    """Closes every descriptor."""
    for fd in fds:
        os.close(fd)

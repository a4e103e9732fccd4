"""Messages with file descriptors over SOCK_SEQPACKET pairs: keeper, server and mount worker.

A message is one packet: a JSON object, and at most MAX_FDS descriptors. Standard library only.
"""

import array
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

MAX_MESSAGE = 128 << 10  # below the default send buffer of a unix socket, 208 KiB
MAX_FDS = 16

Message = dict[str, Any]


def control_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends, both close-on-exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send_message(sock: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Sends one message. The descriptors stay open in the sender. Raises OSError."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"control message of {len(data)} bytes, at most {MAX_MESSAGE}")
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
    if not isinstance(message, dict):
        close_all(fds)
        raise ValueError("control message is not an object")
    return message, fds


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

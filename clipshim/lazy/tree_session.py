"""Serves a tree over one /dev/fuse descriptor, in the place of whoever served it before.

The descriptor belongs to a mount whose FUSE_INIT has been answered (the keeper does both), so that
the mount outlives its servers and the first one is like the others. One thread reads requests and
answers what needs no layer; what may wait for a layer's server goes to threads, each layer having
its own, so that one that waits for its registry holds up no other. Standard library only; why not
pyfuse3 is DECISIONS 33.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from clipshim.errors import ClipError
from clipshim.lazy import fuse_wire as wire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clipshim.lazy.tree_fs import Extent, TreeFileSystem

log = logging.getLogger(__name__)

# More than the max_write of the connection's FUSE_INIT and a header, as the kernel demands.
REQUEST_BYTES = (128 << 10) + 4096
THREADS_PER_LAYER = 32
UNANSWERED = frozenset((wire.FORGET, wire.BATCH_FORGET, wire.INTERRUPT))
GONE = frozenset((errno.ENODEV, errno.ECONNABORTED))  # unmounted everywhere; aborted
# What a stop waits for answers that are under way, where nobody else can give them.
DRAIN_S = 15.0


class TreeSession:
    """One connection's requests."""

    def __init__(self, files: TreeFileSystem, fuse_fd: int) -> None:
        self._files = files
        self._fd = fuse_fd
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._under_way = 0
        self._changed = threading.Condition()

    def serve(self, stop_fd: int) -> None:
        """Answers requests until the connection has no mount any more, or `stop_fd` can be read.

        Threads may still wait for a layer when it returns: what they have not answered, the kernel
        asks the next server, if it can (Linux 6.9+). Raises OSError if the descriptor is no FUSE
        connection.
        """
        os.set_blocking(self._fd, False)  # a request can be withdrawn between poll and read
        can_resend = wire.request_resend(self._fd)
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        poller.register(stop_fd, select.POLLIN)
        buffer = bytearray(REQUEST_BYTES)
        view = memoryview(buffer)
        try:
            while all(fd != stop_fd for fd, _ in poller.poll()):
                length = self._receive(buffer)
                if length:
                    self._answer(view[:length])
        except OSError as exc:
            if exc.errno not in GONE:
                raise
        else:
            if not can_resend:
                with self._changed:
                    self._changed.wait_for(lambda: not self._under_way, DRAIN_S)

    def _receive(self, buffer: bytearray) -> int:
        """Bytes of the next request in `buffer`; 0 if there is none."""
        try:
            return os.readv(self._fd, [buffer])
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.EAGAIN):  # the request was withdrawn
                raise
            return 0

    def _answer(self, request: memoryview) -> None:
        _, opcode, unique, node, *_ = wire.IN_HEADER.unpack_from(request)
        body = request[wire.IN_HEADER.size :]
        try:
            if opcode == wire.READ:
                extents = self._files.extents(node, body)
                found = self._files.read_without_waiting(extents)
                if found is None:
                    self._read_in_thread(unique, extents)
                    return
                data: bytes | bytearray = found
            elif opcode in UNANSWERED:
                return
            else:
                handler = self._files.handlers.get(opcode)
                if handler is None:
                    raise wire.Refusal(errno.ENOSYS)
                data = handler(node, body)
        except Exception as exc:
            self._send([wire.error_reply(unique, _errno_of(exc, opcode))])
        else:
            self._send(wire.reply(unique, data))

    def _read_in_thread(self, unique: int, extents: Sequence[Extent]) -> None:
        layer = max(device for device, _, _ in extents)
        pool = self._pools.get(layer)
        if pool is None:
            pool = self._pools[layer] = ThreadPoolExecutor(THREADS_PER_LAYER, f"layer-{layer}")
        with self._changed:
            self._under_way += 1
        pool.submit(self._read, unique, extents)

    def _read(self, unique: int, extents: Sequence[Extent]) -> None:
        try:
            data = self._files.read(extents)
        except Exception as exc:
            self._send([wire.error_reply(unique, _errno_of(exc, wire.READ))])
        else:
            self._send(wire.reply(unique, data))
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def _send(self, pieces: Sequence[bytes | bytearray]) -> None:
        try:
            os.writev(self._fd, pieces)
        except OSError as exc:
            if exc.errno != errno.ENOENT and exc.errno not in GONE:  # nobody waits for it any more
                log.error("answer of %d bytes: %s", sum(map(len, pieces)), exc)


def _errno_of(exc: Exception, opcode: int) -> int:
    if isinstance(exc, wire.Refusal):
        return exc.number
    number = exc.errno if isinstance(exc, (ClipError, OSError)) else None
    if number is None:
        log.error("request of opcode %d failed", opcode, exc_info=exc)
    else:
        log.warning("request of opcode %d: %s", opcode, exc)
    return wire.reportable(number)

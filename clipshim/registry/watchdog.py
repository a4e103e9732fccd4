"""Bounds on what socket timeouts do not bound: a TLS handshake or headers that come in drips.

A socket's timeout holds for one recv. A server that sends a byte now and then would hold a thread
for ever, so one thread for the process shuts such connections down when their time is over; the
thread that waits then gets an error. It ends when there has been nothing to watch for a while.
Not for bodies: they are read piece by piece, with a look at the clock between the pieces.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import socket
import threading
import time
from http.client import HTTPException
from typing import TYPE_CHECKING

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from urllib3.response import HTTPResponse

IDLE_S = 10.0
MANY = 256  # watches that are done and not swept yet


class Watch:
    """One connection under watch; `over` tells whether its time ran out."""

    __slots__ = ("connection", "done", "over")

    def __init__(self, connection: HTTPConnection) -> None:
        self.connection: HTTPConnection | None = connection
        self.done = False
        self.over = False

    def expire(self) -> None:
        """Breaks the connection under whoever waits for it."""
        sock = None if self.connection is None else self.connection.sock
        self.over = True
        if sock is not None:
            with contextlib.suppress(OSError):
                # Not SSLSocket's own shutdown: it changes state that the other thread uses.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


class Watchdog:
    """Expires watches. Thread-safe; one for the process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Watch]] = []
        self._numbers = itertools.count()
        self._running = False
        self._active = 0

    @contextlib.contextmanager
    def watching(self, connection: HTTPConnection, seconds: float) -> Iterator[Watch]:
        """Expires the connection unless the `with` is left within `seconds`."""
        watch = Watch(connection)
        self._add(time.monotonic() + seconds, watch)
        try:
            yield watch
        finally:
            with self._changed:
                watch.done = True
                watch.connection = None  # the heap keeps the rest until it is swept
                self._active -= 1

    def _add(self, until: float, watch: Watch) -> None:
        with self._changed:
            self._active += 1
            if len(self._heap) > MANY + 4 * self._active:
                self._heap = [item for item in self._heap if not item[2].done]
                heapq.heapify(self._heap)
            heapq.heappush(self._heap, (until, next(self._numbers), watch))
            if self._heap[0][2] is watch:
                self._changed.notify()
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="registry watchdog", daemon=True).start()

    def _run(self) -> None:
        with self._changed:
            while True:
                while self._heap and self._heap[0][2].done:
                    heapq.heappop(self._heap)
                if not self._heap:
                    if not self._changed.wait(IDLE_S) and not self._heap:
                        self._running = False
                        return
                    continue
                until, _, watch = self._heap[0]
                left = until - time.monotonic()
                if left > 0:
                    self._changed.wait(min(left, IDLE_S))  # then what is done is swept
                    continue
                heapq.heappop(self._heap)
                watch.expire()


class _Bounds(threading.local):
    """What the request that this thread is making may take, in seconds."""

    connect_s: float | None = None
    response_s: float | None = None


watchdog = Watchdog()
_bounds = _Bounds()


@contextlib.contextmanager
def bounded(*, connect_s: float, response_s: float) -> Iterator[None]:
    """Bounds connecting with its handshake, and waiting for headers, inside the `with`."""
    _bounds.connect_s, _bounds.response_s = connect_s, response_s
    try:
        yield
    finally:
        _bounds.connect_s = _bounds.response_s = None


@contextlib.contextmanager
def _bound(connection: HTTPConnection, seconds: float | None) -> Iterator[None]:
    if seconds is None:
        yield
        return
    with watchdog.watching(connection, seconds) as watch:
        try:
            yield
        except (OSError, HTTPException):
            if not watch.over:
                raise
    if watch.over:
        # Without an exception too: headers that were cut off look like headers that have ended.
        raise TimeoutError("the answer came too slowly")


class _BoundedConnection(HTTPConnection):
    def connect(self) -> None:
        with _bound(self, _bounds.connect_s):
            super().connect()

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        with _bound(self, _bounds.response_s):
            return super().getresponse()


class _BoundedTlsConnection(HTTPSConnection):
    def connect(self) -> None:
        with _bound(self, _bounds.connect_s):
            super().connect()

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        with _bound(self, _bounds.response_s):
            return super().getresponse()


class _BoundedPool(HTTPConnectionPool):
    ConnectionCls = _BoundedConnection


class _BoundedTlsPool(HTTPSConnectionPool):
    ConnectionCls = _BoundedTlsConnection


POOL_CLASSES = {"http": _BoundedPool, "https": _BoundedTlsPool}

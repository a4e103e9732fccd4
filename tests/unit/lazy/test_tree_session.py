"""A tree's session with the test as the kernel: requests and answers, byte by byte."""

from __future__ import annotations

import errno
import os
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from clipshim.errors import IndexFormatError, LayerError
from clipshim.lazy import fuse_wire as wire
from clipshim.lazy.tree_session import TreeSession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from clipshim.lazy.tree_fs import Extent

PATIENCE_S = 60.0
INSIDE, LAYER, OTHER_LAYER = 0, 1, 2  # nodes whose data lies there


class Files:
    """In the place of a TreeFileSystem: the node's number says where data lies."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.may_read = {LAYER: threading.Event(), OTHER_LAYER: threading.Event()}
        self.handlers: dict[int, Callable[[int, memoryview], bytes]] = {
            wire.GETATTR: self._getattr,
            wire.FLUSH: self._refuse,
        }

    def _getattr(self, node: int, body: memoryview) -> bytes:
        if self.error is not None:
            raise self.error
        return b"attributes of %d" % node + bytes(body)

    def _refuse(self, node: int, body: memoryview) -> bytes:
        raise wire.Refusal(errno.ENODATA)

    def extents(self, node: int, body: memoryview) -> list[Extent]:
        return [(node, 0, 3)]

    def read_without_waiting(self, extents: Sequence[Extent]) -> bytearray | None:
        return bytearray(b"now") if extents[0][0] == INSIDE else None

    def read(self, extents: Sequence[Extent]) -> bytearray:
        assert self.may_read[extents[0][0]].wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        return bytearray(b"yes")


class Kernel:
    """The other end of the descriptor."""

    def __init__(self) -> None:
        self.end, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.end.settimeout(PATIENCE_S)
        self.fd = ours.detach()
        self.stop_read, self.stop_write = os.pipe()
        self.files = Files()
        self.session = TreeSession(self.files, self.fd)  # type: ignore[arg-type]

    def ask(self, unique: int, opcode: int, node: int = INSIDE, body: bytes = b"") -> None:
        size = wire.IN_HEADER.size + len(body)
        self.end.send(wire.IN_HEADER.pack(size, opcode, unique, node, 0, 0, 0, 0, 0) + body)

    def answer(self) -> tuple[int, int, bytes]:
        """The unique number, the errno and the body of the next answer."""
        data = self.end.recv(1 << 20)
        size, number, unique = wire.OUT_HEADER.unpack_from(data)
        assert size == len(data)
        return unique, -number, data[wire.OUT_HEADER.size :]

    def during_serve(self, talk: Callable[[], None]) -> None:
        """Serves while a thread does `talk`, and stops then."""
        with ThreadPoolExecutor(1) as thread:

            def talk_and_stop() -> None:
                try:
                    talk()
                finally:
                    os.write(self.stop_write, b"!")

            talked: Future[None] = thread.submit(talk_and_stop)
            self.session.serve(self.stop_read)
            talked.result(PATIENCE_S)

    def close(self) -> None:
        for event in self.files.may_read.values():
            event.set()
        self.end.close()
        for fd in (self.fd, self.stop_read, self.stop_write):
            os.close(fd)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    monkeypatch.setattr(wire, "request_resend", lambda _: False)
    kernel = Kernel()
    yield kernel
    kernel.close()


def test_answers_carry_the_number_of_their_request(kernel: Kernel) -> None:
    def talk() -> None:
        kernel.ask(7, wire.GETATTR, 3, b"!")
        assert kernel.answer() == (7, 0, b"attributes of 3!")
        kernel.ask(8, wire.READ)
        assert kernel.answer() == (8, 0, b"now")

    kernel.during_serve(talk)


def test_what_needs_no_answer_gets_none_and_what_is_unknown_enosys(kernel: Kernel) -> None:
    def talk() -> None:
        for opcode in (wire.FORGET, wire.BATCH_FORGET, wire.INTERRUPT):
            kernel.ask(1, opcode)
        kernel.ask(2, 4095)
        assert kernel.answer() == (2, errno.ENOSYS, b"")

    kernel.during_serve(talk)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (LayerError("layer"), errno.EIO),
        (IndexFormatError("tree"), errno.EINVAL),
        (OSError(errno.ESTALE, "gone"), errno.ESTALE),
        (OSError(errno.ENOSYS, "would turn the request off"), errno.EIO),
        (OSError("no number"), errno.EIO),
        (ZeroDivisionError("bug"), errno.EIO),
    ],
)
def test_every_error_becomes_an_errno_and_the_session_goes_on(
    kernel: Kernel, error: Exception, number: int
) -> None:
    kernel.files.error = error

    def talk() -> None:
        kernel.ask(1, wire.GETATTR)
        assert kernel.answer() == (1, number, b"")
        kernel.files.may_read[LAYER].set()
        kernel.ask(2, wire.READ, LAYER)
        assert kernel.answer() == (2, number, b"")

    kernel.during_serve(talk)


def test_a_refusal_passes_as_it_is(kernel: Kernel) -> None:
    def talk() -> None:
        kernel.ask(1, wire.FLUSH)
        assert kernel.answer() == (1, errno.ENODATA, b"")

    kernel.during_serve(talk)


def test_a_layer_that_waits_holds_up_no_other(kernel: Kernel) -> None:
    def talk() -> None:
        for unique in range(1, 101):
            kernel.ask(unique, wire.READ, LAYER)
        kernel.files.may_read[OTHER_LAYER].set()
        kernel.ask(200, wire.READ, OTHER_LAYER)
        assert kernel.answer() == (200, 0, b"yes")
        kernel.ask(201, wire.GETATTR)
        assert kernel.answer()[0] == 201
        kernel.files.may_read[LAYER].set()
        assert {kernel.answer()[0] for _ in range(100)} == set(range(1, 101))

    kernel.during_serve(talk)


def test_a_stop_answers_what_nobody_else_can_answer(kernel: Kernel) -> None:
    answered: list[tuple[int, int, bytes]] = []

    def talk() -> None:
        kernel.ask(1, wire.READ, LAYER)
        kernel.ask(2, wire.READ)
        assert kernel.answer()[0] == 2  # so the first has been read

    def release() -> None:
        kernel.files.may_read[LAYER].set()
        answered.append(kernel.answer())

    timer = threading.Timer(0.2, release)  # most likely after the stop; right either way
    timer.start()
    kernel.during_serve(talk)
    timer.join(PATIENCE_S)
    assert answered == [(1, 0, b"yes")]


def test_an_answer_that_nobody_waits_for_is_no_error(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    writev = os.writev

    def withdrawn(fd: int, pieces: Sequence[bytes]) -> int:
        if wire.OUT_HEADER.unpack_from(pieces[0])[2] == 1:
            raise OSError(errno.ENOENT, "withdrawn")
        return writev(fd, pieces)

    monkeypatch.setattr(os, "writev", withdrawn)

    def talk() -> None:
        kernel.ask(1, wire.GETATTR)
        kernel.ask(2, wire.GETATTR)
        assert kernel.answer()[0] == 2

    kernel.during_serve(talk)


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ECONNABORTED])
def test_the_end_of_the_mount_is_the_end_of_the_session(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def gone(fd: int, buffers: Sequence[bytearray]) -> int:
        raise OSError(number, "unmounted")

    monkeypatch.setattr(os, "readv", gone)
    kernel.ask(1, wire.GETATTR)
    kernel.session.serve(kernel.stop_read)

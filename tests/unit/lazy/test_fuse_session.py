"""The parts of a FUSE session that need no kernel: handlers and the main loop."""

from __future__ import annotations

import errno
import os

import pyfuse3
import pytest
import trio

from clipshim.errors import NotFoundError, RegistryError
from clipshim.lazy import fuse_wire
from clipshim.lazy.fuse_session import FuseSession, handler


class Handlers:
    """One handler that fails as it is told."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    @handler
    async def read(self, value: int) -> int:
        if self.error is not None:
            raise self.error
        return value


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (NotFoundError("nothing"), errno.ENOENT),
        (RegistryError("dead"), errno.EIO),
        (OSError(errno.EROFS, "read-only"), errno.EROFS),
        (OSError("no number"), errno.EIO),
        (OSError(errno.ENOSYS, "would turn the handler off"), errno.EIO),
        (pyfuse3.FUSEError(errno.ENOSYS), errno.ENOSYS),
        (ZeroDivisionError(), errno.EIO),
        (RuntimeError("bug"), errno.EIO),
    ],
)
def test_every_error_becomes_an_errno(error: Exception, number: int) -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        trio.run(Handlers(error).read, 1)
    assert caught.value.errno == number


def test_results_and_cancellation_pass() -> None:
    assert trio.run(Handlers(None).read, 7) == 7

    async def main() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await Cancelled().read()
        assert scope.cancelled_caught

    trio.run(main)


class Cancelled:
    """A handler that waits."""

    @handler
    async def read(self) -> None:
        await trio.sleep_forever()


def test_a_kernel_without_resend_is_no_error(tmp_path: object) -> None:
    with open(os.devnull, "rb") as file:  # cannot be written
        assert not fuse_wire.request_resend(file.fileno())


def test_the_main_loop_starts_again_whatever_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[Exception | None] = [
        ExceptionGroup("", [OSError(errno.EAGAIN, "a request was withdrawn")]),
        OSError(errno.ENOMEM, "no memory"),
        None,
    ]
    resent = []

    async def main_once(**_: object) -> None:
        await trio.lowlevel.checkpoint()
        end = ends.pop(0)
        if end is not None:
            raise end

    def resend(fd: int) -> bool:
        resent.append(fd)
        return True

    monkeypatch.setattr("pyfuse3.main", main_once)
    monkeypatch.setattr(fuse_wire, "request_resend", resend)

    async def main() -> None:
        await FuseSession(pyfuse3.Operations(), 7)._main_loop()

    trio.run(main)
    assert not ends
    assert resent == [7, 7]

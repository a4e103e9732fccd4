"""A program that serves one made layer over an inherited /dev/fuse descriptor.

    python lazy_server.py FUSE_FD STORE SIZE FORM LOG [GATE]

Appends "ready" to LOG when requests are answered, and one line a fetch. Finishes its session on
SIGTERM. With GATE it takes the kernel for one that cannot send requests again, and no fetch goes
on until that file exists. A stand-in for the node daemon's server in tests of the mount alone.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import trio

from clipshim.lazy import fuse_wire
from clipshim.lazy.fetching import Fetching
from clipshim.lazy.fuse_session import FuseSession
from clipshim.lazy.layer_reader import LayerReader
from clipshim.lazy.layer_store import LayerStore
from clipshim.lazy.layers_fs import LayersOperations, layer_inode
from clipshim.settings import Settings
from tests.unit.lazy.layers import Form, MadeLayer, MadeSource


class OneLayer:
    """A layers_fs.LayerDirectory of one layer."""

    def __init__(self, reader: LayerReader) -> None:
        self._reader = reader

    async def by_name(self, key: str) -> LayerReader | None:
        return self._reader if key == self._reader.key else None

    async def by_inode(self, inode: int) -> LayerReader | None:
        return self._reader if inode == layer_inode(self._reader.key) else None

    def names(self) -> list[str]:
        return [self._reader.key]


async def main(
    fuse_fd: int, *, store_path: str, size: int, form: Form, log: str, gate: str | None
) -> None:
    layer = MadeLayer(size, form=form)
    source = MadeSource(layer)
    log_fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def before(start: int) -> None:  # in a thread
        _say(log_fd, f"fetch {start}")
        while gate is not None and not os.path.exists(gate):
            time.sleep(0.01)

    source.before = before
    settings = Settings({"cache_bytes": 1 << 30})
    store = LayerStore(store_path, limit_bytes=settings.cache_bytes)
    async with trio.open_nursery() as nursery:
        fetching = Fetching(nursery, settings)
        stored = store.open(layer.info, layer.table)
        reader = LayerReader(layer.info, layer.table, stored, fetching)
        reader.add_source(source)

        async def run(task_status: trio.TaskStatus[None]) -> None:
            await session.serve(task_status=task_status)
            nursery.cancel_scope.cancel()

        async def finish_on_signal() -> None:
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                async for _ in signals:
                    _say(log_fd, f"finishing {session.finish()}")

        session = FuseSession(LayersOperations(OneLayer(reader)), fuse_fd)
        nursery.start_soon(finish_on_signal)
        await nursery.start(run)
        _say(log_fd, "ready")


def _say(fd: int, line: str) -> None:
    os.write(fd, f"{line}\n".encode())


if __name__ == "__main__":
    _, fd_text, store_text, size_text, form_text, log_text, *gates = sys.argv
    if gates:
        fuse_wire.request_resend = lambda fuse_fd: False
    trio.run(
        lambda: main(
            int(fd_text),
            store_path=store_text,
            size=int(size_text),
            form=form_text,  # type: ignore[arg-type]
            log=log_text,
            gate=gates[0] if gates else None,
        )
    )

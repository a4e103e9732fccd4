"""Shows one tree in mode fuse: one process, one FUSE connection that the keeper holds.

It answers metadata from the tree itself and data from the layers mount, so it may wait for the
server but never for itself.
"""

import json
import logging
import mmap
import os
import signal
import sys
from typing import Any

import trio

from clipshim.errors import ClipError
from clipshim.index.erofs_read import ErofsImage
from clipshim.lazy.fuse_session import serve
from clipshim.lazy.tree_fs import TreeOperations
from clipshim.node.logs import configure
from clipshim.node.processes import raise_limits
from clipshim.settings import load_settings

log = logging.getLogger("clipshim.node.tree_server")


async def _run(config: dict[str, Any]) -> None:
    fd = os.open(config["tree"], os.O_RDONLY | os.O_CLOEXEC)
    try:
        image = ErofsImage(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
    finally:
        os.close(fd)
    operations = TreeOperations(image, config["devices"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_on_signal, nursery.cancel_scope)
        await serve(operations, config["fuse_fd"])
        nursery.cancel_scope.cancel()


async def _cancel_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()
            return


def main() -> int:
    """Entry point of `python -I -m clipshim.node.tree_server JSON`."""
    config = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise_limits()
    try:
        settings = load_settings()
        configure(settings.log_format, settings.log_level)
        trio.run(_run, config)
    except (ClipError, OSError) as exc:
        log.error("%s", exc, extra={"image_id": config.get("image_id")})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

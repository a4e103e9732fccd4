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

from clipshim.errors import ClipError
from clipshim.index.erofs_read import ErofsImage
from clipshim.lazy.tree_fs import TreeFileSystem
from clipshim.lazy.tree_session import TreeSession
from clipshim.node.control import read_memory
from clipshim.node.kept_settings import settings_of_daemon
from clipshim.node.processes import raise_limits

log = logging.getLogger("clipshim.node.tree_server")


def _serve(config: dict[str, Any]) -> None:
    fd = os.open(config["tree"], os.O_RDONLY | os.O_CLOEXEC)
    try:
        image = ErofsImage(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
    finally:
        os.close(fd)
    files = TreeFileSystem(image, config["devices"], no_opendir=config.get("no_opendir", False))
    stop_fd, told_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(told_fd)
    signal.signal(signal.SIGTERM, lambda *_: None)  # the wakeup descriptor says it
    TreeSession(files, config["fuse_fd"]).serve(stop_fd)


def main() -> int:
    """Entry point of `python -I -m clipshim.node.tree_server JSON|FD`, of a file with the JSON."""
    text: str | bytes = sys.argv[1]
    if sys.argv[1].isdigit():
        text = read_memory(int(sys.argv[1]))
        os.close(int(sys.argv[1]))
    config = json.loads(text)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise_limits()
    try:
        settings_of_daemon()
        _serve(config)
    except (ClipError, OSError) as exc:
        log.error("%s", exc, extra={"image_id": config.get("image_id")})
        return 1
    # Not through the interpreter's end, which waits for threads that wait for a layer's server.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())

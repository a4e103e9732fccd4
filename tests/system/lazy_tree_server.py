"""A program that serves a tree in mode fuse over an inherited /dev/fuse descriptor.

python lazy_tree_server.py FUSE_FD EROFS LOG LAYER…
"""

from __future__ import annotations

import mmap
import os
import sys

from clipshim.index.erofs_read import ErofsImage
from clipshim.lazy.tree_fs import TreeFileSystem
from clipshim.lazy.tree_session import TreeSession


def main(fuse_fd: int, *, erofs: str, log: str, layers: list[str]) -> None:
    fd = os.open(erofs, os.O_RDONLY)
    image = ErofsImage(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
    os.close(fd)
    session = TreeSession(TreeFileSystem(image, layers, no_opendir=True), fuse_fd)
    log_fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log_fd, b"ready\n")
    os.close(log_fd)
    stop_fd, _ = os.pipe()
    session.serve(stop_fd)


if __name__ == "__main__":
    _, fd_text, erofs_path, log_path, *layer_paths = sys.argv
    main(int(fd_text), erofs=erofs_path, log=log_path, layers=layer_paths)

"""A program that serves a tree in mode fuse over an inherited /dev/fuse descriptor.

python lazy_tree_server.py FUSE_FD EROFS LOG LAYER…
"""

from __future__ import annotations

import mmap
import os
import sys

import trio

from clipshim.index.erofs_read import ErofsImage
from clipshim.lazy.fuse_session import serve
from clipshim.lazy.tree_fs import TreeOperations


async def main(fuse_fd: int, *, erofs: str, log: str, layers: list[str]) -> None:
    fd = os.open(erofs, os.O_RDONLY)
    operations = TreeOperations(ErofsImage(mmap.mmap(fd, 0, prot=mmap.PROT_READ)), layers)
    os.close(fd)
    async with trio.open_nursery() as nursery:

        async def run(task_status: trio.TaskStatus[None]) -> None:
            await serve(operations, fuse_fd, task_status=task_status)

        await nursery.start(run)
        log_fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(log_fd, b"ready\n")
        os.close(log_fd)
    operations.close()


if __name__ == "__main__":
    _, fd_text, erofs_path, log_path, *layer_paths = sys.argv
    trio.run(
        lambda: main(
            int(fd_text),
            erofs=erofs_path,
            log=log_path,
            layers=layer_paths,
        )
    )

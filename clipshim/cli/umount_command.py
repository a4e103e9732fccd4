"""`clipshim umount DIR`: takes away what `clipshim mount` put there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the tree is mounted.")],
) -> None:
    """Unmount a tree that `clipshim mount` has mounted.

    \b
    clipshim umount /mnt
    """
    from clipshim.cli.library import umount_index

    umount_index(directory)

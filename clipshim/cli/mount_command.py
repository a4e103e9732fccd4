"""`clipshim mount INDEX DIR`: shows an image's tree at a directory, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipshim.cli.options import Format, Mode, OutputFormat, Quiet
from clipshim.cli.terminal import print_json, print_note


def command(
    index: Annotated[
        str, typer.Argument(metavar="INDEX", help="An index file, or an image in the local store.")
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An existing directory.")],
    mode: Annotated[Mode, typer.Option("--mode", help="How the tree is shown.")] = Mode.AUTO,
    output: Format = OutputFormat.TABLE,
    quiet: Quiet = False,
) -> None:
    """Mount an index's tree at a directory, read-only.

    Files are fetched as they are read.

    \b
    clipshim mount app.clip /mnt
    stat /mnt/proc
    clipshim umount /mnt
    """
    from clipshim.cli.library import mount_index  # only when it runs: the daemon's client

    mounted = mount_index(index, directory, mode=mode.value)
    if output is OutputFormat.JSON:
        print_json(mounted.describe())
    elif not quiet:
        print_note(f"{mounted.reference} is at {mounted.directory}, mode {mounted.mode}")

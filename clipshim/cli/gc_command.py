"""`clipshim gc`: removes what crashed containers left behind."""

from __future__ import annotations

from typing import Annotated

import typer

from clipshim.cli.options import Format, OutputFormat
from clipshim.cli.terminal import print_fields, print_json


def command(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Remove what belongs to no container any more.

    Mounts, directories and trees, as crashed containers leave them.

    The daemon does this at its start by itself; cached spans go when the cache is full.

    \b
    clipshim gc --dry-run
    """
    from clipshim.cli.daemon_calls import call
    from clipshim.settings import load_settings

    reply = call(load_settings(), {"op": "gc", "dry_run": dry_run})
    removed = reply.get("removed", [])
    if output is OutputFormat.JSON:
        print_json({"dry_run": dry_run, "removed": removed})
        return
    word = "would remove" if dry_run else "removed"
    for item in removed:
        print_fields([(word, item)])
    if not removed:
        print_fields([(word, "nothing")])

"""`clipshim report ID`: what a container has fetched, and when."""

from __future__ import annotations

from typing import Annotated

import typer

from clipshim.cli.options import Format, OutputFormat
from clipshim.cli.status_command import show
from clipshim.cli.terminal import print_json


def command(
    container: Annotated[str, typer.Argument(metavar="ID", help="The container's ID.")],
    output: Format = OutputFormat.TABLE,
) -> None:
    """Show what a container has caused to be fetched.

    \b
    clipshim report my-container
    clipshim report my-container --format json
    """
    from clipshim.cli.daemon_calls import call
    from clipshim.settings import load_settings

    reply = call(load_settings(), {"op": "report", "container": container})
    reply.pop("ok", None)
    if output is OutputFormat.JSON:
        print_json(reply)
    else:
        show(reply)

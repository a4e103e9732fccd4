"""`clipshim daemon`: the node daemon in the foreground, for systemd; its replacement and end."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from clipshim.cli.options import Quiet
from clipshim.cli.terminal import print_note
from clipshim.errors import UsageError


def command(
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Put this version in the place of the running daemon."),
    ] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="End the running daemon; containers keep their mounts.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run the node daemon in the foreground, as systemd wants it.

    Nobody has to: the first container starts one. `--replace` changes versions under running
    containers.

    \b
    systemctl enable --now clipshim
    clipshim daemon --replace
    clipshim daemon --stop
    """
    if replace and stop:
        raise UsageError("--replace and --stop exclude each other")
    from clipshim.settings import load_settings

    settings = load_settings()
    if replace or stop:
        from clipshim.cli.daemon_calls import call, is_running

        if not is_running(settings):
            if stop:
                if not quiet:
                    print_note("no daemon is running")
                return
        else:
            call(settings, {"op": "stop" if stop else "replace"}, start=False)
            if not quiet:
                print_note("stopped" if stop else "replaced")
            return
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "clipshim.node.keeper"])  # noqa: S606

"""`clipshim daemon`: the node daemon in the foreground, for systemd; its replacement and end."""

from __future__ import annotations

import os
import select
import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from clipshim.cli.options import Quiet
from clipshim.cli.terminal import print_note
from clipshim.errors import DaemonError, UsageError

if TYPE_CHECKING:
    from clipshim.settings import Settings

END_TIMEOUT_S = 60.0


def command(
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Put this version in the place of the running daemon."),
    ] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="End the running daemon, if no container needs it.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="With --stop: also under running containers.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run the node daemon in the foreground, as systemd wants it.

    Nobody has to: the first container starts one. `--replace` changes versions under running
    containers; if none runs, nothing happens.

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
        _tell_running(settings, stop=stop, force=force, quiet=quiet)
        return
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-I", "-m", "clipshim.node.keeper"])  # noqa: S606


def _tell_running(settings: Settings, *, stop: bool, force: bool, quiet: bool) -> None:
    """Stops or replaces the running daemon; returns when that is done."""
    from clipshim.cli.daemon_calls import call, is_running

    if not is_running(settings):
        if not quiet:
            print_note("no daemon is running")
        return
    if not stop:
        call(settings, {"op": "replace"}, start=False)
        if not quiet:
            print_note("replaced")
        return
    keeper = call(settings, {"op": "ping"}, start=False).get("keeper_pid")
    with ExitStack() as stack:
        pidfd = None
        if isinstance(keeper, int):
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(keeper)
                stack.callback(os.close, pidfd)
        call(settings, {"op": "stop", "force": force}, start=False)
        # The answer comes before the end: what a user does next must not meet the old mounts.
        if pidfd is not None and not select.select([pidfd], [], [], END_TIMEOUT_S)[0]:
            raise DaemonError(
                f"node daemon: process {keeper} did not end in {END_TIMEOUT_S:.0f} s",
                hint="its log says why: the journal, or daemon.log in the state directory",
            )
    if not quiet:
        print_note("stopped")

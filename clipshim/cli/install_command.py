"""`clipshim install ENGINE`: names clipshim as a runtime in an engine's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipshim.cli.engine_files import Engine, Plan, plan_install, tell_and_apply

EngineName = Annotated[Engine, typer.Argument(metavar="ENGINE", help="Whose configuration.")]
ConfigPath = Annotated[
    Path | None,
    typer.Option("--config", help="The engine's configuration file, if not the usual one."),
]
Root = Annotated[
    Path | None,
    typer.Option("--root", help="Work below this directory instead of /, as for an OS image."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the difference, change nothing.")]


def command(
    engine: EngineName,
    config: ConfigPath = None,
    root: Root = None,
    runtime: Annotated[
        Path | None, typer.Option("--runtime", help="Path of the clipshim program for the engine.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Name clipshim as a runtime in an engine's configuration.

    Keeps what is there, comments too; writes a back-up beside the file; doing it twice changes
    nothing more. The engine's default runtime stays what it is.

    \b
    clipshim install docker --dry-run
    clipshim install docker && systemctl restart docker
    docker run --runtime clipshim ...
    """
    plan: Plan = plan_install(engine, config=config, root=root, runtime=runtime)
    tell_and_apply(plan, dry_run=dry_run)

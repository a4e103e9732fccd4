"""`clipshim uninstall ENGINE`: takes back what `clipshim install` wrote."""

from __future__ import annotations

from clipshim.cli.engine_files import plan_uninstall, tell_and_apply
from clipshim.cli.install_command import (
    ConfigPath,
    DryRun,
    EngineName,
    Root,
)


def command(
    engine: EngineName, config: ConfigPath = None, root: Root = None, dry_run: DryRun = False
) -> None:
    """Take clipshim out of an engine's configuration.

    When nothing else changed since `install`, the file becomes again what it was, to the byte.

    \b
    clipshim uninstall docker && systemctl restart docker
    """
    tell_and_apply(plan_uninstall(engine, config=config, root=root), dry_run=dry_run)

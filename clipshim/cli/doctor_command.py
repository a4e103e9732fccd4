"""`clipshim doctor`: what on this machine keeps containers from starting, and what to do."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from clipshim.cli.options import Format, OutputFormat
from clipshim.cli.terminal import print_json, printable


def command(
    registry: Annotated[
        list[str] | None,
        typer.Option("--registry", metavar="HOST", help="Also ask this registry; repeatable."),
    ] = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Check this machine; the exit status is 1 if anything is broken.

    Changes nothing but for passing probe mounts below the state directory.

    \b
    clipshim doctor
    clipshim doctor --registry registry.example.com --format json
    """
    from clipshim.cli.doctor_checks import Level, run_checks  # psutil, urllib3

    findings = run_checks(registry or [])
    broken = [finding for finding in findings if finding.level is Level.BROKEN]
    if output is OutputFormat.JSON:
        print_json(
            {
                "ok": not broken,
                "findings": [
                    {
                        "level": finding.level.value,
                        "check": finding.check,
                        "message": finding.message,
                        "remedy": finding.remedy,
                    }
                    for finding in findings
                ],
            }
        )
    else:
        for finding in findings:
            sys.stdout.write(
                f"{finding.level.value:<7} {finding.check}: {printable(finding.message)}\n"
            )
            if finding.remedy:
                sys.stdout.write(f"        -> {printable(finding.remedy)}\n")
    if broken:
        raise typer.Exit(1)

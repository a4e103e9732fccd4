"""`clipshim status`: what the node daemon has mounted, cached and fetched."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from clipshim.cli.options import Format, OutputFormat
from clipshim.cli.terminal import print_fields, print_json, print_table


def command(
    output: Format = OutputFormat.TABLE,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Print the daemon's metrics for Prometheus instead.")
    ] = False,
) -> None:
    """Show mounts, containers, the cache and what was fetched.

    \b
    clipshim status
    clipshim status --format json | jq .images
    """
    import sys

    from clipshim.cli.daemon_calls import call, is_running
    from clipshim.settings import load_settings

    settings = load_settings()
    if not is_running(settings):
        if output is OutputFormat.JSON:
            print_json({"running": False})
        elif not metrics:
            print_fields([("daemon", "not running; the first container starts it")])
        return
    if metrics:
        sys.stdout.write(str(call(settings, {"op": "metrics"}, start=False).get("text", "")))
        return
    reply = call(settings, {"op": "status"}, start=False)
    reply.pop("ok", None)
    if output is OutputFormat.JSON:
        print_json({"running": True, **reply})
    else:
        show(reply)


def show(document: dict[str, Any]) -> None:
    """The daemon's status document as text: scalars first, then a table for each list."""
    print_fields([(_title(key), value) for key, value in document.items() if not _is_nested(value)])
    for key, value in document.items():
        if isinstance(value, dict) and value:
            print_fields([(f"{_title(key)} {_title(k)}", v) for k, v in value.items()])
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            columns = [name for name in value[0] if not _is_nested(value[0][name])]
            print_table(columns, [[row.get(name, "") for name in columns] for row in value])
        elif isinstance(value, list):
            print_fields([(_title(key), ", ".join(map(str, value)) or "none")])


def _is_nested(value: object) -> bool:
    return isinstance(value, list | dict)


def _title(key: str) -> str:
    return key.replace("_", " ")

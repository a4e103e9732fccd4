"""`clipshim status`: what the node daemon has mounted, cached and fetched."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from clipshim.cli.options import Format, OutputFormat
from clipshim.cli.terminal import human_size, print_fields, print_json, print_table


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
    """A document of the daemon as text: its scalars first, then what is nested."""
    print_fields([(_title(key), _text(key, v)) for key, v in document.items() if not _is_nested(v)])
    for key, value in document.items():
        if isinstance(value, dict) and value:
            print_fields([(f"{_title(key)} {_title(k)}", _text(k, v)) for k, v in value.items()])
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            columns = [name for name in value[0] if not _is_nested(value[0][name])]
            titles = [_title(name) for name in columns]
            print_table(titles, [[_text(n, row.get(n, "")) for n in columns] for row in value])
        elif isinstance(value, list):
            print_fields([(_title(key), ", ".join(map(str, value)) or "none")])


def _is_nested(value: object) -> bool:
    return isinstance(value, list | dict)


def _title(key: str) -> str:
    return key.replace("_", " ").removesuffix(" bytes").removesuffix(" at")


def _text(key: str, value: object) -> object:
    """A value as a person reads it, by the convention of its key's name."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and key.endswith(("_bytes", "size")):
        return human_size(value)
    if isinstance(value, int) and key.endswith(("_time", "_at")):
        return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M:%S}Z"
    if isinstance(value, str) and key == "image_id":
        return value[:12]
    if isinstance(value, str) and key.endswith(("diff_id", "digest")):
        return value.partition(":")[2][:12]
    return value

"""`clipshim complete IMAGE`: fetches the rest, so that the registry is not needed any more."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from clipshim.cli.options import Format, OutputFormat, Quiet
from clipshim.cli.terminal import human_size, print_json, print_table, progress_bars


def command(
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="An image in the local store, or a digest.")
    ],
    quiet: Quiet = False,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Fetch the rest of an image and prove it whole.

    Afterwards containers of the image run without the registry.

    \b
    clipshim complete docker.io/library/ubuntu:22.04
    """
    from clipshim.cli.daemon_calls import call
    from clipshim.settings import load_settings

    with progress_bars(quiet=quiet) as bars:
        started: set[int] = set()

        def advance(progress: dict[str, Any]) -> None:
            layer = int(progress.get("layer", 0))
            total = int(progress.get("total", 0))
            if layer not in started:
                started.add(layer)
                bars.layer_started(layer, str(progress.get("digest", "")), total)
            bars.layer_advanced(layer, int(progress.get("done", 0)))

        reply = call(load_settings(), {"op": "complete", "image": image}, on_progress=advance)
    layers = reply.get("layers", [])
    if output is OutputFormat.JSON:
        print_json({"image": image, "layers": layers})
    elif layers and isinstance(layers[0], dict):
        columns = list(layers[0])
        rows = [
            [human_size(layer[c]) if c in ("size", "bytes") else layer[c] for c in columns]
            for layer in layers
        ]
        print_table(columns, rows)

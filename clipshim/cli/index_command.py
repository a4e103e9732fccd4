"""`clipshim index IMAGE [OUTPUT.clip]`: makes the index of an image."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipshim.cli import options
from clipshim.cli.terminal import human_size, print_fields, print_json, print_note, progress_bars
from clipshim.errors import LayerError, UsageError

if TYPE_CHECKING:
    from clipshim.index.model import Index

SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
SHOWN_DIFFERENCES = 20


def command(
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE",
            help="HOST/NAME[:TAG], or oci:DIR, oci-archive:FILE, docker-archive:FILE.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Argument(metavar="OUTPUT.clip", help="Default: this machine's store of indexes."),
    ] = None,
    platform: options.Platform = None,
    plain_http: options.PlainHttp = False,
    insecure: options.Insecure = False,
    ca_file: options.CaFile = None,
    authfile: options.AuthFile = None,
    username: options.Username = None,
    password_stdin: options.PasswordStdin = False,
    spacing: Annotated[
        str | None,
        typer.Option("--spacing", metavar="SIZE", help="Bytes between checkpoints, as 512k or 1M."),
    ] = None,
    embed: Annotated[
        bool, typer.Option("--embed", help="Put the layers' data in too: no registry needed.")
    ] = False,
    verify_unpack: Annotated[
        bool,
        typer.Option("--verify-unpack", help="Compare the tree with a real unpack of the image."),
    ] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Layers at a time; default: by the cores.")
    ] = None,
    quiet: options.Quiet = False,
    output_format: options.Format = options.OutputFormat.TABLE,
) -> None:
    """Make the index of an image.

    Every layer is read once; everything but the files' contents is kept.

    Without OUTPUT the index goes into this machine's store, where containers of the image find
    it by the image's name.

    \b
    clipshim index docker.io/library/ubuntu:22.04
    clipshim index --plain-http localhost:5000/app app.clip
    clipshim index oci:layout:latest app.clip --embed
    """
    from clipshim.cli import images  # the heavy half, only when there is something to do
    from clipshim.cli.access import registry_access
    from clipshim.index.builder import BuildOptions, build_index
    from clipshim.registry.sources import open_source
    from clipshim.settings import load_settings

    settings = load_settings()
    access = registry_access(
        settings, image, plain_http=plain_http, insecure=insecure, ca_file=ca_file,
        authfile=authfile, username=username, password_stdin=password_stdin,
    )  # fmt: skip
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"{output}: no such directory {output.parent}")
    given: dict[str, Any] = {"embed": embed}
    if spacing is not None:
        given["spacing"] = parse_size(spacing)
    if jobs is not None:
        given["jobs"] = jobs
    build_options = BuildOptions(**given)

    began = time.monotonic()
    source = open_source(image, platform=platform, access=access)
    with images.destination(settings, output) as path, progress_bars(quiet=quiet) as progress:
        build_index(source, path, build_options, progress)
        if verify_unpack:
            progress.message("comparing with a real unpack")
            _check(path, source)
        stored = images.finish(settings, path, source.reference, output)
    elapsed = time.monotonic() - began

    from clipshim.index.model import open_index

    with open_index(stored) as index:
        facts = describe(index, stored, elapsed)
    if verify_unpack:
        facts["verified_against_unpack"] = True
    if output_format is options.OutputFormat.JSON:
        print_json(facts)
        return
    if not quiet:
        share = facts["index_size"] / max(1, facts["compressed_size"])
        print_note(
            f"{facts['reference']}: {facts['layers']} layers, "
            f"{human_size(facts['compressed_size'])} in the registry, index "
            f"{human_size(facts['index_size'])} ({share:.2%}), {elapsed:.1f} s"
        )
    print_fields([("index", str(stored)), ("digest", facts["digest"])])


def describe(index: Index, path: Path, elapsed_s: float) -> dict[str, Any]:
    """What an index is, for JSON."""
    return {
        "index": str(path),
        "digest": index.digest,
        "reference": index.reference,
        "manifest_digest": index.manifest_digest,
        "platform": index.platform,
        "layers": len(index.layers),
        "compressed_size": sum(layer.blob_size for layer in index.layers),
        "uncompressed_size": sum(layer.size for layer in index.layers),
        "index_size": path.stat().st_size,
        "self_contained": index.has_blobs,
        "seconds": round(elapsed_s, 3),
    }


def parse_size(text: str) -> int:
    """`512k`, `1M`, `1048576` in bytes. Raises UsageError."""
    cleaned = text.strip().lower().removesuffix("b").removesuffix("i")
    number = cleaned.rstrip("kmg")
    unit = cleaned[len(number) :]
    if not number.isdigit() or unit not in SIZE_UNITS:
        raise UsageError(f"size {text!r}: expected a number with k, M or G, as 512k")
    return int(number) * SIZE_UNITS[unit]


def _check(path: Path, source: Any) -> None:
    from clipshim.index.unpack_check import check_against_unpack

    differences = check_against_unpack(path, source)
    if differences:
        shown = "; ".join(differences[:SHOWN_DIFFERENCES])
        raise LayerError(
            f"{source.reference}: the tree differs from a real unpack in {len(differences)} "
            f"places: {shown}",
            hint="this is a bug of clipshim: please report it with the image's name",
        )

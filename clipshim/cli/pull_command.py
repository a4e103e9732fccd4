"""`clipshim pull IMAGE`: fetches the index that somebody pushed for an image."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from clipshim.cli import options
from clipshim.cli.terminal import print_fields, print_json
from clipshim.errors import PolicyError

if TYPE_CHECKING:
    from pathlib import Path

    from clipshim.registry.references import Reference


def command(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The image whose index is wanted.")],
    platform: options.Platform = None,
    plain_http: options.PlainHttp = False,
    insecure: options.Insecure = False,
    ca_file: options.CaFile = None,
    authfile: options.AuthFile = None,
    username: options.Username = None,
    password_stdin: options.PasswordStdin = False,
    quiet: options.Quiet = False,
    output: options.Format = options.OutputFormat.TABLE,
) -> None:
    """Fetch the index that somebody pushed for an image.

    It goes into this machine's store, where containers of the image find it.

    \b
    clipshim pull registry.example.com/app:1.0
    """
    from clipshim.cli.access import registry_access
    from clipshim.cli.images import destination, finish
    from clipshim.registry.artifacts import pull_index
    from clipshim.registry.sources import resolve_manifest_digest
    from clipshim.settings import load_settings

    settings = load_settings()
    access = registry_access(
        settings, image, plain_http=plain_http, insecure=insecure, ca_file=ca_file,
        authfile=authfile, username=username, password_stdin=password_stdin,
    )  # fmt: skip
    with destination(settings, None) as path:
        reference, manifest = resolve_manifest_digest(image, platform=platform, access=access)
        pinned = str(replace(reference, digest=manifest.digest))
        pull_index(pinned, path, platform=platform, access=access)
        digest = checked_digest(path, reference, manifest.digest)
        # By the name that was asked for, never by what the file says of itself.
        stored = finish(settings, path, str(reference), None)
    if output is options.OutputFormat.JSON:
        print_json({"image": str(reference), "digest": digest, "index": str(stored)})
    elif not quiet:
        print_fields([("image", reference), ("digest", digest)])


def checked_digest(path: Path, image: Reference, manifest_digest: str) -> str:
    """The digest of an index that came from a registry, if it is of the image asked for.

    Whoever may push into the repository wrote it. Raises PolicyError, IndexFormatError.
    """
    from clipshim.index.model import open_index
    from clipshim.registry.references import Reference, parse_image

    with open_index(path) as index:
        claimed = parse_image(index.reference)
        if not isinstance(claimed, Reference) or claimed.name != image.name:
            raise PolicyError(
                f"image {image}: its index is of {index.reference}",
                hint="push an index that was made of this repository",
            )
        if index.manifest_digest != manifest_digest:
            raise PolicyError(
                f"image {image}: its index is of manifest {index.manifest_digest}, "
                f"expected {manifest_digest}"
            )
        return index.digest

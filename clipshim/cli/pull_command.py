"""`clipshim pull IMAGE`: fetches the index that somebody pushed for an image."""

from __future__ import annotations

from typing import Annotated

import typer

from clipshim.cli.options import (
    AuthFile,
    CaFile,
    Format,
    Insecure,
    OutputFormat,
    PasswordStdin,
    PlainHttp,
    Platform,
    Quiet,
    Username,
)
from clipshim.cli.terminal import print_fields, print_json


def command(
    image: Annotated[str, typer.Argument(help="The image whose index is wanted.")],
    platform: Platform = None,
    plain_http: PlainHttp = False,
    insecure: Insecure = False,
    ca_file: CaFile = None,
    authfile: AuthFile = None,
    username: Username = None,
    password_stdin: PasswordStdin = False,
    quiet: Quiet = False,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Fetch an image's index from the registry into this machine's store.

    \b
    clipshim pull registry.example.com/app:1.0
    """
    from clipshim.cli.access import registry_access
    from clipshim.cli.images import destination, finish
    from clipshim.registry.artifacts import pull_index
    from clipshim.settings import load_settings

    settings = load_settings()
    access = registry_access(
        settings, image, plain_http=plain_http, insecure=insecure, ca_file=ca_file,
        authfile=authfile, username=username, password_stdin=password_stdin,
    )  # fmt: skip
    from clipshim.index.model import open_index

    with destination(settings, None) as path:
        pull_index(image, path, platform=platform, access=access)
        with open_index(path) as index:
            digest, reference = index.digest, index.reference
        stored = finish(settings, path, reference, None)
    if output is OutputFormat.JSON:
        print_json({"image": reference, "digest": digest, "index": str(stored)})
    elif not quiet:
        print_fields([("image", reference), ("digest", digest)])

"""`clipshim push INDEX IMAGE`: stores an index beside its image in the registry."""

from __future__ import annotations

from typing import Annotated

import typer

from clipshim.cli import options
from clipshim.cli.terminal import print_fields, print_json


def command(
    index: Annotated[
        str, typer.Argument(metavar="INDEX", help="An index file, or an image in the local store.")
    ],
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The image that the index is of.")],
    plain_http: options.PlainHttp = False,
    insecure: options.Insecure = False,
    ca_file: options.CaFile = None,
    authfile: options.AuthFile = None,
    username: options.Username = None,
    password_stdin: options.PasswordStdin = False,
    quiet: options.Quiet = False,
    output: options.Format = options.OutputFormat.TABLE,
) -> None:
    """Store an index beside its image in the registry.

    It becomes a referrer of the image, and nodes find it by the image's name. The image itself is
    not touched.

    \b
    clipshim push app.clip registry.example.com/app:1.0
    """
    from clipshim.cli.access import registry_access
    from clipshim.cli.images import path_of
    from clipshim.index.model import open_index
    from clipshim.registry.artifacts import push_index
    from clipshim.settings import load_settings

    settings = load_settings()
    access = registry_access(
        settings, image, plain_http=plain_http, insecure=insecure, ca_file=ca_file,
        authfile=authfile, username=username, password_stdin=password_stdin,
    )  # fmt: skip
    path = path_of(settings, index)
    with open_index(path) as opened:
        made_of = opened.manifest_digest  # the index knows its manifest, whatever the platform
    digest = push_index(path, image, access=access, manifest_digest=made_of)
    if output is options.OutputFormat.JSON:
        print_json({"image": image, "manifest_digest": digest})
    elif not quiet:
        print_fields([("pushed", f"{image} <- {digest}")])

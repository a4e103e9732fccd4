"""Options that several commands share, under the names that oras gave them."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class OutputFormat(enum.StrEnum):
    """How a command prints its data."""

    TABLE = "table"
    JSON = "json"


class Mode(enum.StrEnum):
    """How a tree is shown."""

    AUTO = "auto"
    EROFS = "erofs"
    FUSE = "fuse"


Format = Annotated[
    OutputFormat, typer.Option("--format", help="How to print the result.", show_default=True)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
Platform = Annotated[
    str | None,
    typer.Option(
        "--platform",
        metavar="OS/ARCH[/VARIANT]",
        help="Which image of an image index; default: this machine's.",
    ),
]
PlainHttp = Annotated[bool, typer.Option("--plain-http", help="Speak to the registry without TLS.")]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Accept a TLS certificate that does not check out.")
]
CaFile = Annotated[
    Path | None, typer.Option("--ca-file", help="Certificates that may sign the registry's.")
]
AuthFile = Annotated[
    Path | None,
    typer.Option(
        "--authfile", "--registry-config", help="Credentials, as docker login writes them."
    ),
]
Username = Annotated[
    str | None, typer.Option("--username", "-u", help="User name for the registry.")
]
PasswordStdin = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password or token from stdin.")
]

"""From a command line's registry options to a RegistryAccess."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from clipshim.cli.terminal import print_note
from clipshim.errors import UsageError
from clipshim.registry.access import RegistryAccess
from clipshim.registry.references import Reference, is_loopback, parse_image

if TYPE_CHECKING:
    from pathlib import Path

    from clipshim.settings import Settings

MAX_PASSWORD_BYTES = 1 << 20


def registry_access(
    settings: Settings,
    image: str,
    *,
    plain_http: bool = False,
    insecure: bool = False,
    ca_file: Path | None = None,
    authfile: Path | None = None,
    username: str | None = None,
    password_stdin: bool = False,
) -> RegistryAccess:
    """Access as configured, with what the command line adds for `image`'s registry.

    Raises UsageError for options that need each other, BadReferenceError for a bad name.
    """
    if (username is None) != (not password_stdin):
        raise UsageError(
            "expected -u and --password-stdin together",
            hint="echo $PASSWORD | clipshim … -u NAME --password-stdin",
        )
    password = None
    if password_stdin:
        password = sys.stdin.read(MAX_PASSWORD_BYTES).rstrip("\r\n")
        if not password:
            raise UsageError("expected a password on stdin, got nothing")
    if ca_file is not None and not ca_file.is_file():
        raise UsageError(f"--ca-file {ca_file}: no such file")
    named = parse_image(image)
    if plain_http and isinstance(named, Reference):
        _note_plain_http(settings, named.registry)
    plain = frozenset({named.registry}) if plain_http and isinstance(named, Reference) else None
    return RegistryAccess.from_settings(
        settings,
        authfile=str(authfile) if authfile else None,
        username=username,
        password=password,
        # A password must not reach the other registry where a command names two.
        login_registry=named.registry if isinstance(named, Reference) else None,
        plain_http=plain or frozenset(),
        insecure=insecure,
        ca_file=str(ca_file) if ca_file else None,
    )


def _note_plain_http(settings: Settings, registry: str) -> None:
    """The option is for this command; containers fetch through the daemon, which has its own."""
    if registry not in settings.plain_http and not is_loopback(registry):
        print_note(
            f"note: add {registry} to plain_http in {settings.path}, or containers cannot fetch"
        )

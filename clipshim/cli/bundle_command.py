"""`clipshim bundle IMAGE|INDEX DIR [-- ARGS…]`: writes a bundle that runs as it stands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipshim.cli import options
from clipshim.cli.terminal import print_json, print_note
from clipshim.errors import UsageError

if TYPE_CHECKING:
    from clipshim.index.model import Index
    from clipshim.registry.access import RegistryAccess

INDEX_NAME = "index.clip"


def command(
    image: Annotated[str, typer.Argument(metavar="IMAGE|INDEX", help="An image or an index file.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made if it is missing.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- ARGS", help="The program's arguments, as in docker run."),
    ] = None,
    entrypoint: Annotated[
        str | None, typer.Option("--entrypoint", help="Instead of the image's; empty for none.")
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", help="NAME[:GROUP] or numbers, instead of the image's.")
    ] = None,
    terminal: Annotated[
        bool, typer.Option("--terminal", "-t", help="The container gets a terminal.")
    ] = False,
    host_network: Annotated[
        bool, typer.Option("--host-network", help="Share the machine's network.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a bundle.")] = False,
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
    """Write an OCI bundle that runs from an image's index.

    config.json comes from the image's configuration, and the index lies beside it. An image that
    has no index yet is indexed on the way. The bundle can be moved; its container fetches from the
    registry that the index names.

    \b
    clipshim bundle docker.io/library/python:3.12 app -- python3 -c 'print("hello")'
    clipshim run --bundle app my-container
    clipshim bundle app.clip app --user nobody --host-network
    """
    from clipshim.cli.access import registry_access
    from clipshim.cli.images import opened_or_made, registry_name
    from clipshim.settings import load_settings

    settings = load_settings()
    config_path = directory / "config.json"
    if config_path.exists() and not force:
        raise UsageError(
            f"{directory}: there is a bundle already", hint="name another DIR, or give --force"
        )
    access = registry_access(
        settings, registry_name(settings, image), plain_http=plain_http, insecure=insecure,
        ca_file=ca_file, authfile=authfile, username=username, password_stdin=password_stdin,
    )  # fmt: skip
    with opened_or_made(settings, image, platform=platform, access=access, quiet=quiet) as (
        path,
        index,
    ):
        spec = bundle_spec(
            index, access, arguments=arguments or [], user=user, entrypoint=entrypoint,
            terminal=terminal, host_network=host_network,
        )  # fmt: skip
        reference = index.reference
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / INDEX_NAME
        _copy(path, target)
    (directory / "rootfs").mkdir(exist_ok=True)
    _write_json(config_path, spec)
    facts = {
        "bundle": str(directory),
        "image": reference,
        "index": str(target),
        "args": spec["process"]["args"],
        "user": spec["process"]["user"],
    }
    if output is options.OutputFormat.JSON:
        print_json(facts)
    elif not quiet:
        print_note(f"next: clipshim run --bundle {directory} ID")


def bundle_spec(
    index: Index,
    access: RegistryAccess,
    *,
    arguments: list[str],
    user: str | None = None,
    entrypoint: str | None = None,
    terminal: bool = False,
    host_network: bool = False,
) -> dict[str, Any]:
    """config.json for an index; reads the image's passwd and group where a name needs them."""
    from clipshim.cli import bundle_spec as spec
    from clipshim.cli.image_files import ImageFiles

    named = user if user is not None else str(spec.config_of(index.config).get("User") or "")
    with ImageFiles(index, access) as files:
        passwd, group = files.read("/etc/passwd"), files.read("/etc/group")
        missing = [p for p in spec.volumes_of(index.config) if not files.is_directory(p)]
    return spec.runtime_spec(
        index.config,
        index_name=INDEX_NAME,
        user=spec.resolve_user(named, passwd, group),
        arguments=arguments,
        entrypoint=None if entrypoint is None else [entrypoint] if entrypoint else [],
        terminal=terminal,
        host_network=host_network,
        missing_volumes=missing,
        # As runc spec does: a cgroup name space only where cgroup v2 is the whole hierarchy.
        cgroup_namespace=os.path.exists("/sys/fs/cgroup/cgroup.controllers"),
    )


def _copy(source: Path, target: Path) -> None:
    import shutil

    if target.exists() and source.samefile(target):
        return
    new = target.with_name(f".{target.name}.new")
    shutil.copyfile(source, new)
    new.replace(target)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    import json

    new = path.with_name(f".{path.name}.new")
    with open(new, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)

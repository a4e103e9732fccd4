"""`clipshim stub IMAGE [TARGET]`: a small ordinary image that stands for a big one."""

from __future__ import annotations

import enum
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipshim.cli import options
from clipshim.cli.terminal import human_size, print_fields, print_json, print_note
from clipshim.errors import UsageError

if TYPE_CHECKING:
    from clipshim.cli.image_files import FileEntry
    from clipshim.index.model import Index
    from clipshim.registry.access import RegistryAccess
    from clipshim.registry.stubs import StubImage

# Engines resolve `USER name` from the two files; directories keep their attributes.
MAX_VOLUME_BYTES = 1 << 20  # a stub stays small, whatever an image's volumes begin with
STUB_FILES = ("/etc", "/etc/passwd", "/etc/group")


class ArchiveFormat(enum.StrEnum):
    """What `-o` writes."""

    OCI = "oci-archive"
    DOCKER = "docker-archive"


class Load(enum.StrEnum):
    """Where `--load` puts the stub."""

    DOCKER = "docker"
    PODMAN = "podman"
    CONTAINERD = "containerd"


def command(
    image: Annotated[str, typer.Argument(metavar="IMAGE|INDEX", help="What the stub stands for.")],
    target: Annotated[
        str | None, typer.Argument(metavar="TARGET", help="Where to push the stub.")
    ] = None,
    archive: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write an archive.")
    ] = None,
    archive_format: Annotated[
        ArchiveFormat, typer.Option("--archive-format", help="Of -o.")
    ] = ArchiveFormat.OCI,
    load: Annotated[
        Load | None, typer.Option("--load", help="Put it into an engine of this machine.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="The stub's name in the archive or engine; default IMAGE-lazy"),
    ] = None,
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
    """Make a small image that engines pull instead of the big one.

    A stub is an ordinary image of a few hundred kB. With `runtime: clipshim` its containers see
    the whole image; the rest is fetched as it is read. The image itself stays where it is.

    \b
    clipshim stub registry.example.com/app:1.0 registry.example.com/app:1.0-lazy
    clipshim stub registry.example.com/app:1.0 --load docker --name app:lazy
    docker run --runtime clipshim app:lazy
    """
    if target is None and archive is None and load is None:
        raise UsageError(
            "expected a TARGET to push to, -o FILE or --load ENGINE", hint="clipshim stub --help"
        )
    from clipshim.cli import engine_load
    from clipshim.cli.access import registry_access
    from clipshim.cli.images import opened_or_made, registry_name
    from clipshim.settings import load_settings

    settings = load_settings()
    original = registry_name(settings, image)

    def access_to(name: str, *, with_login: bool) -> RegistryAccess:
        return registry_access(
            settings, name, plain_http=plain_http, insecure=insecure, ca_file=ca_file,
            authfile=authfile, username=username if with_login else None,
            password_stdin=password_stdin and with_login,
        )  # fmt: skip

    # A password for the target is not for the registry that the image comes from.
    same = target is None or engine_load.same_registry(original, target)
    access = access_to(target or original, with_login=True)
    reading = access if same else access_to(original, with_login=False)
    with opened_or_made(settings, image, platform=platform, access=reading, quiet=quiet) as (
        _path,
        index,
    ):
        _check_origin(index)
        stub = build(index, reading)
        label = name or engine_load.stub_name(index.reference)
        facts: dict[str, Any] = {"image": index.reference, "size": stub.size}
        if archive is not None or load is not None:
            facts["name"] = label
        if target is not None:
            facts["pushed"] = target
            facts["manifest_digest"] = stub.push(target, access)
        if archive is not None:
            stub.write(archive, archive_format.value, label)
            facts["archive"] = str(archive)
        if load is not None:
            engine_load.load(load.value, lambda path, kind: stub.write(path, kind, label))
            facts["loaded"] = load.value
    if output is options.OutputFormat.JSON:
        print_json(facts)
    elif not quiet:
        print_note(f"a stub of {human_size(facts['size'])} stands for {facts['image']}")
        print_fields([(key, value) for key, value in facts.items() if key not in ("image", "size")])


def _check_origin(index: Index) -> None:
    """Refuses what no container could start from: a node opens no local path for a container."""
    from clipshim.registry.references import Reference, parse_image

    if not index.has_blobs and not isinstance(parse_image(index.reference), Reference):
        raise UsageError(
            f"stub of {index.reference}: containers fetch from registries only",
            hint="push the image to one, or make the stub of an index with data: "
            f"clipshim index --embed {index.reference} FILE.clip",
        )


def build(index: Index, access: RegistryAccess) -> StubImage:
    """The stub of an index, with what engines look up in it as the image has it."""
    from clipshim.cli.image_files import ImageFiles
    from clipshim.registry.stubs import StubFile, build_stub

    found: dict[str, FileEntry | None] = {}
    with ImageFiles(index, access) as files:
        working_directory, volumes = _made_by_engines(index.config)
        for path in (*working_directory, *volumes):
            found |= files.way(path)
        for path in volumes:
            way = [name for name, entry in files.way(path).items() if stat.S_ISDIR(entry.mode)]
            if not way or not files.is_directory(path):
                continue
            content = files.below(way[-1], limit=MAX_VOLUME_BYTES)
            if content is None:
                print_note(
                    f"{path}: too much for a stub; new volumes there are filled when a container"
                    " starts with Docker or podman, and begin empty with other engines"
                )
            else:
                found |= content
        found |= {path: files.entry(path) for path in STUB_FILES}
    return build_stub(
        index,
        {
            path: StubFile(*entry)
            for path, entry in found.items()
            if entry is not None and path.split("/")[1] != ".clip"
        },
    )


def _made_by_engines(config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The working directory and the volumes that an image declares: engines make both before the
    runtime is called, as they find them in the stub, and volumes with what is in them."""
    inner = config.get("config")
    inner = inner if isinstance(inner, dict) else {}
    directory, volumes = inner.get("WorkingDir"), inner.get("Volumes")
    return (
        [directory] if isinstance(directory, str) and directory.startswith("/") else [],
        [path for path in volumes if path.startswith("/")] if isinstance(volumes, dict) else [],
    )

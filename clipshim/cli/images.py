"""Indexes by the names that users give: a file, a digest, or an image of the local store."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from clipshim.cli.terminal import progress_bars
from clipshim.errors import NotFoundError, StoreError
from clipshim.index.model import Index, open_index
from clipshim.node.images import ImageNames

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clipshim.registry.access import RegistryAccess
    from clipshim.settings import Settings


def is_index_file(name: str) -> bool:
    """Whether `name` means a file rather than an image: by its ending, or because it is there."""
    return name.endswith(".clip") or ("/" in name and os.path.isfile(name))


def open_named(settings: Settings, name: str) -> Index:
    """Opens the index that `name` means. Raises NotFoundError, IndexFormatError."""
    return open_index(path_of(settings, name))


def path_of(settings: Settings, name: str) -> Path:
    """The file of the index that `name` means."""
    if is_index_file(name):
        if not os.path.exists(name):
            raise NotFoundError(
                f"index {name}: no such file", hint="make it: clipshim index IMAGE " + name
            )
        return Path(name)
    store = ImageNames(settings)
    digest = store.find(name)
    if digest is None:
        raise NotFoundError(
            f"image {name}: no index of it in {settings.index_store}",
            hint=f"make or fetch it: clipshim index {name}, clipshim pull {name}",
        )
    return Path(store.existing_path(digest))


def registry_name(settings: Settings, name: str) -> str:
    """The image's name, also where `name` is an index: what registry options are about."""
    if not is_index_file(name):
        return name
    with open_named(settings, name) as index:
        return index.reference


@contextmanager
def opened_or_made(
    settings: Settings,
    name: str,
    *,
    platform: str | None,
    access: RegistryAccess,
    quiet: bool,
) -> Iterator[tuple[Path, Index]]:
    """The index that `name` means; an image that has none here yet is indexed for the while."""
    if platform is None or is_index_file(name):
        try:
            path = path_of(settings, name)
        except NotFoundError:
            if is_index_file(name):
                raise
        else:
            with open_index(path) as index:
                yield path, index
            return
    from clipshim.index.builder import build_index
    from clipshim.registry.sources import open_source

    source = open_source(name, platform=platform, access=access)
    # /var/tmp: a self-contained index can be large, and /tmp is memory on many machines
    with tempfile.TemporaryDirectory(prefix="clipshim-", dir="/var/tmp") as directory:
        path = Path(directory, "index.clip")
        with progress_bars(quiet=quiet) as progress:
            build_index(source, path, progress=progress)
        with open_index(path) as index:
            yield path, index


@contextmanager
def destination(settings: Settings, output: Path | None) -> Iterator[Path]:
    """Where an index is to be written: `output`, or a passing file in the local store."""
    if output is not None:
        yield output
        return
    try:
        os.makedirs(settings.index_store, mode=0o700, exist_ok=True)
    except PermissionError as exc:
        raise StoreError(
            f"local store {settings.index_store}: {exc.strerror}",
            hint="run it as root, or name an OUTPUT.clip",
        ) from exc
    with tempfile.TemporaryDirectory(prefix=".new-", dir=settings.index_store) as directory:
        yield Path(directory, "index.clip")


def finish(settings: Settings, path: Path, reference: str, output: Path | None) -> Path:
    """The index's final path: as asked for, or in the local store under the image's name."""
    if output is not None:
        return output
    store = ImageNames(settings)
    return Path(store.adopt(str(path), reference))

"""Puts a stub into an engine of this machine, by the engine's own command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from clipshim.errors import ClipError, NotFoundError
from clipshim.registry.references import ArchiveReference, Reference, parse_image

if TYPE_CHECKING:
    from collections.abc import Callable

# engine: program, arguments before the archive, the kind of archive that it reads best
COMMANDS = {
    "docker": ("docker", ["load", "--quiet", "--input"], "docker-archive"),
    "podman": ("podman", ["load", "--quiet", "--input"], "docker-archive"),
    "containerd": ("ctr", ["images", "import"], "oci-archive"),
}
TIMEOUT_S = 600.0


def stub_name(reference: str) -> str:
    """What a stub of `reference` is called where the user gives no name: `app:1.0-lazy`."""
    image = parse_image(reference)
    if isinstance(image, ArchiveReference):
        base = re.sub(r"[^a-z0-9]+", "-", os.path.basename(image.path).lower()).strip("-")
        return f"localhost/{base or 'image'}:{image.tag or 'latest'}-lazy"
    return f"{image.name}:{image.tag or 'latest'}-lazy"


def same_registry(one: str, other: str) -> bool:
    """Whether two images lie in one registry: then one log-in is for both."""
    images = parse_image(one), parse_image(other)
    hosts = {image.registry if isinstance(image, Reference) else None for image in images}
    return len(hosts) == 1


def load(engine: str, write: Callable[[Path, str], None]) -> None:
    """Writes an archive (`write(path, kind)`) and has the engine load it.

    Raises NotFoundError without the engine's program, ClipError with what it said if it fails.
    """
    program, arguments, kind = COMMANDS[engine]
    path = shutil.which(program)
    if path is None:
        raise NotFoundError(
            f"{program}: not found", hint=f"install {engine}, or write an archive with -o FILE"
        )
    with tempfile.TemporaryDirectory(prefix="clipshim-") as directory:
        archive = Path(directory, "stub.tar")
        write(archive, kind)
        done = subprocess.run(
            [path, *arguments, str(archive)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
            env=os.environ,
        )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
        raise ClipError(f"{program} {arguments[0]}: {said}", hint=f"is {engine} running?")

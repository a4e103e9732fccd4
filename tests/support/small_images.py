"""Small images for engines: an empty one, and images whose layers are given as files.

As a full image or as its stub, by what the target runs. Not for tests of layers themselves.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from typing import TYPE_CHECKING, Any

from tests.support import images
from tests.support.images import Image

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.support.engine import Target

BLOB_BYTES = 3 << 20
# Several spans that do not compress: the same bytes on every run.
BLOB = b"".join(hashlib.sha256(i.to_bytes(4, "big")).digest() for i in range(BLOB_BYTES // 32))
BLOB_SHA256 = hashlib.sha256(BLOB).hexdigest()


def busybox_layer(target: Path) -> Path:
    """The layer of the tiny image, uncompressed."""
    tiny = images.tiny_image()
    (layer,) = tiny.manifest["layers"]
    target.write_bytes(gzip.decompress(tiny.blob(layer["digest"])))
    return target


def layer(
    target: Path, files: Mapping[str, bytes | str], owners: Mapping[str, int] | None = None
) -> Path:
    """A layer of directories (names with `/` at their end), files and links (text).

    What has an owner is his alone.
    """
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name.rstrip("/"))
            info.mtime = images.EPOCH
            info.uid = info.gid = (owners or {}).get(name, 0)
            private = 0o700 if info.uid else 0o777
            if isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
                tar.addfile(info)
            elif name.endswith("/"):
                info.type, info.mode = tarfile.DIRTYPE, 0o755 & private
                tar.addfile(info)
            else:
                info.size, info.mode = len(data), 0o644 & private
                tar.addfile(info, io.BytesIO(data))
    return target


def image(layout: Path, layers: Sequence[Path], **config: Any) -> Image:
    """An image of these layers, lowest first, with more keys of its configuration."""
    config = {"Env": ["PATH=/bin:/usr/bin"], "Cmd": ["sh"], **config}
    images.write_layout(layout, list(layers), "gzip", config)
    return Image(layout, "gzip")


def empty_image(directory: Path) -> Image:
    """An image with nothing to run in it: one empty directory."""
    directory.mkdir(parents=True)
    return image(directory / "oci", [layer(directory / "empty.tar", {"empty/": b""})])


def archive(target: Target, made: Image, reference: str, path: Path, name: str) -> Path:
    """A docker-archive of the image, or of a stub of `reference`, which is the same image."""
    if target.node is None:
        images.convert(made, f"docker-archive:{path}", name=name)
    else:
        target.node.clipshim(
            "stub", reference, "-o", path, "--archive-format", "docker-archive", "--name", name
        )
    return path


def add_layer(archive_path: Path, layer_path: Path, target: Path, name: str) -> Path:
    """A docker-archive of the image in another one with a layer on top."""
    layout = target.with_suffix(".oci")
    source, middle = f"docker-archive:{archive_path}", f"oci:{layout}:{images.TAG}"
    images.run("skopeo", "--insecure-policy", "copy", "-q", source, middle)
    images.run("umoci", "raw", "add-layer", "--image", f"{layout}:{images.TAG}", layer_path)
    images.run(
        "skopeo", "--insecure-policy", "copy", "-q", middle, f"docker-archive:{target}:{name}"
    )
    return target

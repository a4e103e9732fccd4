"""OCI layouts and archives made by hand, for tests of what reads them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"


def some_bytes(size: int, seed: int = 0) -> bytes:
    """Always the same bytes, which do not repeat."""
    return random.Random(seed).randbytes(size)


def layer_tar(name: str, content: bytes) -> bytes:
    """A tar stream with one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def digest_of(raw: bytes) -> str:
    """sha256:<hex>."""
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


@dataclass
class Layout:
    """An OCI image layout that grows; `write_index` makes it complete."""

    path: Path
    entries: list[dict[str, Any]] = field(default_factory=list)

    def blob(self, raw: bytes) -> str:
        """Stores a blob, returns its digest."""
        directory = self.path / "blobs/sha256"
        directory.mkdir(parents=True, exist_ok=True)
        digest = digest_of(raw)
        (directory / digest.removeprefix("sha256:")).write_bytes(raw)
        return digest

    def image(
        self,
        *tars: bytes,
        architecture: str = "amd64",
        variant: str | None = None,
        extra: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Stores an image of gzip layers; returns the descriptor of its manifest."""
        layers = []
        for tar in tars:
            raw = gzip.compress(tar, mtime=0)
            layers.append(
                {
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": self.blob(raw),
                    "size": len(raw),
                }
            )
        platform: dict[str, Any] = {"os": "linux", "architecture": architecture}
        if variant:
            platform["variant"] = variant
        config_raw = json.dumps(
            {
                **platform,
                "config": config or {"Cmd": ["/bin/true"]},
                "rootfs": {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]},
            }
        ).encode()
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": self.blob(config_raw),
                "size": len(config_raw),
            },
            "layers": layers,
            **(extra or {}),
        }
        return self.manifest(manifest) | {"platform": platform}

    def manifest(self, document: dict[str, Any], media_type: str = OCI_MANIFEST) -> dict[str, Any]:
        """Stores any manifest; returns its descriptor."""
        raw = json.dumps(document).encode()
        return {"mediaType": media_type, "digest": self.blob(raw), "size": len(raw)}

    def index_of(self, *descriptors: dict[str, Any]) -> dict[str, Any]:
        """Stores an image index over manifests; returns its descriptor."""
        return self.manifest(
            {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(descriptors)}, OCI_INDEX
        )

    def tag(self, descriptor: dict[str, Any], name: str | None = None) -> None:
        """Lists an image in index.json and writes that."""
        entry = dict(descriptor)
        if name is not None:
            entry["annotations"] = {"org.opencontainers.image.ref.name": name}
        self.entries.append(entry)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        (self.path / "index.json").write_text(
            json.dumps({"schemaVersion": 2, "manifests": self.entries})
        )

    def pack(self, archive: Path) -> Path:
        """The layout as an uncompressed archive."""
        with tarfile.open(archive, "w") as tar:
            for path in sorted(self.path.rglob("*")):
                tar.add(path, path.relative_to(self.path).as_posix(), recursive=False)
        return archive


def docker_archive(
    path: Path, tars: list[bytes], tags: list[str], *, compressed: bool = False
) -> Path:
    """What docker save writes."""
    config_raw = json.dumps(
        {
            "os": "linux",
            "architecture": "amd64",
            "rootfs": {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]},
        }
    ).encode()
    members = {"config.json": config_raw}
    names = []
    for number, tar in enumerate(tars):
        names.append(f"{number}/layer.tar")
        members[names[-1]] = gzip.compress(tar, mtime=0) if compressed else tar
    entry = {"Config": "config.json", "RepoTags": tags, "Layers": names}
    members["manifest.json"] = json.dumps([entry]).encode()
    with tarfile.open(path, "w") as archive:
        for name, raw in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return path

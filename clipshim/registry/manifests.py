"""Manifests of images: checked parsing, and the choice of a platform. No networking.

Formats: OCI image-spec (manifest.md, image-index.md) and Docker's schema 2. Everything here comes
from a registry, so every field is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clipshim.errors import BadReferenceError, DigestError, NotFoundError, RegistryError
from clipshim.registry.platforms import Platform, best_match, platform_of
from clipshim.registry.references import check_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
MANIFEST_TYPES = (OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST)

MAX_MANIFEST_BYTES = 4 << 20  # what the distribution specification asks registries to take
MAX_CONFIG_BYTES = 8 << 20
MAX_LAYERS = 4096
MAX_BLOB_BYTES = 1 << 50


@dataclass(frozen=True, slots=True)
class LayerDescriptor:
    """One layer as the manifest names it; `digest` and `size` are of the blob as stored."""

    digest: str
    size: int
    media_type: str
    urls: tuple[str, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageManifest:
    """A manifest of one image for one platform."""

    media_type: str
    config: LayerDescriptor
    layers: tuple[LayerDescriptor, ...]
    artifact_type: str = ""
    subject: str | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)


def digest_of(raw: bytes) -> str:
    """sha256:<hex> of `raw`."""
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def verify_digest(raw: bytes, expected: str, what: str) -> None:
    """Raises DigestError unless `raw` has the digest `expected`."""
    found = digest_of(raw)
    if found != expected:
        raise DigestError(f"{what}: expected digest {expected}, got {found}")


def load_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises RegistryError."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise RegistryError(f"{what}: expected JSON, got {raw[:40]!r}") from exc
    if not isinstance(document, dict):
        raise RegistryError(f"{what}: expected a JSON object")
    return document


def media_type_of(document: Mapping[str, Any], declared: str = "") -> str:
    """What kind of manifest a document is, by its own word, its server's, or its shape."""
    own = document.get("mediaType")
    if isinstance(own, str) and own:
        return own
    if document.get("schemaVersion") == 1:
        return "application/vnd.docker.distribution.manifest.v1+json"
    if isinstance(document.get("manifests"), list):
        return OCI_INDEX
    declared = declared.split(";")[0].strip()
    if declared in MANIFEST_TYPES:
        return declared
    return OCI_MANIFEST


def is_index(media_type: str) -> bool:
    """Whether a manifest lists others."""
    return media_type in (OCI_INDEX, DOCKER_LIST)


def parse_manifest(raw: bytes, what: str, declared: str = "") -> ImageManifest:
    """A manifest that is no index. Raises RegistryError."""
    document = load_json(raw, what)
    media_type = media_type_of(document, declared)
    if ".docker.distribution.manifest.v1+" in media_type or document.get("schemaVersion") == 1:
        raise RegistryError(
            f"{what}: Docker image manifest schema 1 is not supported",
            hint="push the image again with a current client, which converts it",
        )
    if media_type not in (OCI_MANIFEST, DOCKER_MANIFEST):
        raise RegistryError(f"{what}: expected an image manifest, got {media_type[:100]!r}")
    layers = document.get("layers")
    if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
        raise RegistryError(f"{what}: layers: expected a list of at most {MAX_LAYERS}")
    subject = document.get("subject")
    return ImageManifest(
        media_type=media_type,
        config=parse_descriptor(document.get("config"), f"{what}: config"),
        layers=tuple(
            parse_descriptor(item, f"{what}: layer {number}") for number, item in enumerate(layers)
        ),
        artifact_type=str(document.get("artifactType") or ""),
        subject=parse_descriptor(subject, f"{what}: subject").digest if subject else None,
        annotations=_texts(document.get("annotations")),
    )


def parse_descriptor(value: Any, what: str) -> LayerDescriptor:
    """A content descriptor (image-spec, descriptor.md). Raises RegistryError."""
    if not isinstance(value, dict):
        raise RegistryError(f"{what}: expected a descriptor")
    try:
        digest = check_digest(str(value.get("digest", "")))
    except BadReferenceError as exc:
        raise RegistryError(f"{what}: {exc.message}") from exc
    size = value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_BLOB_BYTES:
        raise RegistryError(f"{what}: expected a size, got {size!r}")
    media_type = value.get("mediaType")
    urls = value.get("urls")
    return LayerDescriptor(
        digest=digest,
        size=size,
        media_type=media_type if isinstance(media_type, str) else "",
        urls=tuple(url for url in urls if isinstance(url, str)) if isinstance(urls, list) else (),
        annotations=_texts(value.get("annotations")),
    )


def choose_platform(
    raw: bytes, wanted: Platform, what: str, *, lenient: bool = False
) -> LayerDescriptor:
    """The manifest in an image index for a platform. Attestations are not images.

    `lenient` takes the only image there is whatever its platform (local archives are often
    labelled badly). Raises NotFoundError naming what the index has.
    """
    document = load_json(raw, what)
    listed = document.get("manifests")
    if not isinstance(listed, list) or len(listed) > MAX_LAYERS:
        raise RegistryError(f"{what}: manifests: expected a list of at most {MAX_LAYERS}")
    images: list[LayerDescriptor] = []
    platforms: list[Platform | None] = []
    for number, item in enumerate(listed):
        if _is_attestation(item):
            continue
        images.append(parse_descriptor(item, f"{what}: manifest {number}"))
        fields = item.get("platform")
        platforms.append(platform_of(fields) if isinstance(fields, dict) else None)
    known = [(place, item) for place, item in enumerate(platforms) if item is not None]
    best = best_match(wanted, [item for _, item in known])
    if best is not None:
        return images[known[best][0]]
    if len(images) == 1 and (lenient or platforms[0] is None):
        return images[0]
    offered = ", ".join(sorted({str(item) for _, item in known})) or "none"
    raise NotFoundError(
        f"{what}: expected platform {wanted}, got only {offered}",
        hint="choose one with --platform",
    )


def _is_attestation(item: Any) -> bool:
    if not isinstance(item, dict):
        return False
    annotations = item.get("annotations")
    if isinstance(annotations, dict) and "vnd.docker.reference.type" in annotations:
        return True
    fields = item.get("platform")
    if not isinstance(fields, dict):
        return False
    return fields.get("os") == "unknown" and fields.get("architecture") == "unknown"


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        return {}
    return {str(key): item for key, item in value.items() if isinstance(item, str)}

"""Images as the indexer sees them: manifest, config and the stream of each layer.

`open_source` finds one image for one platform, in a registry or in a local directory or archive,
and verifies manifest and config against their digests. The bytes of layers come unverified, as
stored: whoever reads them hashes them, or wraps the stream in `VerifiedStream`.
"""

from __future__ import annotations

import hashlib
import io
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

from clipshim.errors import DigestError, NotFoundError, RegistryError
from clipshim.registry.attempts import AttemptFailed, RegistryNotFoundError
from clipshim.registry.blobs import BlobReader, BlobRef, RegistryBlob
from clipshim.registry.manifests import (
    DOCKER_CONFIG,
    MANIFEST_TYPES,
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    OCI_CONFIG,
    ImageManifest,
    LayerDescriptor,
    choose_platform,
    digest_of,
    is_index,
    load_json,
    media_type_of,
    parse_manifest,
    verify_digest,
)
from clipshim.registry.platforms import (
    Platform,
    host_platform,
    parse_platform,
    platform_of,
    rank,
)
from clipshim.registry.references import (
    ArchiveReference,
    Reference,
    canonical_image,
    parse_image,
)
from clipshim.registry.replies import read_body

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from clipshim.registry.access import RegistryAccess
    from clipshim.registry.mirrors import Endpoint

__all__ = [
    "FetchedManifest",
    "ImageSource",
    "LayerDescriptor",
    "VerifiedStream",
    "fetch_manifest",
    "open_source",
    "resolve_manifest_digest",
]

MAX_INDEX_DEPTH = 3
MANIFEST_ATTEMPTS = 5


class ImageSource(Protocol):
    """One image for one platform, wherever it lies."""

    @property
    def reference(self) -> str:
        """Canonical name, with the tag or digest that was asked for."""
        ...

    @property
    def manifest_digest(self) -> str:
        """Digest of the platform's own manifest."""
        ...

    @property
    def platform(self) -> str:
        """os/architecture[/variant]."""
        ...

    @property
    def config_raw(self) -> bytes:
        """The image config as stored."""
        ...

    @property
    def manifest_raw(self) -> bytes:
        """The manifest as stored."""
        ...

    @property
    def layers(self) -> Sequence[LayerDescriptor]:
        """The lowest first."""
        ...

    def open_layer(self, i: int) -> AbstractContextManager[BinaryIO]:
        """The stored blob of layer `i` from byte 0: read(n). The READER verifies the digest.

        Interruptions are retried and continued inside; reading may raise RegistryError.
        """
        ...


@dataclass(frozen=True, slots=True)
class FetchedManifest:
    """A manifest with the very bytes that its digest is of."""

    raw: bytes
    media_type: str
    digest: str


def open_source(image: str, *, platform: str | None, access: RegistryAccess) -> ImageSource:
    """Finds `image` (registry reference, oci:, oci-archive:, docker-archive:) for `platform`.

    `platform` is os/architecture[/variant]; None takes this machine's. Raises BadReferenceError,
    NotFoundError (no such image, or not for this platform), AuthError, RegistryError,
    DigestError.
    """
    wanted = parse_platform(platform) if platform else host_platform()
    parsed = parse_image(image)
    reader = BlobReader(access, transport=access.transport)
    if isinstance(parsed, ArchiveReference):
        return _open_local(image, parsed, wanted, reader, explicit=platform is not None)
    return _open_remote(parsed, wanted, access, reader, explicit=platform is not None)


def fetch_manifest(
    access: RegistryAccess,
    reference: Reference,
    version: str | None = None,
    *,
    accept: tuple[str, ...] = MANIFEST_TYPES,
) -> FetchedManifest:
    """The manifest or image index at `version` (tag or digest; None is the reference's own).

    A digest is verified on the raw bytes. Raises RegistryNotFoundError, AuthError, RegistryError.
    """
    named = version or reference.version
    transport = access.transport
    what = f"image {reference}"

    deadline = time.monotonic() + access.deadline_s

    def operation(endpoint: Endpoint) -> FetchedManifest:
        with transport.send(
            endpoint,
            reference,
            "GET",
            f"{reference.repository}/manifests/{named}",
            headers={"Accept": ", ".join(accept)},
            deadline=deadline,
        ) as reply:
            raw = read_body(reply, MAX_MANIFEST_BYTES, deadline, access.read_timeout_s)
            declared = reply.headers.get("Content-Type", "")
        digest = digest_of(raw)
        if named.startswith("sha256:") and digest != named:
            raise AttemptFailed(
                "wrong-digest",
                f"manifest: expected digest {named}, got {digest}",
                retryable=False,
            )
        try:
            media_type = media_type_of(load_json(raw, what), declared)
        except RegistryError as exc:
            raise AttemptFailed("protocol", exc.message, retryable=False) from exc
        return FetchedManifest(raw, media_type, digest)

    return transport.exchange(
        reference,
        operation,
        # A mirror that may pull but not resolve must not be asked what a tag is.
        capability="pull" if named.startswith("sha256:") else "resolve",
        what=what,
        deadline=deadline,
        attempts=MANIFEST_ATTEMPTS,
    )


def resolve_manifest_digest(
    image: str, *, platform: str | None, access: RegistryAccess
) -> tuple[Reference, FetchedManifest]:
    """The registry image's platform manifest, without its config. Raises as open_source."""
    wanted = parse_platform(platform) if platform else host_platform()
    parsed = parse_image(image)
    if isinstance(parsed, ArchiveReference):
        raise RegistryError(f"image {image}: expected an image in a registry")
    return parsed, _resolve(parsed, wanted, access)


def _resolve(reference: Reference, wanted: Platform, access: RegistryAccess) -> FetchedManifest:
    try:
        found = fetch_manifest(access, reference)
    except RegistryNotFoundError as exc:
        raise NotFoundError(exc.message, hint=exc.hint) from exc
    for _ in range(MAX_INDEX_DEPTH):
        if not is_index(found.media_type):
            return found
        chosen = choose_platform(found.raw, wanted, f"image {reference}")
        found = fetch_manifest(access, reference, chosen.digest)
    raise RegistryError(f"image {reference}: more than {MAX_INDEX_DEPTH} image indexes in a row")


def _open_remote(
    reference: Reference,
    wanted: Platform,
    access: RegistryAccess,
    reader: BlobReader,
    *,
    explicit: bool,
) -> _Source:
    found = _resolve(reference, wanted, access)
    manifest = parse_manifest(found.raw, f"image {reference}", found.media_type)
    _check_is_image(manifest, str(reference))

    def blob(layer: LayerDescriptor) -> BlobRef:
        return RegistryBlob(reference, layer.digest, layer.size, layer.urls)

    config_raw = _read_config(manifest, str(reference), lambda item: reader.open_stream(blob(item)))
    return _Source(
        str(reference), found.raw, found.digest, manifest, config_raw,
        lambda layer: reader.open_stream(blob(layer)), wanted, explicit=explicit,
    )  # fmt: skip


def _open_local(
    text: str,
    image: ArchiveReference,
    wanted: Platform,
    reader: BlobReader,
    *,
    explicit: bool,
) -> _Source:
    from clipshim.registry.archives import open_archive  # only for local images

    local = open_archive(image)
    raw, declared = local.manifest()
    what = f"image {image}"
    media_type = media_type_of(load_json(raw, what), declared)
    for _ in range(MAX_INDEX_DEPTH):
        if not is_index(media_type):
            break
        chosen = choose_platform(raw, wanted, what, lenient=not explicit)
        raw = local.read(chosen.digest, MAX_MANIFEST_BYTES)
        media_type = media_type_of(load_json(raw, what), chosen.media_type)
    manifest = parse_manifest(raw, what, media_type)
    _check_is_image(manifest, str(image))
    config_raw = local.read(manifest.config.digest, MAX_CONFIG_BYTES)
    return _Source(
        canonical_image(text), raw, digest_of(raw), manifest, config_raw,
        lambda layer: reader.open_stream(local.locate(layer.digest)), wanted, explicit=explicit,
    )  # fmt: skip


def _check_is_image(manifest: ImageManifest, name: str) -> None:
    kind = manifest.config.media_type
    if manifest.artifact_type or kind not in (OCI_CONFIG, DOCKER_CONFIG, ""):
        raise RegistryError(
            f"image {name}: expected a container image, got an artifact of type "
            f"{(manifest.artifact_type or kind)[:100]!r}"
        )


def _read_config(
    manifest: ImageManifest, name: str, open_blob: Callable[[LayerDescriptor], BinaryIO]
) -> bytes:
    config = manifest.config
    if config.size > MAX_CONFIG_BYTES:
        raise RegistryError(
            f"image {name}: config: expected at most {MAX_CONFIG_BYTES} bytes, got {config.size}"
        )
    with open_blob(config) as stream:
        raw = stream.read()
    verify_digest(raw, config.digest, f"image {name}: config")
    return raw


class _Source:
    """The one implementation of ImageSource; where blobs lie is the opener's business."""

    def __init__(
        self,
        reference: str,
        manifest_raw: bytes,
        manifest_digest: str,
        manifest: ImageManifest,
        config_raw: bytes,
        opener: Callable[[LayerDescriptor], BinaryIO],
        wanted: Platform,
        *,
        explicit: bool,
    ) -> None:
        self.reference = reference
        self.manifest_raw = manifest_raw
        self.manifest_digest = manifest_digest
        self.config_raw = config_raw
        self.layers: Sequence[LayerDescriptor] = manifest.layers
        self._opener = opener
        found = platform_of(load_json(config_raw, f"image {reference}: config"))
        self.platform = str(found)
        if explicit and rank(wanted, found) is None:
            raise NotFoundError(f"image {reference}: expected platform {wanted}, got only {found}")

    def open_layer(self, i: int) -> AbstractContextManager[BinaryIO]:
        return cast("AbstractContextManager[BinaryIO]", self._opener(self.layers[i]))


class VerifiedStream(io.RawIOBase):
    """Reads another stream and raises DigestError at its end unless digest and size are right."""

    def __init__(self, stream: BinaryIO, digest: str, size: int, what: str = "blob") -> None:
        self._stream = stream
        self._expected = digest
        self._size = size
        self._what = what
        self._hash = hashlib.sha256()
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        piece = self._stream.read(len(buffer))
        if not piece:
            found = f"sha256:{self._hash.hexdigest()}"
            if found != self._expected or self._count != self._size:
                raise DigestError(
                    f"{self._what}: expected {self._size} bytes with digest {self._expected}, "
                    f"got {self._count} with {found}"
                )
            return 0
        self._hash.update(piece)
        self._count += len(piece)
        buffer[: len(piece)] = piece
        return len(piece)

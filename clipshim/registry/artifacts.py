"""Indexes in registries: artifacts that refer to the image they belong to.

An index is the one layer of an OCI manifest with `artifactType`, the empty config, and the
platform's manifest as `subject`, so that the image's own name is enough to find it. Registries
with the referrers API list it; for others it is listed at the tag sha256-<hex> of the subject
(distribution-spec, "Listing Referrers" and "Referrers Tag Schema"). What an index holds is not
looked at: who uses it checks it, and that it is of the image asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clipshim.errors import NotFoundError, RegistryError
from clipshim.registry.attempts import RegistryNotFoundError
from clipshim.registry.blobs import BlobReader, RegistryBlob
from clipshim.registry.manifests import (
    MAX_MANIFEST_BYTES,
    OCI_EMPTY,
    OCI_INDEX,
    OCI_MANIFEST,
    LayerDescriptor,
    digest_of,
    load_json,
    parse_descriptor,
    parse_manifest,
)
from clipshim.registry.references import ArchiveReference, Reference, check_digest, parse_image
from clipshim.registry.replies import read_body
from clipshim.registry.sources import VerifiedStream, fetch_manifest, resolve_manifest_digest

if TYPE_CHECKING:
    from clipshim.registry.access import RegistryAccess
    from clipshim.registry.mirrors import Endpoint
    from clipshim.registry.oras_client import PushClient

ARTIFACT_TYPE = "application/vnd.clipshim.index.v1"
INDEX_MEDIA_TYPE = "application/vnd.clipshim.index.v1+clip"
CREATED = "org.opencontainers.image.created"
TITLE = "org.opencontainers.image.title"
EMPTY_CONFIG = b"{}"
MAX_INDEX_BYTES = 64 << 20
MAX_REFERRERS = 1000
TAG_ATTEMPTS = 4  # others may write the same fallback tag at the same time
COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class IndexArtifact:
    """An index that a registry has for an image."""

    reference: Reference  # of the image
    subject: str  # digest of the platform's manifest
    manifest_digest: str  # of the artifact
    index: LayerDescriptor  # the .clip file


def push_index(
    index_path: str | os.PathLike[str],
    image: str,
    *,
    access: RegistryAccess,
    manifest_digest: str | None = None,
    platform: str | None = None,
) -> str:
    """Stores an index beside its image; returns the digest of the artifact's manifest.

    `manifest_digest` is what the index says it was made of; without it the manifest that `image`
    has for `platform` (None: this machine's) is taken. Pushing again what is there changes
    nothing. Raises NotFoundError if the repository has no such manifest, RegistryError, AuthError.
    """
    from clipshim.registry.oras_client import PushClient, opener_of  # oras: 120 ms

    reference = _registry_reference(image)
    if manifest_digest is None:
        _, subject = resolve_manifest_digest(image, platform=platform, access=access)
    else:
        try:
            subject = fetch_manifest(access, reference, check_digest(manifest_digest))
        except RegistryNotFoundError as exc:
            raise NotFoundError(
                f"image {reference}: the index is of manifest {manifest_digest}, which "
                f"{reference.name} does not have",
                hint="push the image there first, or name the image that was indexed",
            ) from exc
    size, digest = _measure(index_path)
    for known in list_indexes(access, reference, subject.digest):
        if known.index.digest == digest:
            return known.manifest_digest
    client = PushClient(access, reference)
    client.push_blob(opener_of(index_path), digest, size)
    client.push_bytes(EMPTY_CONFIG)
    annotations = {CREATED: _now()}
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "config": _descriptor(OCI_EMPTY, digest_of(EMPTY_CONFIG), len(EMPTY_CONFIG)),
        "layers": [
            _descriptor(INDEX_MEDIA_TYPE, digest, size) | {"annotations": {TITLE: "index.clip"}}
        ],
        "subject": _descriptor(subject.media_type, subject.digest, len(subject.raw)),
        "annotations": annotations,
    }
    raw = json.dumps(document, separators=(",", ":")).encode()
    own_digest = digest_of(raw)
    answer = client.push_manifest(raw, OCI_MANIFEST, own_digest)
    if answer.headers.get("OCI-Subject") != subject.digest:
        entry = _descriptor(OCI_MANIFEST, own_digest, len(raw))
        entry |= {"artifactType": ARTIFACT_TYPE, "annotations": annotations}
        _add_to_tag(client, access, reference, subject.digest, entry)
    return own_digest


def find_index(image: str, *, platform: str | None, access: RegistryAccess) -> IndexArtifact | None:
    """The newest index that the registry has for `image` on `platform` (None: this machine's).

    Raises NotFoundError if the image itself is not there, RegistryError, AuthError.
    """
    reference, subject = resolve_manifest_digest(image, platform=platform, access=access)
    found = list_indexes(access, reference, subject.digest)
    return found[0] if found else None


def pull_index(
    image: str,
    destination: str | os.PathLike[str],
    *,
    platform: str | None,
    access: RegistryAccess,
    max_bytes: int = MAX_INDEX_BYTES,
) -> str:
    """Fetches the newest index of `image` into the file `destination`, whole or not at all.

    Returns the path. Raises NotFoundError if there is none, DigestError, RegistryError,
    AuthError; an index larger than `max_bytes` is refused.
    """
    artifact = find_index(image, platform=platform, access=access)
    if artifact is None:
        raise NotFoundError(
            f"image {image}: the registry has no index of it",
            hint=f"make one: clipshim index {image}, and share it: clipshim push",
        )
    wanted = artifact.index
    what = f"index of {image}"
    if wanted.size > max_bytes:
        raise RegistryError(f"{what}: expected at most {max_bytes} bytes, got {wanted.size}")
    reader = BlobReader(access, transport=access.transport)
    blob = RegistryBlob(artifact.reference, wanted.digest, wanted.size)
    target = os.fspath(destination)
    directory = os.path.dirname(target) or "."
    fd, temporary = tempfile.mkstemp(prefix=".pull-", dir=directory)
    try:
        with os.fdopen(fd, "wb") as file, reader.open_stream(blob) as stream:
            verified = VerifiedStream(stream, wanted.digest, wanted.size, what)
            while piece := verified.read(COPY_BYTES):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return target


def list_indexes(access: RegistryAccess, reference: Reference, subject: str) -> list[IndexArtifact]:
    """All indexes that refer to the manifest `subject`, newest first; broken ones are left out."""
    found: list[tuple[str, IndexArtifact]] = []
    for entry in _referrers(access, reference, subject):
        artifact_type = entry.get("artifactType")
        if artifact_type not in (ARTIFACT_TYPE, None):
            continue
        try:
            listed = parse_descriptor(entry, "referrer")
            artifact = _artifact(access, reference, subject, listed)
        except (RegistryError, NotFoundError):
            continue  # one bad entry must not hide the others
        if artifact is not None:
            found.append(artifact)
    found.sort(key=lambda item: (item[0], item[1].manifest_digest), reverse=True)
    return [artifact for _, artifact in found]


def _artifact(
    access: RegistryAccess, reference: Reference, subject: str, listed: LayerDescriptor
) -> tuple[str, IndexArtifact] | None:
    """Reads what a list only claims: type, subject, and exactly one layer of our type."""
    fetched = fetch_manifest(access, reference, listed.digest, accept=(OCI_MANIFEST,))
    manifest = parse_manifest(fetched.raw, f"referrer {listed.digest}", fetched.media_type)
    if manifest.artifact_type != ARTIFACT_TYPE or manifest.subject != subject:
        return None
    if len(manifest.layers) != 1 or manifest.layers[0].media_type != INDEX_MEDIA_TYPE:
        return None
    artifact = IndexArtifact(reference, subject, fetched.digest, manifest.layers[0])
    return manifest.annotations.get(CREATED, ""), artifact


def _referrers(access: RegistryAccess, reference: Reference, subject: str) -> list[dict[str, Any]]:
    """Descriptors from the referrers API, or from the fallback tag where there is none."""
    listed = _from_api(access, reference, subject)
    if listed is None:
        listed = _from_tag(access, reference, subject)
    return listed


def _from_api(
    access: RegistryAccess, reference: Reference, subject: str
) -> list[dict[str, Any]] | None:
    transport = access.transport
    path = f"{reference.repository}/referrers/{check_digest(subject)}"
    query = "artifactType=application%2Fvnd.clipshim.index.v1"

    def operation(endpoint: Endpoint) -> bytes | None:
        deadline = time.monotonic() + access.deadline_s
        with transport.send(
            endpoint,
            reference,
            "GET",
            f"{path}?{query}",
            headers={"Accept": OCI_INDEX},
            deadline=deadline,
            # All of these are how registries without the API answer.
            accept=(200, 400, 404, 405, 406, 501),
        ) as reply:
            kind = reply.headers.get("Content-Type", "").split(";")[0].strip()
            if reply.status != 200 or kind != OCI_INDEX:
                return None
            return read_body(reply, MAX_MANIFEST_BYTES, deadline, access.read_timeout_s)

    raw = transport.exchange(
        reference, operation, capability="resolve", what=f"referrers of {reference}", attempts=5
    )
    return None if raw is None else _entries(raw, f"referrers of {reference}")


def _from_tag(access: RegistryAccess, reference: Reference, subject: str) -> list[dict[str, Any]]:
    try:
        found = fetch_manifest(access, reference, fallback_tag(subject), accept=(OCI_INDEX,))
    except RegistryNotFoundError:
        return []
    return _entries(found.raw, f"referrers of {reference}")


def fallback_tag(subject: str) -> str:
    """The tag that lists referrers of a manifest where the API is missing."""
    return check_digest(subject).replace(":", "-")


def _entries(raw: bytes, what: str) -> list[dict[str, Any]]:
    listed = load_json(raw, what).get("manifests")
    if not isinstance(listed, list):
        return []
    return [item for item in listed[:MAX_REFERRERS] if isinstance(item, dict)]


def _add_to_tag(
    client: PushClient,
    access: RegistryAccess,
    reference: Reference,
    subject: str,
    entry: dict[str, Any],
) -> None:
    """Read, add, write, and look again: the protocol has no compare-and-swap."""
    for _ in range(TAG_ATTEMPTS):
        entries = _from_tag(access, reference, subject)
        if any(item.get("digest") == entry["digest"] for item in entries):
            return
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [*entries, entry],
        }
        raw = json.dumps(document, separators=(",", ":")).encode()
        client.push_manifest(raw, OCI_INDEX, fallback_tag(subject))
    raise RegistryError(
        f"image {reference}: tag {fallback_tag(subject)} keeps changing under us",
        hint="push again when nobody else pushes indexes of this image",
    )


def _now() -> str:
    """RFC 3339 in UTC, always as long, so that text order is time order."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds:09d}Z"


def _descriptor(media_type: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size}


def _measure(path: str | os.PathLike[str]) -> tuple[int, str]:
    hashed = hashlib.sha256()
    size = 0
    try:
        with open(path, "rb") as file:
            while piece := file.read(COPY_BYTES):
                hashed.update(piece)
                size += len(piece)
    except OSError as exc:
        raise NotFoundError(f"index {os.fspath(path)}: {exc.strerror}") from exc
    return size, f"sha256:{hashed.hexdigest()}"


def _registry_reference(image: str) -> Reference:
    parsed = parse_image(image)
    if isinstance(parsed, ArchiveReference):
        raise RegistryError(f"image {image}: expected an image in a registry")
    return parsed

"""Byte ranges of blobs, wherever they lie: registry, mirror, foreign URL, local file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipshim.registry.access import RegistryAccess
    from clipshim.registry.references import Reference


@dataclass(frozen=True, slots=True)
class RegistryBlob:
    """A blob of a repository; `urls` are further sources, as foreign layers have them."""

    reference: Reference
    digest: str
    size: int
    urls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FileBlob:
    """A blob that lies in a local file, whole, from `offset`: layout, archive, embedded blob."""

    path: str
    offset: int
    size: int


BlobRef = RegistryBlob | FileBlob


def locate_blob(reference: str, digest: str, size: int, urls: tuple[str, ...] = ()) -> BlobRef:
    """Where the blob of an image named by an index's `reference` (and layer's blob_digest) lies."""
    raise NotImplementedError


class BlobReader:
    """Ranged reads. Blocking and thread-safe; one for all images under the same access."""

    def __init__(self, access: RegistryAccess) -> None:
        raise NotImplementedError

    def read_range(self, blob: BlobRef, start: int, length: int, *, deadline: float) -> bytes:
        """Exactly `length` bytes of the stored blob from byte `start`, by `deadline` (monotonic).

        Raises RegistryError (AuthError for refusals) naming blob, range, host and cause.
        """
        raise NotImplementedError

    def statistics(self) -> dict[str, object]:
        """Counters: requests, bytes, retries ({cause: count}), failures."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends waiting readers with an error and drops the connections."""
        raise NotImplementedError

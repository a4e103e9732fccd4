"""Images as the indexer sees them: manifest, config and the stream of each layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from clipshim.registry.access import RegistryAccess


@dataclass(frozen=True, slots=True)
class LayerDescriptor:
    """One layer as the manifest names it; `digest` and `size` are of the blob as stored."""

    digest: str
    size: int
    media_type: str
    urls: tuple[str, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)


class ImageSource(Protocol):
    """One image for one platform, wherever it lies."""

    reference: str  # canonical name: for a registry with the tag asked for
    manifest_digest: str
    platform: str  # os/architecture[/variant]
    config_raw: bytes
    manifest_raw: bytes
    layers: Sequence[LayerDescriptor]

    def open_layer(self, i: int) -> AbstractContextManager[BinaryIO]:
        """The stored blob of layer `i` from byte 0: read(n). The reader verifies the digest."""
        ...


def open_source(image: str, *, platform: str | None, access: RegistryAccess) -> ImageSource:
    """Finds `image` (registry reference, oci:, oci-archive:, docker-archive:) for `platform`.

    `platform` None takes this machine's. Raises BadReferenceError, NotFoundError, RegistryError.
    """
    raise NotImplementedError

"""Where the compressed bytes of one layer come from: a registry, a local file, the index itself.

Not for decoding or verifying: a source is trusted with nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from clipshim.errors import LayerError

if TYPE_CHECKING:
    from clipshim.index.model import Index, Span
    from clipshim.registry.blobs import BlobReader, BlobRef


class SpanSource(Protocol):
    """Compressed ranges and windows of one layer. Called in threads, several at a time.

    `name` tells the user what it is; `service` is what can be dead as a whole (a registry's
    host): sources of the same service share slots and a circuit breaker.
    """

    @property
    def name(self) -> str: ...

    @property
    def service(self) -> str: ...

    def fetch(self, start: int, length: int, deadline: float, *, hurried: bool = False) -> bytes:
        """Exactly `length` stored bytes from `start`; `deadline` is time.monotonic() based.

        `hurried`: there is another source, so one that keeps silent is given up after seconds.
        Raises ClipError with the cause, or OSError.
        """
        ...

    def window(self, span: Span) -> bytes | None:
        """The window that decoding of `span` starts with, from the index."""
        ...

    def distrust(self) -> None:
        """Tells that what was fetched was wrong: the next fetch asks another server, if any."""
        ...


class BlobSource:
    """A layer's blob as an image's registry (or local archive) stores it."""

    def __init__(
        self, index: Index, layer: int, blobs: BlobReader, blob: BlobRef, service: str
    ) -> None:
        self.name = index.reference
        self.service = service
        self._index = index
        self._layer = layer
        self._blobs = blobs
        self._blob = blob

    def fetch(self, start: int, length: int, deadline: float, *, hurried: bool = False) -> bytes:
        """See SpanSource."""
        return self._blobs.read_range(self._blob, start, length, deadline=deadline, hurried=hurried)

    def window(self, span: Span) -> bytes | None:
        """See SpanSource."""
        return self._index.window(self._layer, span)

    def distrust(self) -> None:
        """See SpanSource."""
        self._blobs.distrust(self._blob)


class EmbeddedSource:
    """A layer's blob inside a self-contained index."""

    def __init__(self, index: Index, layer: int) -> None:
        self.name = f"{index.reference} (embedded)"
        self.service = f"index {index.digest}"
        self._index = index
        self._layer = layer

    def fetch(self, start: int, length: int, deadline: float, *, hurried: bool = False) -> bytes:
        """See SpanSource."""
        del deadline, hurried  # a local file
        fd, offset, size = self._index.blob(self._layer)
        if start < 0 or start + length > size:
            raise LayerError(
                f"{self.name}: layer {self._layer}: expected bytes {start}+{length},"
                f" got a blob of {size}"
            )
        data = os.pread(fd, length, offset + start)
        if len(data) != length:
            raise LayerError(f"{self.name}: layer {self._layer}: the index file is too short")
        return data

    def window(self, span: Span) -> bytes | None:
        """See SpanSource."""
        return self._index.window(self._layer, span)

    def distrust(self) -> None:
        """See SpanSource."""
        # There is no other server.

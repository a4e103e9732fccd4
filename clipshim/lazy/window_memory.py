"""Memory for large zstd windows, shared by all fetches of a server.

A decoder keeps the last `window` bytes that it made, up to 128 MiB, and a hostile layer can say
that it needs them. What is usual (SMALL_WINDOW) belongs to what a fetch is known to need
(span_fetch.py); more than that is taken from here, in the thread that decodes, when its frame
turns out to want it. Nobody who holds some waits for other memory, so that all get on.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

from clipshim.errors import LayerError
from clipshim.index.span_decode import ZSTD_MAX_WINDOW

if TYPE_CHECKING:
    from collections.abc import Iterator


class WindowMemory:
    """An amount of memory that threads wait for. Thread-safe."""

    def __init__(self, total: int = ZSTD_MAX_WINDOW, *, patience_s: float = 60.0) -> None:
        self.total = total
        self.free = total
        self._patience_s = patience_s
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Holds `size` bytes (or all there are) in the block. Raises LayerError after a while."""
        size = min(size, self.total)
        until = time.monotonic() + self._patience_s
        with self._changed:
            while self.free < size:
                if not self._changed.wait(max(0.0, until - time.monotonic())):
                    raise LayerError(
                        f"no memory for a zstd window of {size} bytes: others decode such layers",
                        hint="layers made without --long or --ultra need less",
                    )
            self.free -= size
        try:
            yield
        finally:
            with self._changed:
                self.free += size
                self._changed.notify_all()

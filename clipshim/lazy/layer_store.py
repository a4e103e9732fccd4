"""The layer store: a content-addressed cache of spans on disk, bounded, safe against crashes.

    <directory>/              0700
        <layer key>/          see stored_layer.py

One process owns it at a time. A layer is *open* while somebody reads it through the server,
*pinned* while something reads its data file behind our back (a tree served from it), else *idle*.
Idle layers leave as a whole, least recently used first; of open ones single spans leave; pinned
ones stay. Not for fetching or verifying: callers put only spans whose digest they checked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipshim.errors import StoreError, remedy
from clipshim.lazy.eviction import (
    IdleLayer,
    IdleSpan,
    bytes_to_free,
    choose_layers,
    choose_spans,
)
from clipshim.lazy.layer_files import remove_layer
from clipshim.lazy.open_files import OpenFiles, raise_descriptor_limit
from clipshim.lazy.stored_layer import StoredLayer, StoreFullError

if TYPE_CHECKING:
    from clipshim.index.model import LayerInfo
    from clipshim.lazy.stored_layer import Spans

log = logging.getLogger(__name__)

RETRY_ROOM_S = 1.0  # after an eviction freed too little, before the next one is tried
REFUSED_BYTES = 4 << 20  # that are evicted when a quota is used up
OTHER_DESCRIPTORS = 512  # sockets, mounts, threads of the same process


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """Sizes in bytes; the rest counts since the start."""

    layers: int
    open_layers: int
    complete_layers: int
    used_bytes: int
    limit_bytes: int
    evicted_bytes: int
    full: int  # spans that were not cached for lack of room
    resets: int  # layers found corrupt and started anew
    suspects_good: int
    suspects_bad: int


class LayerStore:
    """All layers of a node. Thread-safe; everything but open layers' reads may block."""

    def __init__(
        self,
        directory: str,
        *,
        limit_bytes: int,
        min_free_bytes: int = 0,
        max_open: int | None = None,
        boot_id: str | None = None,
    ) -> None:
        """Finds what is there. Raises StoreError if the directory cannot be used."""
        self.directory = directory
        self.limit_bytes = limit_bytes
        self.min_free_bytes = min_free_bytes
        self.boot_id = boot_id if boot_id is not None else _boot_id()
        descriptors = raise_descriptor_limit()
        self.files = OpenFiles(max_open or max(16, min(8192, descriptors - OTHER_DESCRIPTORS)))
        self._open: dict[str, StoredLayer] = {}
        self._idle: dict[str, IdleLayer] = {}
        self._used = 0
        self._counts: dict[str, int] = {}
        self._no_room_until = 0.0
        self._refused_until = 0.0
        self._lock = threading.Lock()  # of the fields; innermost
        self._evicting = threading.Lock()
        self._opening = threading.RLock()
        try:
            os.makedirs(directory, 0o700, exist_ok=True)
            self._scan()
        except OSError as exc:
            raise StoreError(f"layer store {directory}: {exc.strerror}", hint=remedy(exc)) from exc

    # -- layers

    def open(self, layer: LayerInfo, spans: Spans) -> StoredLayer:
        """The stored layer, the same object for the same key; release() it when done with."""
        if not _is_key(layer.key):
            raise StoreError(f"layer key {layer.key!r}: not a layer key")
        with self._opening:
            stored = self._open.get(layer.key)
            if stored is None:
                stored = StoredLayer(self._path(layer.key), layer.key, layer.size, spans, self)
                with self._lock:
                    idle = self._idle.pop(layer.key, None)
                    self._used += stored.used_bytes - (idle.size if idle else 0)
                    self._open[layer.key] = stored
            stored.readers += 1
            return stored

    def release(self, key: str) -> None:
        """Undoes one open(). The layer stays on disk until eviction needs its place."""
        with self._opening:
            stored = self._open.get(key)
            if stored is None:
                return
            stored.readers -= 1
            if stored.readers <= 0 and not stored.pins:
                self._make_idle(stored)

    def pin(self, key: str) -> None:
        """The data file of an open layer is used directly: nothing of it may be evicted."""
        with self._opening:
            stored = self._open.get(key)
            if stored is None:
                raise StoreError(f"layer {key}: not open")
            stored.pins += 1

    def unpin(self, key: str) -> None:
        """Undoes one pin()."""
        with self._opening:
            stored = self._open.get(key)
            if stored is None or not stored.pins:
                return
            stored.pins -= 1
            if stored.readers <= 0 and not stored.pins:
                self._make_idle(stored)

    def remove(self, key: str) -> int:
        """Deletes an idle layer. Returns the bytes freed, 0 if it is open or unknown."""
        with self._opening:
            with self._lock:
                idle = self._idle.pop(key, None)
                if idle is None:
                    return 0
                self._used -= idle.size
            remove_layer(self._path(key), self.files)
            return idle.size

    def keys(self) -> list[str]:
        """All layers, open and idle."""
        with self._lock:
            return [*self._open, *self._idle]

    def get(self, key: str) -> StoredLayer | None:
        """An open layer."""
        return self._open.get(key)

    # -- room

    def reserve(self, size: int) -> None:
        """Accounts for bytes about to be written. Raises StoreFullError if there is no room."""
        if not self._fits(size):
            now = time.monotonic()
            if now >= self._no_room_until:
                self.make_room(size)
                if not self._fits(size):
                    self._no_room_until = now + RETRY_ROOM_S
                    log.warning(
                        "layer store %s is full: spans are served from memory and not kept",
                        self.directory,
                    )
            if not self._fits(size):
                self.count("full")
                raise StoreFullError(
                    f"layer store {self.directory}: no room for {size} bytes",
                    hint="make room on its file system, or change cache_bytes",
                )
        with self._lock:
            self._used += size

    def unreserve(self, size: int) -> None:
        """Takes back a reservation or accounts for an eviction."""
        with self._lock:
            self._used -= size

    def make_room(self, need: int = 0) -> int:
        """Evicts until `need` more bytes fit within the limits. Returns the bytes freed."""
        with self._evicting:
            amount = self._excess(need)
            return self._evict(amount) if amount else 0

    def refused(self, size: int) -> None:
        """The disk did not take bytes that seemed to fit: a quota. Makes room for the next ones."""
        self.count("full")
        with self._lock:
            now = time.monotonic()
            if now < self._refused_until:
                return
            self._refused_until = now + RETRY_ROOM_S
        log.warning(
            "layer store %s: its file system takes no more: spans are served from memory, older"
            " ones leave",
            self.directory,
        )
        with self._evicting:
            self._evict(max(size, REFUSED_BYTES))

    def _evict(self, amount: int) -> int:
        freed = 0
        with self._lock:
            idle = list(self._idle.values())
        for layer in choose_layers(idle, amount):
            freed += self.remove(layer.key)
        if freed < amount:
            freed += self._evict_spans(amount - freed)
        self.count("evicted_bytes", freed)
        if freed:
            log.info("layer store: evicted %d bytes", freed)
        return freed

    def _evict_spans(self, amount: int) -> int:
        with self._lock:
            layers = {layer.key: layer for layer in self._open.values() if not layer.pins}
        spans = [
            IdleSpan(layer.last_use[span], key, span, layer.spans[span].uncompressed_size)
            for key, layer in layers.items()
            for span in layer.present()
        ]
        freed = 0
        for key, victims in choose_spans(spans, amount).items():
            try:
                freed += layers[key].evict(victims)
            except OSError as exc:
                log.error("layer %s: eviction: %s", key, exc.strerror)
        return freed

    def _fits(self, size: int) -> bool:
        return not self._excess(size)

    def _excess(self, need: int) -> int:
        try:
            state = os.statvfs(self.directory)
            free = state.f_bavail * state.f_frsize
        except OSError:
            free = 1 << 62
        return bytes_to_free(self._used, self.limit_bytes, free, self.min_free_bytes, need)

    # -- upkeep

    def sync(self) -> None:
        """Brings everything to the disk and marks it clean. To be called now and then."""
        with self._lock:
            layers = list(self._open.values())
        for layer in layers:
            layer.sync()

    def count(self, event: str, number: int = 1) -> None:
        """Counts an event for the statistics."""
        with self._lock:
            self._counts[event] = self._counts.get(event, 0) + number

    def statistics(self) -> StoreStatistics:
        """A snapshot."""
        with self._lock:
            counts = self._counts
            return StoreStatistics(
                layers=len(self._open) + len(self._idle),
                open_layers=len(self._open),
                complete_layers=sum(layer.is_complete for layer in self._open.values()),
                used_bytes=self._used,
                limit_bytes=self.limit_bytes,
                evicted_bytes=counts.get("evicted_bytes", 0),
                full=counts.get("full", 0),
                resets=counts.get("resets", 0),
                suspects_good=counts.get("suspects_good", 0),
                suspects_bad=counts.get("suspects_bad", 0),
            )

    def close(self) -> None:
        """Syncs and closes everything; what is read or put later finds nothing."""
        with self._lock:
            layers = list(self._open.values())
        for layer in layers:
            layer.close()
        self.files.close()

    def _path(self, key: str) -> str:
        return f"{self.directory}/{key}"

    def _make_idle(self, stored: StoredLayer) -> None:
        stored.close()
        with self._lock:
            del self._open[stored.key]
            if stored.used_bytes:
                self._idle[stored.key] = IdleLayer(time.time(), stored.key, stored.used_bytes)
        with contextlib.suppress(OSError):
            os.utime(stored.data_path)

    def _scan(self) -> None:
        for entry in os.scandir(self.directory):
            if not _is_key(entry.name) or not entry.is_dir(follow_symlinks=False):
                continue
            try:
                status = os.lstat(f"{entry.path}/data")
            except FileNotFoundError:
                shutil.rmtree(entry.path, ignore_errors=True)
                continue
            size = status.st_blocks * 512
            self._idle[entry.name] = IdleLayer(status.st_mtime, entry.name, size)
            self._used += size


def _is_key(key: str) -> bool:
    # Keys name files: nothing but what index.model makes.
    return 0 < len(key) <= 200 and set(key) <= set("0123456789abcdef-")


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()

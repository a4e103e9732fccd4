"""The layer store: a content-addressed cache of spans on disk, bounded, safe against crashes.

    <layer_store>/<layer key>/    0700
        data        sparse file of the layer's uncompressed size
        spans       header and one bit a span: present
        boot        boot ID and whether everything marked is on the disk
        complete    exists when the whole layer was hashed and is its diff ID

Not for fetching or verifying: callers put only spans whose digest they checked.
"""
from __future__ import annotations


class LayerStore:
    """All layers of a node. Thread-safe. One process owns a directory (lock file)."""

    def __init__(self, directory: str, *, limit_bytes: int, min_free_bytes: int, max_open: int = 512):
        raise NotImplementedError

    def open(self, layer, table) -> "StoredLayer":
        """The layer's directory, made if missing, reset if corrupt; the same object for a key."""

    def release(self, key: str) -> None:
        """Nobody reads the layer any more: it stays on disk as a candidate of eviction."""

    def pin(self, key: str) -> None: ...
    def unpin(self, key: str) -> None: ...
    def sync(self) -> None:
        """fdatasync of what is dirty, then clean markers. Blocking: call in a thread, periodically."""
    def make_room(self, need_bytes: int = 0) -> int: ...
    def remove(self, key: str) -> None: ...
    def keys(self) -> "list[str]": ...
    def statistics(self): ...
    def close(self) -> None: ...

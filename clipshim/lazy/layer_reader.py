"""Reads of one layer: from the store, else by shared flights. SKELETON of signatures."""
from __future__ import annotations


class Fetching:   # clipshim/lazy/fetching.py
    """What all layer readers of a server share: slots per service, breakers, memory, statistics.

        async with trio.open_nursery() as nursery:
            fetching = Fetching(nursery, settings)
    """

    def __init__(self, nursery, settings) -> None: ...


class LayerReader:
    """layer: LayerInfo, table: SpanTable, stored: StoredLayer (LayerStore.open)."""

    key: str
    size: int
    inode: int

    def __init__(self, layer, table, stored, fetching) -> None: ...
    def add_source(self, source) -> None:
        """An image that has this layer: SpanSource (BlobSource, EmbeddedSource)."""
    def remove_source(self, source) -> None: ...
    async def read(self, offset: int, size: int): ...   # bytes-like, short only at the end; raises ClipError
    async def fetch_span(self, span: int, *, ahead: bool) -> None:
        """Returns when the span is in the store (prefetch)."""
    def statistics(self): ...
    recorders: set  # ProfileRecorder.touch(key, span)


class LayerReaders:   # clipshim/lazy/layers_fs.py, implements LayerDirectory
    """The readers of a server by name and inode: add(reader), remove(key), get(key), names()."""

# clipshim/lazy/layers_fs.py
#   LayersOperations(directory: LayerDirectory)          pyfuse3.Operations
#   class LayerDirectory(Protocol): async by_name(key: str) -> LayerReader|None
#                                   async by_inode(inode: int) -> LayerReader|None ; names() -> list[str]
#       (the server may block in by_* until its recovery after a restart is done)
#   layer_inode(key) -> int
#   raise_readahead(mountpoint, kib=1024) -> None      root; bdi read_ahead_kb of the mount
# clipshim/lazy/fuse_session.py
#   FUSE_MOUNT_OPTIONS, async serve(ops, fuse_fd, *, takeover: bool, task_status=...)   started() when the kernel was answered
# clipshim/lazy/tree_fs.py
#   TreeOperations(image: ErofsImage, device_paths: Sequence[str])   device_paths[0] is device 1
# clipshim/lazy/profile.py
#   ProfileRecorder(image_id, keys) .touch(key, span) .finish() -> list[(layer number, span)] ; load_profile(dir, image_id), merge_profile(dir, image_id, entries)
# clipshim/lazy/prefetch.py
#   async prefetch(readers: Sequence[LayerReader], order: Iterable[(layer number, span)])   low priority, cancellable; None order = all
# clipshim/lazy/full_check.py
#   async complete_layer(reader, progress: Callable[[int done, int total], None] | None) -> None

"""The layers that this node shows, for the layers mount: opened when they are first read.

A layer is known as soon as a tree that needs it is recorded, which costs nothing; its index is
opened at the first read and closed again when nobody reads. So a hundred mounted images cost
memory only for those in use, and a server that takes over answers at once.
"""

import errno
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from clipshim.errors import ClipError, StoreError
from clipshim.index.model import Index, open_index
from clipshim.lazy.fetching import Fetching
from clipshim.lazy.layer_reader import LayerReader, Recorder
from clipshim.lazy.layer_store import LayerStore
from clipshim.lazy.layers_fs import layer_inode
from clipshim.lazy.span_source import SpanSource
from clipshim.lazy.statistics import LayerStatistics

log = logging.getLogger(__name__)

PAGE = 4096
IDLE_S = 120.0
MAX_PROVIDERS = 4  # images asked for a layer's bytes at its opening, one after the other
MAX_SOURCES = 16  # with those that came while it was open

SourceMaker = Callable[[Index, int, bool], SpanSource]


@dataclass(frozen=True)
class Provider:
    """An index that describes a layer, and where in it."""

    path: str
    position: int
    trusted: bool


class ShownLayer:
    """One layer file of the mount. Implements lazy.layers_fs.LayerFile."""

    def __init__(self, key: str, size: int, directory: "LayerDirectory") -> None:
        self.key = key
        # whole pages: EROFS reads a file's last block whole and takes a short read for an error,
        # and there are tar writers that do not pad the last entry of a layer
        self.size = -(-size // PAGE) * PAGE
        self.providers: dict[str, Provider] = {}  # by image ID
        self.has_news = False  # a provider came that the open reader has not as a source
        self.sourced: set[str] = set()  # image IDs of the open reader's sources
        self.last_use = 0.0
        self.busy = 0
        self.reader: LayerReader | None = None
        self.indexes: list[Index] = []
        self.recorders: set[Recorder] = set()  # survive that the reader is closed and opened
        self._before = LayerStatistics()  # of readers that were closed
        self._directory = directory
        self._opening = trio.Lock()

    def statistics(self) -> LayerStatistics:
        """Since the layer was first shown."""
        total = LayerStatistics()
        total.add(self._before)
        if self.reader is not None:
            total.add(self.reader.statistics)
        return total

    def take_statistics(self, reader: LayerReader) -> None:
        """Keeps what a reader counted that is being closed."""
        self._before.add(reader.statistics)

    def record(self, recorder: Recorder, *, on: bool) -> None:
        """Has a recorder told of the spans that are read, or no more."""
        change = set.add if on else set.discard
        change(self.recorders, recorder)
        if self.reader is not None:
            change(self.reader.recorders, recorder)

    async def read(self, offset: int, size: int) -> bytes | bytearray | memoryview:
        """See LayerFile."""
        self.busy += 1
        try:
            self.last_use = trio.current_time()
            reader = await self.open()
            wanted = min(size, self.size - offset)
            data = await reader.read(offset, wanted)
            if len(data) < wanted:
                return bytes(data) + bytes(wanted - len(data))
            return data
        finally:
            self.unused()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[LayerReader]:
        """The reader, kept open in the block."""
        self.busy += 1
        try:
            yield await self.open()
        finally:
            self.last_use = trio.current_time()
            self.unused()

    def unused(self) -> None:
        """Takes back one `busy`; what nobody shows any more is closed then."""
        self.busy -= 1
        if not self.busy and not self.providers:
            self._directory.close_layer(self)

    async def open(self) -> LayerReader:
        """The reader; the caller keeps `busy` above zero as long as it uses it."""
        if self.reader is None or self.has_news:
            async with self._opening:
                if self.reader is None or self.has_news:
                    await self._directory.open_in_time(self)
        assert self.reader is not None
        return self.reader


class LayerDirectory:
    """Implements lazy.layers_fs.LayerDirectory."""

    def __init__(self, store: LayerStore, fetching: Fetching, make_source: SourceMaker) -> None:
        self._store = store
        self._fetching = fetching
        self._make_source = make_source
        self._by_name: dict[str, ShownLayer] = {}
        self._by_inode: dict[int, ShownLayer] = {}
        self._leaving: set[ShownLayer] = set()  # hidden while something of them was in flight

    def show(
        self, image_id: str, index_path: str, layers: list[tuple[str, int]], *, trusted: bool
    ) -> None:
        """Shows the layers (key, size) of an image, in the order of its index."""
        for position, (key, size) in enumerate(layers):
            layer = self._by_name.get(key)
            if layer is None:
                layer = ShownLayer(key, size, self)
                self._by_name[key] = self._by_inode[layer_inode(key)] = layer
            # this image may have what the others cannot give (any more)
            layer.has_news |= image_id not in layer.providers
            layer.providers[image_id] = Provider(index_path, position, trusted)

    def hide(self, image_id: str) -> None:
        """Forgets an image; layers that no image needs vanish."""
        for layer in list(self._by_name.values()):
            layer.providers.pop(image_id, None)
            if not layer.providers:
                del self._by_name[layer.key], self._by_inode[layer_inode(layer.key)]
                self.close_layer(layer)

    async def by_name(self, key: str) -> ShownLayer | None:
        """See LayerDirectory."""
        return self._by_name.get(key)

    async def by_inode(self, inode: int) -> ShownLayer | None:
        """See LayerDirectory."""
        return self._by_inode.get(inode)

    def get(self, key: str) -> ShownLayer | None:
        """A layer that is shown."""
        return self._by_name.get(key)

    def names(self) -> list[str]:
        """See LayerDirectory."""
        return list(self._by_name)

    def open_count(self) -> int:
        """Layers whose index is open."""
        return sum(layer.reader is not None for layer in self._by_name.values())

    def readers(self) -> list[LayerReader]:
        """The layers in use."""
        return [layer.reader for layer in self._by_name.values() if layer.reader is not None]

    async def open_in_time(self, layer: ShownLayer) -> None:
        """As open_layer; what may pass, as a lack of descriptors, is tried till the deadline."""
        deadline = trio.current_time() + self._fetching.deadline_s
        pause_s = 0.1
        while True:
            try:
                await self.open_layer(layer)
                return
            except ClipError as exc:
                if not may_pass(exc) or trio.current_time() + pause_s >= deadline:
                    raise
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, 2.0)

    async def open_layer(self, layer: ShownLayer) -> None:
        """Makes the reader of a layer, or gives an open one the sources that came since."""
        layer.has_news = False
        reader = layer.reader
        problem: ClipError | None = None
        for image_id, provider in _chosen(layer):
            try:
                index = await trio.to_thread.run_sync(open_index, provider.path)
            except ClipError as exc:
                log.error("layer %s: %s", layer.key, exc)
                problem = exc
                continue
            try:
                if index.layers[provider.position].key != layer.key:
                    raise StoreError(f"{provider.path}: layer {provider.position} has changed")
                if reader is None:
                    reader = await self._make_reader(index, provider.position)
                source = await trio.to_thread.run_sync(
                    self._make_source, index, provider.position, provider.trusted
                )
            except (ClipError, IndexError) as exc:
                index.close()
                log.error("layer %s: %s", layer.key, exc)
                problem = exc if isinstance(exc, ClipError) else StoreError(str(exc))
                continue
            reader.add_source(source)
            layer.indexes.append(index)
            layer.sourced.add(image_id)
        if reader is None:
            raise problem or StoreError(f"layer {layer.key}: no index describes it")
        reader.without_source = None if layer.sourced else problem
        if layer.reader is None:
            reader.recorders |= layer.recorders
            layer.reader = reader
        if problem is not None and may_pass(problem):
            layer.has_news = True  # the next read tries again
            if not layer.sourced:
                raise problem

    async def _make_reader(self, index: Index, position: int) -> LayerReader:
        info, table = index.layers[position], index.span_table(position)
        stored = await trio.to_thread.run_sync(self._store.open, info, table)
        return LayerReader(info, table, stored, self._fetching)

    def close_idle(self) -> None:
        """Closes what has not been read for a while."""
        now = trio.current_time()
        idle = [la for la in self._by_name.values() if now - la.last_use > IDLE_S]
        for layer in (*idle, *self._leaving):
            self.close_layer(layer)

    def close(self) -> None:
        """Closes everything. Blocking, for the end of the server."""
        for layer in (*self._by_name.values(), *self._leaving):
            if layer.reader is not None:
                self._close(layer)
                self._store.release(layer.key)

    def refresh(self, image_id: str) -> None:
        """More is allowed to an image: open layers ask it once more, as what it is now."""
        for layer in self._by_name.values():
            if image_id in layer.providers:
                layer.sourced.discard(image_id)
                layer.has_news = True

    async def _release(self, key: str) -> None:
        try:
            await trio.to_thread.run_sync(
                self._store.release, key, limiter=self._fetching.disk_limiter
            )
        except (ClipError, OSError) as exc:
            log.error("layer %s: %s", key, exc)

    def close_layer(self, layer: ShownLayer) -> None:
        """Closes a layer, once nobody reads or fetches it; the next read opens it again."""
        if layer.busy or (layer.reader is not None and layer.reader.is_busy):
            if not layer.providers:
                self._leaving.add(layer)
            return
        self._leaving.discard(layer)
        if layer.reader is not None:
            self._close(layer)
            # not here: it waits for the disk. Who opens the layer meanwhile gets the same object
            self._fetching.nursery.start_soon(self._release, layer.key)

    def _close(self, layer: ShownLayer) -> None:
        assert layer.reader is not None
        self._fetching.total.add(layer.reader.statistics)
        layer.take_statistics(layer.reader)
        layer.reader = None
        for index in layer.indexes:
            index.close()
        layer.indexes.clear()
        layer.sourced.clear()


def may_pass(error: ClipError) -> bool:
    """Whether an error is one of the moment: too many open files, too little memory."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EAGAIN,
    )


def _chosen(layer: ShownLayer) -> list[tuple[str, Provider]]:
    """Providers to take as sources: those the node's owner vouches for first, then the newest."""
    ranked = list(reversed(layer.providers.items()))
    ranked.sort(key=lambda entry: not entry[1].trusted)
    room = MAX_SOURCES - len(layer.sourced)
    return [entry for entry in ranked[:MAX_PROVIDERS] if entry[0] not in layer.sourced][:room]

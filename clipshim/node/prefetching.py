"""Fetches ahead of readers, and fetches images whole: what, when and for whom.

How is lazy/prefetch.py's and lazy/full_check.py's. Profiles are learned from starts
(start_watch.py), or come with an index; without one there is a guess (lazy/first_reads.py).
"""

import logging
import mmap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import trio

from clipshim.errors import ClipError, NotFoundError
from clipshim.index.erofs_read import ErofsImage
from clipshim.index.model import Index, open_index
from clipshim.lazy.first_reads import first_spans
from clipshim.lazy.full_check import complete_layer
from clipshim.lazy.layer_reader import LayerReader
from clipshim.lazy.prefetch import everything, prefetch
from clipshim.lazy.profile import load_profile, parse_entries, record_start, within
from clipshim.node.layer_directory import LayerDirectory
from clipshim.node.start_watch import Touches
from clipshim.node.tree_records import TreeRecord, TreeRecords
from clipshim.settings import Settings

log = logging.getLogger(__name__)

PROGRESS_S = 0.2

Progress = Callable[[dict[str, Any]], Awaitable[None]]


class Prefetching:
    """At most one prefetch an image, in the nursery of the server."""

    def __init__(self, settings: Settings, nursery: trio.Nursery, layers: LayerDirectory) -> None:
        self._settings = settings
        self._nursery = nursery
        self._layers = layers
        self.profiles = f"{settings.state_dir}/profiles"
        self._scopes: dict[str, trio.CancelScope] = {}
        self._learning = trio.Lock()

    def learn(self, record: TreeRecord, touches: Touches) -> None:
        """A container of an image has started."""
        if self._settings.prefetch != "none":
            self._nursery.start_soon(self._learn, record.image_id, touches)

    async def _learn(self, image_id: str, touches: Touches) -> None:
        try:
            async with self._learning:  # a profile is read, changed and written
                await trio.to_thread.run_sync(record_start, self.profiles, image_id, touches)
        except OSError as exc:
            log.warning("profile of %s: %s", image_id, exc)

    def begin(self, record: TreeRecord, index_path: str) -> None:
        """A tree was mounted. Its later containers find what the first one's prefetch brought."""
        if self._settings.prefetch == "none" or record.mode == "unpacked":
            return
        if record.image_id not in self._scopes:
            scope = self._scopes[record.image_id] = trio.CancelScope()
            self._nursery.start_soon(self._run, record, index_path, scope)

    def end(self, image_id: str) -> None:
        """The tree is unmounted."""
        scope = self._scopes.pop(image_id, None)
        if scope is not None:
            scope.cancel()

    async def _run(self, record: TreeRecord, index_path: str, scope: trio.CancelScope) -> None:
        with scope:
            try:
                order, known = await self._order(record.image_id, index_path)
                whole = self._settings.prefetch == "all"
                if not order and not whole:
                    return
                wanted = {layer for layer, _ in order}
                keys = [
                    layer.key if whole or number in wanted else None
                    for number, layer in enumerate(record.layers)
                ]
                async with self._opened(keys) as readers:
                    counts = [len(reader.table) if reader else 0 for reader in readers]
                    order = within(order, counts)
                    if known:
                        for number, reader in enumerate(readers):
                            if reader is not None:
                                reader.foretell(span for layer, span in order if layer == number)
                    await prefetch(readers, order)
                    if whole:
                        await prefetch(readers, everything(readers))
            except (ClipError, OSError) as exc:
                log.warning("prefetch of %s: %s", record.reference, exc)

    async def _order(self, image_id: str, index_path: str) -> tuple[Touches, bool]:
        """What to fetch first, and whether that is known, from a profile, or only guessed."""
        learned = await trio.to_thread.run_sync(load_profile, self.profiles, image_id)
        if learned.spans:
            return learned.spans, True
        with await trio.to_thread.run_sync(open_index, index_path) as index:
            if index.profile is None:
                return await trio.to_thread.run_sync(self._guess, index), False
            try:
                return parse_entries(index.profile), True
            except ValueError as exc:
                log.warning("index of %s: profile: %s", index.reference, exc)
                return [], False

    def _guess(self, index: Index) -> Touches:
        tables = [index.span_table(position) for position in range(len(index.layers))]
        path = TreeRecords(self._settings.state_dir).tree_path(index.image_id)
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tree,
        ):
            return first_spans(ErofsImage(tree), index.config, tables)

    @asynccontextmanager
    async def _opened(self, keys: list[str | None]) -> AsyncIterator[list[LayerReader | None]]:
        async with AsyncExitStack() as stack:
            readers: list[LayerReader | None] = []
            for key in keys:
                layer = self._layers.get(key) if key is not None else None
                if layer is None:
                    readers.append(None)
                else:
                    readers.append(await stack.enter_async_context(layer.opened()))
            yield readers

    # Whole images

    async def complete(self, digest: str, path: str, progress: Progress) -> list[dict[str, Any]]:
        """Fetches an image whole and proves its layers; one document a layer. Raises ClipError.

        The node's owner asks for it, so it may use the node's credentials.
        """
        with await trio.to_thread.run_sync(open_index, path) as index:
            layers = [(layer.key, layer.size) for layer in index.layers]
            shown_as = f"complete {digest}"
            self._layers.show(shown_as, path, layers, trusted=True)
            try:
                for position in range(len(layers)):
                    await self._complete_layer(index, position, progress)
            finally:
                self._layers.hide(shown_as)
            return [
                {"digest": layer.diff_id, "size": layer.size, "complete": True}
                for layer in index.layers
            ]

    async def _complete_layer(self, index: Index, position: int, progress: Progress) -> None:
        info = index.layers[position]
        layer = self._layers.get(info.key)
        if layer is None:
            raise NotFoundError(f"layer {info.diff_id}: not shown")
        done = 0

        def advance(here: int, _total: int) -> None:
            nonlocal done
            done = here

        async def tell() -> None:
            while True:
                await trio.sleep(PROGRESS_S)
                await say()

        async def say() -> None:
            document = {"layer": position, "digest": info.diff_id, "total": info.size}
            await progress(document | {"done": done})

        async with layer.opened() as reader:
            await say()
            failure: ClipError | None = None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tell)
                try:
                    await complete_layer(reader, advance)
                except ClipError as exc:
                    failure = exc
                nursery.cancel_scope.cancel()
            if failure is not None:
                raise failure
            done = info.size
            await say()

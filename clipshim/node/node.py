"""What a server is made of, put together: stores, layers, trees, resolver. No protocol here."""

import logging
import os
import time
from dataclasses import replace
from typing import Any

import trio

from clipshim.errors import ClipError, MountError, StoreError
from clipshim.index.model import Index, open_index
from clipshim.lazy.fetching import Fetching
from clipshim.lazy.layer_reader import Data
from clipshim.lazy.layer_store import LayerStore
from clipshim.lazy.span_source import BlobSource, EmbeddedSource, SpanSource
from clipshim.lazy.statistics import LayerStatistics
from clipshim.node.containers import read_containers
from clipshim.node.events import Events
from clipshim.node.hand_mounts import HandMounts
from clipshim.node.images import ImageNames
from clipshim.node.keeper_link import KeeperLink
from clipshim.node.layer_directory import LayerDirectory
from clipshim.node.mount_client import MountClient
from clipshim.node.prefetching import Prefetching
from clipshim.node.resolver import Progress, Resolved, Resolver
from clipshim.node.start_watch import StartWatch
from clipshim.node.tree_mounts import MountRequest, Tree, TreeMounts
from clipshim.node.tree_records import TreeRecord, TreeRecords
from clipshim.node.unpacked import Unpacker
from clipshim.registry.access import RegistryAccess
from clipshim.registry.blobs import BlobReader, locate_blob
from clipshim.registry.references import Reference, parse_image
from clipshim.settings import Settings

log = logging.getLogger(__name__)

EROFS_BLOCK = 512
SYNC_S = 5.0


class Node:
    """The state of one server."""

    def __init__(
        self,
        settings: Settings,
        nursery: trio.Nursery,
        keeper: KeeperLink,
        generation: str,
        restarts: int,
    ) -> None:
        self.settings = settings
        self.restarts = restarts
        self.lazy = True  # false without FUSE: then images can only be unpacked
        self.events = Events()
        self.collecting = trio.Lock()
        self.lost_holds: dict[str, float] = {}  # of containers without a directory; since when
        self.nursery = nursery
        self.keeper = keeper
        self.started = time.time()
        self.images = ImageNames(settings)
        self.unpacker = Unpacker(settings)
        self.store = LayerStore(
            settings.layer_store,
            limit_bytes=settings.cache_bytes,
            min_free_bytes=settings.min_free_bytes,
        )
        self.fetching = Fetching(nursery, settings)
        self.resolver = Resolver(settings, self.images)
        self.resolver.indexing_s = self.events.indexing_took
        self.layers = LayerDirectory(self.store, self.fetching, self._make_source)
        self.starts = StartWatch(self.layers)
        self.prefetching = Prefetching(settings, nursery, self.layers)
        self.starts.on_done = self.prefetching.learn
        self.worker = MountClient(settings.run_dir)
        self.records = TreeRecords(settings.state_dir)
        self.hand_mounts = HandMounts(settings.run_dir)
        self.trees = TreeMounts(
            settings,
            self.images,
            self.records,
            self.layers,
            self.worker,
            keeper,
            generation,
            self._complete_device,
        )
        self.trees.on_gone = self._tree_gone
        self.trees.recorded_images = self._recorded_images
        # one reader with the node's credentials, one without any
        self._blobs: dict[bool, BlobReader] = {}
        self._pinned: set[tuple[str, str]] = set()  # image ID, key

    def _recorded_images(self) -> set[str]:
        return {container.image_id for container in read_containers(self.settings.run_dir)}

    # Sources of bytes

    def _make_source(self, index: Index, position: int, trusted: bool) -> SpanSource:
        """Where the bytes of a layer come from. May search a local archive. Raises ClipError."""
        if index.has_blobs:
            return EmbeddedSource(index, position)
        if not trusted:
            self.resolver.check_source(index)
        layer = index.layers[position]
        urls = layer.urls if trusted else self.resolver.allowed_urls(layer.urls)
        blob = locate_blob(index.reference, layer.blob_digest, layer.blob_size, urls)
        reference = parse_image(index.reference)
        service = reference.server if isinstance(reference, Reference) else str(reference)
        return BlobSource(index, position, self._blob_reader(trusted), blob, service)

    def _blob_reader(self, trusted: bool) -> BlobReader:
        with_credentials = trusted or self.settings.node_credentials
        found = self._blobs.get(with_credentials)
        if found is None:
            access = RegistryAccess.from_settings(self.settings, anonymous=not with_credentials)
            found = self._blobs[with_credentials] = BlobReader(access)
        return found

    def fetch_statistics(self) -> LayerStatistics:
        """Of all layers, also those that are closed."""
        total = LayerStatistics()
        total.add(self.fetching.total)
        for reader in self.layers.readers():
            total.add(reader.statistics)
        return total

    def registry_statistics(self) -> list[dict[str, object]]:
        """Of every blob reader in use."""
        return [reader.statistics() for reader in self._blobs.values()]

    # Complete layers as devices of their own

    def _complete_device(self, index: Index, position: int) -> str | None:
        """The store's file of a complete layer, pinned; None if it is not complete."""
        info = index.layers[position]
        if info.size % EROFS_BLOCK:  # layer_directory.py pads such a layer, the store does not
            return None
        if not os.path.exists(f"{self.store.directory}/{info.key}/complete"):
            return None
        stored = self.store.open(info, index.span_table(position))
        try:
            if not stored.is_complete:
                return None
            if (index.image_id, info.key) not in self._pinned:
                self.store.pin(info.key)
                self._pinned.add((index.image_id, info.key))
            return stored.data_path
        finally:
            self.store.release(info.key)

    def _tree_gone(self, record: TreeRecord) -> None:
        self.prefetching.end(record.image_id)
        for layer in record.layers:
            if (record.image_id, layer.key) in self._pinned:
                self._pinned.discard((record.image_id, layer.key))
                self.nursery.start_soon(trio.to_thread.run_sync, self.store.unpin, layer.key)

    def pin_again(self, record: TreeRecord) -> None:
        """After a restart: what is used directly must not be evicted. Blocking."""
        wanted = {*record.pinned, *record.kept}
        if not wanted:
            return
        try:
            with open_index(self.images.path(record.digest)) as index:
                for position, layer in enumerate(index.layers):
                    if layer.key in wanted:
                        self._complete_device(index, position)
        except (ClipError, OSError) as exc:
            log.warning("tree %s: %s", record.image_id, exc)

    # Mounting

    async def mount(
        self, resolved: Resolved, hold: str | None, mode: str, progress: Progress
    ) -> Tree:
        """Lazily, or whole if that cannot be and the configuration says so. Raises ClipError."""
        request = MountRequest(resolved.facts, resolved.path, hold, mode, resolved.trusted)
        if hold is not None:
            self.trees.release(hold)  # a container that is created again may name another image
        try:
            if not self.lazy:
                raise MountError("this machine has no /dev/fuse", hint='fallback = "unpack"')
            tree = await self.trees.mount(request)
            assert tree.record is not None
            self.prefetching.begin(tree.record, resolved.path)
            return tree
        except MountError as exc:
            if self.settings.fallback != "unpack":
                raise
            log.warning("cannot mount lazily: %s", exc)
        self.events.unpacked += 1

        async def unpack(record: TreeRecord) -> str:
            async def read(position: int, offset: int, size: int) -> Data:
                layer = self.layers.get(record.layers[position].key)
                if layer is None:
                    raise StoreError(f"layer {record.layers[position].key}: not shown")
                return await layer.read(offset, size)

            return await self.unpacker.unpack(resolved, read, progress)

        return await self.trees.mount_directory(request, unpack)

    async def complete(self, digest: str, progress: Progress) -> list[dict[str, Any]]:
        """Fetches an image whole; while its tree is mounted, it stays so. Raises ClipError."""
        layers = await self.prefetching.complete(digest, self.images.path(digest), progress)
        for tree in self.trees.trees.values():
            if tree.record is not None and tree.record.digest == digest:
                keys = tuple(layer.key for layer in tree.record.layers)
                tree.record = replace(tree.record, kept=keys)
                await trio.to_thread.run_sync(self.records.write, tree.record)
                await trio.to_thread.run_sync(self.pin_again, tree.record)
                break
        return layers

    # Life

    async def take_over(self, records: list[TreeRecord]) -> None:
        """Finds what is mounted and who uses it."""
        containers = await trio.to_thread.run_sync(read_containers, self.settings.run_dir)
        users: dict[str, list[str]] = {}
        for container in containers:
            users.setdefault(container.image_id, []).append(container.cid)
        await self.trees.take_over(records, users)
        for container in containers:
            if container.image_id:
                self.trees.hold(container.image_id, container.text("key") or container.cid)
        for hold, image_id in self.hand_mounts.all().items():
            if not self.trees.hold(image_id, hold) and not self.trees.is_mounted(image_id):
                try:
                    self.hand_mounts.remove(hold)  # else it would hold a tree mounted anew
                except OSError as exc:  # disk full: no reason not to serve
                    log.error("mounts by hand: %s", exc)
        for tree in list(self.trees.trees.values()):
            if tree.record is not None:
                await trio.to_thread.run_sync(self.pin_again, tree.record)

    async def keep_house(self) -> None:
        """Unmounts what lingered long enough and closes what is idle."""
        pause = max(0.2, min(5.0, self.settings.linger_s / 4))
        while True:
            await trio.sleep(pause)
            self.starts.end_due()
            try:
                await self.trees.unmount_idle(self.settings.linger_s)
                self.layers.close_idle()
                await trio.to_thread.run_sync(self.fetching.return_memory)
            except (ClipError, OSError) as exc:
                log.error("housekeeping: %s", exc)

    async def keep_synced(self) -> None:
        """Brings the store to the disk now and then; a busy disk holds up nothing else."""
        while True:
            await trio.sleep(SYNC_S)
            try:
                await trio.to_thread.run_sync(self.store.sync)
            except (ClipError, OSError) as exc:
                log.error("store: %s", exc)

    def close(self) -> None:
        """Orderly end: what is marked is on the disk."""
        self.layers.close()
        for reader in self._blobs.values():
            reader.close()
        self.store.close()
        self.worker.close()

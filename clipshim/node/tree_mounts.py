"""The trees that are mounted: one per image, shared by all its containers, kept a while after.

    ABSENT -> MOUNTING -> MOUNTED -> UNMOUNTING -> ABSENT

Never touches a mount itself: EROFS goes through the mount worker, FUSE through the keeper. Not
for finding images (resolver.py) nor for what crashed containers left (cleanup.py).
"""

import contextlib
import enum
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import trio

from clipshim.errors import ClipError, MountError
from clipshim.index.model import Index, open_index
from clipshim.mounts import mountinfo
from clipshim.node.images import ImageFacts, ImageNames
from clipshim.node.keeper_link import KeeperLink
from clipshim.node.layer_directory import LayerDirectory
from clipshim.node.mount_client import MountClient
from clipshim.node.tree_records import LayerName, TreeRecord, TreeRecords
from clipshim.settings import Settings

log = logging.getLogger(__name__)

MODES = ("erofs", "fuse")


class State(enum.Enum):
    """Where a tree is in its life."""

    ABSENT = "absent"
    MOUNTING = "mounting"
    MOUNTED = "mounted"
    UNMOUNTING = "unmounting"


EDGES = {
    (State.ABSENT, State.MOUNTING),  # the first container asks for it
    (State.ABSENT, State.MOUNTED),  # found mounted by a server that takes over
    (State.MOUNTING, State.MOUNTED),  # readable from now on
    (State.MOUNTING, State.ABSENT),  # the mount failed
    (State.MOUNTED, State.UNMOUNTING),  # nobody used it for linger_s
    (State.UNMOUNTING, State.ABSENT),  # gone
    (State.UNMOUNTING, State.MOUNTED),  # could not be unmounted
}


@dataclass
class Tree:
    """One image's tree. Change `state` with `move` only, and under `lock`."""

    image_id: str
    record: TreeRecord | None = None
    state: State = State.ABSENT
    holds: set[str] = field(default_factory=set)
    idle_since: float = 0.0  # trio's clock, meaningful without holds
    mounted_at: float = 0.0  # seconds since the epoch
    lock: trio.Lock = field(default_factory=trio.Lock)
    coming: int = 0  # requests between asking for it and holding it

    def move(self, state: State) -> None:
        """The one setter of `state`."""
        if (self.state, state) not in EDGES:
            raise AssertionError(f"tree {self.image_id}: {self.state} -> {state}")
        self.state = state


@dataclass(frozen=True)
class MountRequest:
    """What is to be mounted."""

    facts: ImageFacts
    path: str  # of the index
    hold: str | None
    mode: str  # auto, erofs or fuse
    trusted: bool


class TreeMounts:
    """All trees of the node."""

    def __init__(
        self,
        settings: Settings,
        images: ImageNames,
        records: TreeRecords,
        layers: LayerDirectory,
        worker: MountClient,
        keeper: KeeperLink,
        generation: str,
        device_of: Callable[[Index, int], str | None],
    ) -> None:
        self._settings = settings
        self._images = images
        self._records = records
        self._layers = layers
        self._worker = worker
        self._keeper = keeper
        self._generation = generation
        self._device_of = device_of
        self._no_erofs: str | None = None
        self._probed = trio.Lock()
        self._probe_done = False
        self.trees: dict[str, Tree] = {}
        self.on_gone: Callable[[TreeRecord], None] = lambda _record: None
        self.recorded_images: Callable[[], set[str]] = set
        self.failures = 0
        self.mounts = 0

    def target(self, image_id: str) -> str:
        """The mount point of a tree."""
        return self._settings.tree_mount(image_id)

    # After a restart of the server

    def expect(self) -> list[TreeRecord]:
        """Shows the layers of all records, so that the kernel's requests can be answered."""
        records = self._records.read_all()
        for record in records:
            if record.mode != "unpacked":
                self._show(record)
        return records

    async def take_over(self, records: list[TreeRecord], users: dict[str, list[str]]) -> None:
        """Finds out which of the records are mounted, and takes dead mounts away.

        `users` are the containers by image, for telling which of them cannot be repaired.
        """
        await self._worker.settle()
        mounted = {mount.mount_point for mount in mountinfo.read_mounts()}
        for record in records:
            alive = record.independent or record.generation == self._generation
            if record.mode == "fuse":
                alive = alive and record.fuse_name in self._keeper.trees
            target = self.target(record.image_id)
            if alive and target in mounted:
                tree = self.trees.setdefault(record.image_id, Tree(record.image_id))
                tree.record, tree.idle_since = record, trio.current_time()
                tree.mounted_at = time.time()
                tree.move(State.MOUNTED)
                continue
            if target in mounted:
                log.warning(
                    "tree was mounted by a daemon that died whole: its containers cannot read what"
                    " was not cached, restart them",
                    extra={
                        "image_id": record.image_id,
                        "reference": record.reference,
                        "containers": ",".join(users.get(record.image_id, [])) or "none",
                    },
                )
            try:
                await self._forget(record)
            except ClipError as exc:
                log.error("tree %s: %s", record.image_id, exc)

    # Mounting

    async def mount(self, request: MountRequest) -> Tree:
        """Returns when the tree is readable, and held for `request.hold`. Raises MountError."""
        image_id = request.facts.image_id
        while True:
            tree = self.trees.setdefault(image_id, Tree(image_id))
            tree.coming += 1
            try:
                async with tree.lock:
                    if self.trees.get(image_id) is not tree:
                        continue  # unmounted while we waited: start with a new one
                    if tree.state is State.ABSENT:
                        await self._mount_now(tree, request)
                    assert tree.record is not None
                    if request.trusted and not tree.record.trusted:
                        await self._trust(tree)
                    if request.hold is not None:
                        tree.holds.add(request.hold)
                    tree.idle_since = trio.current_time()
                    return tree
            finally:
                tree.coming -= 1

    async def clone(self, tree: Tree) -> int:
        """A descriptor of the mounted tree for one container."""
        return await self._worker.clone(self.target(tree.image_id))

    async def _mount_now(self, tree: Tree, request: MountRequest) -> None:
        tree.move(State.MOUNTING)
        try:
            mode = await self._mode(request.mode)
            try:
                tree.record = await self._mount_in(mode, request)
            except MountError as exc:
                if mode == "fuse" or request.mode == "erofs":
                    raise
                log.warning(
                    "mode erofs failed, using fuse: %s", exc, extra={"image_id": tree.image_id}
                )
                tree.record = await self._mount_in("fuse", request)
        except BaseException:
            self.failures += 1
            tree.move(State.ABSENT)
            self.trees.pop(tree.image_id, None)
            raise
        self.mounts += 1
        tree.mounted_at = time.time()
        tree.move(State.MOUNTED)
        log.info(
            "mounted a tree",
            extra={
                "image_id": tree.image_id,
                "reference": tree.record.reference,
                "mode": tree.record.mode,
            },
        )

    @property
    def erofs(self) -> str:
        """Whether the kernel mounts trees itself: yes, no with the reason, or not tried yet."""
        if not self._probe_done:
            return "not tried yet"
        return f"no: {self._no_erofs}" if self._no_erofs else "yes"

    async def mount_directory(
        self, request: MountRequest, unpack: Callable[[TreeRecord], Awaitable[str]]
    ) -> Tree:
        """As mount, but shows a directory that `unpack` fills from the layers and returns."""
        tree = self.trees.setdefault(request.facts.image_id, Tree(request.facts.image_id))
        tree.coming += 1
        try:
            async with tree.lock:
                if tree.state is State.ABSENT:
                    tree.move(State.MOUNTING)
                    try:
                        tree.record = await self._mount_directory(request, unpack)
                    except BaseException:
                        tree.move(State.ABSENT)
                        self.trees.pop(tree.image_id, None)
                        raise
                    self.trees[tree.image_id] = tree
                    tree.mounted_at = time.time()
                    tree.move(State.MOUNTED)
                if request.hold is not None:
                    tree.holds.add(request.hold)
                tree.idle_since = trio.current_time()
                return tree
        finally:
            tree.coming -= 1

    async def _mount_directory(
        self, request: MountRequest, unpack: Callable[[TreeRecord], Awaitable[str]]
    ) -> TreeRecord:
        record, _, _ = await trio.to_thread.run_sync(self._prepare, "unpacked", request)
        self._show(record)
        try:
            await self._worker.mount_bind(await unpack(record), self.target(record.image_id))
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._forget(record)
            raise
        self._layers.hide(record.image_id)  # everything is in files
        return record

    async def _mode(self, wanted: str) -> str:
        if wanted in MODES:
            return wanted
        if wanted != "auto":
            raise MountError(f"mode: expected auto, erofs or fuse, got {wanted!r}")
        async with self._probed:
            if not self._probe_done:
                try:
                    self._no_erofs = await self._worker.probe(self._settings.state_dir)
                except MountError as exc:  # a full disk, say: the mount itself will tell
                    log.warning("whether EROFS can be mounted is not known: %s", exc)
                    return "erofs"
                self._probe_done = True
                if self._no_erofs:
                    log.info("mode auto uses fuse: %s", self._no_erofs)
        return "fuse" if self._no_erofs else "erofs"

    async def _mount_in(self, mode: str, request: MountRequest) -> TreeRecord:
        facts = request.facts
        target = self.target(facts.image_id)
        record, devices, tree_path = await trio.to_thread.run_sync(self._prepare, mode, request)
        self._show(record)
        try:
            if mode == "erofs":
                await self._worker.mount_erofs(tree_path, devices, target)
            else:
                await self._keeper.mount_tree(
                    record.fuse_name, target, {"tree": tree_path, "devices": devices}
                )
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._forget(record)
            raise
        return record

    def _prepare(self, mode: str, request: MountRequest) -> tuple[TreeRecord, list[str], str]:
        """Writes the tree and the record; returns the paths of the devices. Blocking."""
        facts = request.facts
        with open_index(request.path) as index:
            tree_path = self._records.write_tree(facts.image_id, index.tree_pieces)
            layers = index.layers
            devices, pinned = [], []
            for i, layer in enumerate(layers):
                own = self._device_of(index, i)
                if own is not None:
                    pinned.append(layer.key)
                devices.append(own or f"{self._settings.layers_mount}/{layer.key}")
        record = TreeRecord(
            image_id=facts.image_id,
            digest=facts.digest,
            reference=facts.reference,
            mode=mode,
            layers=tuple(LayerName(layer.key, layer.size) for layer in layers),
            generation=self._generation,
            pinned=tuple(pinned),
            fuse_name=f"{facts.image_id}.{secrets.token_hex(4)}" if mode == "fuse" else "",
            trusted=request.trusted,
        )
        _make_target(self.target(facts.image_id))
        self._records.write(record)
        return record, devices, tree_path

    def _show(self, record: TreeRecord) -> None:
        layers = [(layer.key, layer.size) for layer in record.layers]
        path = self._images.path(record.digest)
        self._layers.show(record.image_id, path, layers, trusted=record.trusted)

    async def _trust(self, tree: Tree) -> None:
        assert tree.record is not None
        tree.record = replace(tree.record, trusted=True)
        await trio.to_thread.run_sync(self._records.write, tree.record)
        self._show(tree.record)
        self._layers.refresh(tree.image_id)

    # Releasing

    def release(self, hold: str) -> None:
        """Nobody needs a tree for `hold` any more; unknown holds are fine."""
        for tree in self.trees.values():
            if hold in tree.holds:
                tree.holds.discard(hold)
                tree.idle_since = trio.current_time()

    def hold(self, image_id: str, hold: str) -> bool:
        """Holds a tree that is mounted; False if it is not."""
        tree = self.trees.get(image_id)
        if tree is None or tree.state is not State.MOUNTED:
            return False
        tree.holds.add(hold)
        return True

    def is_mounted(self, image_id: str) -> bool:
        """Whether something is mounted in a tree's place, known or not. Does not touch it."""
        return mountinfo.mount_at(self.target(image_id)) is not None

    def in_use(self) -> list[str]:
        """Every hold."""
        return sorted({hold for tree in self.trees.values() for hold in tree.holds})

    def idle(self, linger_s: float) -> list[Tree]:
        """Trees that nobody has needed for so long, and that no container is recorded with.

        The record counts too: a server that died between its answer and the container's record of
        it has left no hold for its successor to find.
        """
        now = trio.current_time()
        found = [
            tree
            for tree in self.trees.values()
            if tree.state is State.MOUNTED
            and not tree.holds
            and not tree.coming
            and now - tree.idle_since >= linger_s
        ]
        recorded = self.recorded_images() if found else set()
        return [tree for tree in found if tree.image_id not in recorded]

    async def unmount_idle(self, linger_s: float) -> list[str]:
        """Unmounts those; returns the image IDs of what is gone. What fails is logged."""
        gone = []
        for tree in self.idle(linger_s):
            async with tree.lock:
                if tree.holds or tree.coming or tree.state is not State.MOUNTED:
                    continue  # a container came first
                try:
                    await self._unmount_now(tree)
                except ClipError as exc:  # the others go all the same; this one is tried again
                    log.error("tree %s: %s", tree.image_id, exc)
                    continue
                gone.append(tree.image_id)
        return gone

    async def remove_stale(self, image_id: str) -> None:
        """Removes mount and files of an image that has no tree, unless it gets one meanwhile."""
        tree = self.trees.setdefault(image_id, Tree(image_id))
        async with tree.lock:
            if self.trees.get(image_id) is not tree or tree.state is not State.ABSENT:
                return
            try:
                await self._worker.unmount(self.target(image_id))
                await trio.to_thread.run_sync(self._records.remove, image_id)
            finally:
                if not tree.coming:
                    del self.trees[image_id]

    async def abandon(self) -> None:
        """Detaches every tree that is left: the daemon is being stopped by force."""
        for tree in list(self.trees.values()):
            async with tree.lock:
                if tree.state is State.MOUNTED:
                    log.warning("abandoning a tree in use", extra={"image_id": tree.image_id})
                    await self._unmount_now(tree)

    async def _unmount_now(self, tree: Tree) -> None:
        assert tree.record is not None
        tree.move(State.UNMOUNTING)
        try:
            with trio.CancelScope(shield=True):
                await self._forget(tree.record)
        except ClipError:
            tree.move(State.MOUNTED)
            raise
        tree.move(State.ABSENT)
        del self.trees[tree.image_id]
        log.info("unmounted a tree", extra={"image_id": tree.image_id})

    async def _forget(self, record: TreeRecord) -> None:
        """Unmounts what a record describes, if it is mounted, and removes the record."""
        if record.mode == "fuse" and record.fuse_name in self._keeper.trees:
            await self._keeper.unmount_tree(record.fuse_name)
        await self._worker.unmount(self.target(record.image_id))
        self._layers.hide(record.image_id)
        await trio.to_thread.run_sync(self._records.remove, record.image_id)
        self.on_gone(record)


def _make_target(path: str) -> None:
    """Makes a mount point without looking at it: what is mounted there may be the server's own."""
    parent = os.path.dirname(path)
    os.makedirs(os.path.dirname(parent), mode=0o700, exist_ok=True)
    for directory in (parent, path):
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)

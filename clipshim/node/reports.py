"""Fills the documents of documents.py from a node."""

import os

import trio

from clipshim import __version__
from clipshim.errors import NotFoundError
from clipshim.index.model import Index, open_index
from clipshim.lazy.statistics import LayerStatistics
from clipshim.node.containers import Container, read_container, read_containers
from clipshim.node.documents import (
    CacheStatus,
    ContainerStatus,
    ImageStatus,
    LayerReport,
    Report,
    SpanTouch,
    Status,
)
from clipshim.node.keeper_state import read_state
from clipshim.node.node import Node
from clipshim.node.tree_mounts import Tree


async def status(node: Node) -> Status:
    """The node as it is now."""
    containers = await trio.to_thread.run_sync(read_containers, node.settings.run_dir)
    state = read_state(node.settings.run_dir)
    store = node.store.statistics()
    return Status(
        version=__version__,
        pid=os.getpid(),
        keeper_pid=state.keeper.pid if state and state.keeper else None,
        start_time=int(node.started),
        server_restarts=node.restarts,
        erofs=node.trees.erofs,
        images=[_image(tree) for tree in node.trees.trees.values() if tree.record is not None],
        containers=[_container(container) for container in containers],
        cache=CacheStatus(
            layers=store.layers,
            complete_layers=store.complete_layers,
            used_bytes=store.used_bytes,
            limit_bytes=store.limit_bytes,
            evicted_bytes=store.evicted_bytes,
            full=store.full,
        ),
        fetch=node.fetch_statistics().counters(),
        registries_not_answering=node.fetching.open_breakers(),
    )


def _image(tree: Tree) -> ImageStatus:
    record = tree.record
    assert record is not None
    return ImageStatus(
        image_id=record.image_id,
        reference=record.reference,
        mode=record.mode,
        state=tree.state.value,
        containers=len(tree.holds),
        layers=len(record.layers),
        size=sum(layer.size for layer in record.layers),
        mounted_at=int(tree.mounted_at),
        needs_daemon=not record.independent,
    )


def _container(container: Container) -> ContainerStatus:
    return ContainerStatus(
        id=container.id,
        key=container.cid,
        image_id=container.image_id,
        reference=container.text("reference"),
        kind=container.text("kind"),
        root=container.root,
    )


async def report(node: Node, wanted: str) -> Report:
    """What a container, by ID or key, has caused to be fetched. Raises NotFoundError."""
    container = await trio.to_thread.run_sync(_find, node.settings.run_dir, wanted)
    digest = container.text("index_digest")
    if not digest:
        raise NotFoundError(f"container {wanted}: its rootfs is not made yet")
    path = node.images.existing_path(digest)
    with await trio.to_thread.run_sync(open_index, path) as index:
        layers = [_layer(node, index, i) for i in range(len(index.layers))]
        tree = node.trees.trees.get(container.image_id)
        return Report(
            container=container.id,
            image_id=container.image_id,
            reference=index.reference,
            mode=tree.record.mode if tree and tree.record else container.text("mode"),
            image_bytes=sum(layer.blob_size for layer in index.layers),
            fetched_bytes=sum(layer.fetched_bytes for layer in layers),
            layers=layers,
            touched_at_start=[
                SpanTouch(order=order, layer=layer, span=span)
                for order, (layer, span) in enumerate(node.starts.touches(container.cid))
            ],
        )


def _layer(node: Node, index: Index, position: int) -> LayerReport:
    info = index.layers[position]
    shown = node.layers.get(info.key)
    statistics = shown.statistics() if shown is not None else LayerStatistics()
    stored = node.store.get(info.key)
    release = stored is None
    if stored is None:
        stored = node.store.open(info, index.span_table(position))
    try:
        return LayerReport(
            diff_id=info.diff_id,
            size=info.size,
            spans=len(stored.spans),
            cached_spans=stored.present_spans,
            complete=stored.is_complete,
            fetched_bytes=statistics.fetched_bytes,
            fetched_spans=statistics.fetched_spans,
            reads=statistics.reads,
        )
    finally:
        if release:
            node.store.release(info.key)


def _find(run_dir: str, wanted: str) -> Container:
    if "/" not in wanted and (found := read_container(run_dir, wanted)):
        return found
    matches = [c for c in read_containers(run_dir) if c.id == wanted or c.id.startswith(wanted)]
    exact = [c for c in matches if c.id == wanted]
    matches = exact or matches
    if len(matches) != 1:
        what = "no such container" if not matches else "more than one container of that name"
        raise NotFoundError(f"container {wanted}: {what}", hint="clipshim status lists them")
    return matches[0]

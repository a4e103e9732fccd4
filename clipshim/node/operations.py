"""The requests that the server answers, each a method. The protocol itself is rpc.py's."""

import logging
import os
from typing import Any

import trio

from clipshim import __version__
from clipshim.errors import NotFoundError, UsageError
from clipshim.node.cleanup import collect
from clipshim.node.keeper_state import read_state
from clipshim.node.node import Node
from clipshim.node.rpc import Handler, Request
from clipshim.node.server_life import ServerLife
from clipshim.settings import load_settings

log = logging.getLogger(__name__)


class Operations:
    """The table of requests."""

    def __init__(self, node: Node, life: ServerLife) -> None:
        self._node = node
        self._life = life

    def table(self) -> dict[str, Handler]:
        """Operation by name."""
        return {
            "ping": self.ping,
            "mount": self.mount,
            "release": self.release,
            "event": self.event,
            "status": self.status,
            "metrics": self.metrics,
            "report": self.report,
            "gc": self.gc,
            "complete": self.complete,
            "stop": self.stop,
            "replace": self.replace,
        }

    async def ping(self, request: Request) -> dict[str, Any]:
        """Who answers."""
        state = read_state(self._node.settings.run_dir)
        return {
            "version": __version__,
            "pid": os.getpid(),
            "keeper_pid": state.keeper.pid if state and state.keeper else None,
            "start_time": int(self._node.started),
        }

    async def mount(self, request: Request) -> dict[str, Any]:
        """Has a tree mounted, holds it, and sends a descriptor of it."""
        node = self._node
        container = request.optional_text("container")
        by_hand = request.flag("hold")
        if by_hand and container is None:
            raise UsageError("mount: hold: expected a name in container")
        mode = request.optional_text("mode") or node.settings.mode
        resolved = await node.resolver.resolve(
            request.fields.get("source"), request.fds, request.progress
        )
        facts = resolved.facts
        tree = await node.mount(resolved, container, mode, request.progress)
        try:
            request.reply_fds.append(await node.trees.clone(tree))
            if by_hand and container is not None:
                node.hand_mounts.add(container, facts.image_id)
        except BaseException:
            if container is not None:
                node.trees.release(container)
            raise
        assert tree.record is not None
        if container is not None and not by_hand:
            node.starts.begin(container, tree.record)
        return {
            "image_id": facts.image_id,
            "index_digest": facts.digest,
            "reference": facts.reference,
            "mode": tree.record.mode,
            "tree": node.trees.target(facts.image_id),
            "has_proc": facts.has_proc,
            "has_usr": facts.has_usr,
            "top_symlinks": facts.top_symlinks,
        }

    async def release(self, request: Request) -> dict[str, Any]:
        """A container or a mount by hand is gone. Idempotent."""
        container = request.text("container")
        self._node.starts.end(container)
        self._node.trees.release(container)
        self._node.hand_mounts.remove(container)
        return {}

    async def event(self, request: Request) -> dict[str, Any]:
        """What became of a container."""
        name = request.text("name")
        if name == "container_started":
            self._node.events.container_started()
            self._node.starts.started(request.optional_text("container") or "")
        elif name == "container_failed":
            self._node.events.container_failed(request.optional_text("cause") or "unknown")
        else:
            raise UsageError(f"event: unknown name {name!r}")
        return {}

    async def status(self, request: Request) -> dict[str, Any]:
        """The node as it is."""
        from clipshim.node.reports import status  # pydantic: 10 MB that a quiet node saves

        return (await status(self._node)).model_dump()

    async def metrics(self, request: Request) -> dict[str, Any]:
        """Prometheus's text."""
        from clipshim.node.metrics import metrics_text

        return {"text": metrics_text(self._node)}

    async def report(self, request: Request) -> dict[str, Any]:
        """What a container has fetched."""
        from clipshim.node.reports import report

        return (await report(self._node, request.text("container"))).model_dump()

    async def gc(self, request: Request) -> dict[str, Any]:
        """Removes garbage, or says what would go."""
        dry_run = request.flag("dry_run")
        return {"removed": await collect(self._node, dry_run=dry_run, unused_trees=True)}

    async def complete(self, request: Request) -> dict[str, Any]:
        """Fetches an image whole, so that its containers need the registry no more."""
        node, image = self._node, request.text("image")
        digest = await trio.to_thread.run_sync(node.images.find, image)
        if digest is None:
            raise NotFoundError(
                f"image {image}: no index of it in the local store",
                hint=f"make or fetch it: clipshim index {image}, clipshim pull {image}",
            )
        layers = await node.complete(digest, request.progress)
        return {"image": image, "index_digest": digest, "layers": layers}

    async def stop(self, request: Request) -> dict[str, Any]:
        """Ends the daemon, unless containers need it."""
        await self._life.stop(force=request.flag("force"), leave=False)
        return {}

    async def replace(self, request: Request) -> dict[str, Any]:
        """Has keeper and server started anew, from the code that is installed now."""
        await trio.to_thread.run_sync(load_settings)  # else it would go on with the old ones
        await self._node.keeper.ask({"op": "replace"})
        return {}

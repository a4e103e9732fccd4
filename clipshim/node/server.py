"""The server: serves the layers mount and answers clients. The keeper starts it again if it dies.

Nothing here may touch the node's own FUSE mounts, in no thread either: this process is the one
that would have to answer. Mounting goes through mount_worker.py.
"""

import gc
import logging
import os
import signal
import sys

import trio

from clipshim.errors import ClipError
from clipshim.lazy.fuse_session import FuseSession
from clipshim.lazy.layers_fs import LayersOperations
from clipshim.node.cleanup import keep_clean
from clipshim.node.keeper import resolve_directories
from clipshim.node.keeper_link import KeeperLink, ServerArguments
from clipshim.node.kept_settings import settings_of_daemon
from clipshim.node.node import Node
from clipshim.node.operations import Operations
from clipshim.node.processes import raise_limits
from clipshim.node.rpc import RpcServer
from clipshim.node.self_access import DEBUG_ENV, forbid
from clipshim.node.server_life import ServerLife
from clipshim.settings import Settings

log = logging.getLogger("clipshim.node.server")


async def run(settings: Settings, arguments: str) -> None:
    """Until told to end, or until the layers mount is gone."""
    fds, tree_fds, generation, restarts = ServerArguments.parse(arguments)
    async with trio.open_nursery() as nursery:
        spare = {name: fds[name] for name in ("listener", "layers", "lock")}
        keeper = KeeperLink(fds["control"], spare, dict(tree_fds), generation)
        life = ServerLife(keeper, nursery.cancel_scope)
        keeper.on_order = life.on_order
        node = Node(settings, nursery, keeper, generation, restarts)
        try:
            records = node.trees.expect()
            nursery.start_soon(_end_on_signal, life)
            nursery.start_soon(keeper.run)
            if fds["layers"] >= 0:
                session = FuseSession(LayersOperations(node.layers), fds["layers"])
                life.serves(session)
                nursery.start_soon(_serve_layers, session, life)
            else:
                node.lazy = False
            await node.take_over(records)
            life.recovered(node.trees)
            nursery.start_soon(keep_clean, node)  # before the first request could see garbage
            rpc = RpcServer(fds["listener"], Operations(node, life).table())
            await nursery.start(rpc.serve)
            await keeper.ask({"op": "ready"})
            log.info("serving", extra={"trees": len(node.trees.trees)})
            gc.freeze()  # what is loaded now stays: later collections need not walk it
            nursery.start_soon(node.keep_house)
            nursery.start_soon(node.keep_synced)
            if settings.metrics_address:
                nursery.start_soon(_serve_metrics, node)
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 10.0):
                await trio.to_thread.run_sync(node.close, abandon_on_cancel=True)


async def _serve_layers(session: FuseSession, life: ServerLife) -> None:
    await session.serve()
    life.served()


async def _serve_metrics(node: Node) -> None:
    from clipshim.node.metrics import serve_http  # prometheus_client: 4 MB that few need

    address = node.settings.metrics_address
    try:
        await serve_http(node, address)
    except (OSError, ValueError) as exc:
        log.error("metrics at %s: %s", address, exc)


async def _end_on_signal(life: ServerLife) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            log.info("making room for another server")
            life.end_soon()


def main() -> int:
    """Entry point of `python -I -m clipshim.node.server JSON`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the keeper decides
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise_limits()
    try:
        settings = settings_of_daemon()
        resolve_directories(settings)
        if os.environ.get(DEBUG_ENV):
            forbid(settings)
        trio.run(run, settings, sys.argv[1])
    except (ClipError, OSError) as exc:
        log.error("%s", exc)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How a server ends: stopped for good, or making room for its successor."""

import logging

import trio

from clipshim.errors import DaemonError
from clipshim.lazy.fuse_session import FuseSession
from clipshim.node.control import Message
from clipshim.node.keeper_link import KeeperLink
from clipshim.node.tree_mounts import TreeMounts

log = logging.getLogger(__name__)

# For reads that nobody else could answer (Linux before 6.9); the keeper kills after 20.
FINISH_S = 15.0


class ServerLife:
    """Decides on stops. `scope` is cancelled when the server is to end."""

    def __init__(self, keeper: KeeperLink, scope: trio.CancelScope) -> None:
        self._keeper = keeper
        self._scope = scope
        self._trees: TreeMounts | None = None
        self._recovered = trio.Event()
        self._session: FuseSession | None = None
        self._ending = False

    def recovered(self, trees: TreeMounts) -> None:
        """From now on it is known who uses what."""
        self._trees = trees
        self._recovered.set()

    async def stop(self, *, force: bool, leave: bool) -> None:
        """Ends the daemon. Raises DaemonError if trees are in use, unless forced or left mounted.

        `leave`: what is in use stays mounted for the next daemon (systemd keeps the connections).
        """
        await self._recovered.wait()
        assert self._trees is not None
        in_use = self._trees.in_use()
        if in_use and not force and not leave:
            raise DaemonError(
                f"not stopped: in use by {', '.join(in_use[:5])}"
                + (f" and {len(in_use) - 5} more" if len(in_use) > 5 else ""),
                hint="stop the containers first; an upgrade needs `clipshim daemon --replace` only",
            )
        await self._trees.unmount_idle(0.0)
        if not leave:
            await self._trees.abandon()
        self._keeper.leaving = True
        await self._keeper.ask({"op": "stop", "leave": leave and bool(in_use)})
        log.info("stopping", extra={"left_mounted": len(in_use)})
        self.end_soon()

    def serves(self, session: FuseSession) -> None:
        """This session is to be finished before the end."""
        self._session = session

    def served(self) -> None:
        """The session is over."""
        if not self._ending:
            log.warning("the layers mount is gone")
        self._scope.cancel()

    def end_soon(self) -> None:
        """Ends this server; the answers that are being written still go out."""
        self._ending = True
        finishing = self._session is not None and self._session.finish()
        wait_s = FINISH_S if finishing else 0.2
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + wait_s)

    async def on_order(self, message: Message) -> None:
        """What the keeper wants."""
        if message.get("op") != "stop":
            log.warning("keeper: unknown order %r", message.get("op"))
            return
        try:
            await self.stop(force=bool(message.get("force")), leave=bool(message.get("leave")))
        except DaemonError as exc:
            log.error("%s", exc)
            in_use = self._trees.in_use()[:20] if self._trees else []
            self._keeper.tell({"op": "refuse_stop", "in_use": in_use})

"""The server's end of the control socket: requests to the keeper, its orders, and its death."""

import json
import logging
import os
import socket
import subprocess
from typing import TYPE_CHECKING, NamedTuple

import trio

from clipshim.errors import DaemonError, MountError
from clipshim.node.control import (
    Message,
    close_all,
    control_pair,
    receive_message,
    send_message,
)
from clipshim.node.keeper_loop import keeper_command
from clipshim.node.processes import ProcessId

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 60.0


class KeeperLink:
    """Holds spare copies of all that the keeper holds, to start a new one if it dies."""

    def __init__(
        self,
        control_fd: int,
        spare: dict[str, int],
        trees: dict[str, int],
        generation: str,
    ) -> None:
        self._socket = self._prepared(socket.socket(fileno=control_fd))
        self._spare = spare  # listener, layers, lock
        self.trees = trees  # image ID -> FUSE connection
        self._generation = generation
        self.on_order: Callable[[Message], Awaitable[None]] = _ignore
        self._turn = trio.Lock()
        self._answers: dict[int, tuple[Message, list[int]]] = {}
        self._answered = trio.Condition()
        self._next_id = 0
        self._awaited = 0  # the number of the request whose answer is waited for; 0: none
        self.keeper_deaths = 0
        self.leaving = False  # the daemon ends: a keeper that is gone is no accident

    @staticmethod
    def _prepared(sock: socket.socket) -> socket.socket:
        sock.setblocking(False)
        os.set_inheritable(sock.fileno(), False)
        return sock

    async def run(self) -> None:
        """Reads what the keeper says; replaces it when it is gone."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    await trio.lowlevel.wait_readable(self._socket)
                    message, fds = receive_message(self._socket)
                except BlockingIOError:
                    continue
                except (EOFError, ConnectionError):
                    if self.leaving:
                        return
                    await self._start_keeper()
                    continue
                except ValueError:
                    log.exception("keeper sent something else than a message")
                    continue
                if message.get("id", -1) == self._awaited:
                    async with self._answered:
                        self._answers[self._awaited] = (message, fds)
                        self._answered.notify_all()
                elif "id" in message:
                    close_all(fds)  # an answer that came too late
                else:
                    close_all(fds)
                    nursery.start_soon(self.on_order, message)

    async def _start_keeper(self) -> None:
        self.keeper_deaths += 1
        log.warning("keeper is gone, starting a new one")
        try:
            ours, theirs = control_pair()
        except OSError as exc:
            await self._try_later(exc)
            return
        known = {"generation": self._generation, "server": ProcessId.of(os.getpid())}
        adoption = {"control": theirs.fileno(), "trees": self.trees, "known": known} | self._spare
        held = [*self._spare.values(), *self.trees.values()]
        fds = [theirs.fileno(), *(fd for fd in held if fd >= 0)]
        with theirs:
            try:
                subprocess.Popen(  # noqa: ASYNC220  # a fork; nothing is waited for
                    keeper_command(adoption), stdin=subprocess.DEVNULL, pass_fds=fds
                )
            except OSError as exc:
                ours.close()
                await self._try_later(exc)
                return
        self._socket.close()
        self._socket = self._prepared(ours)
        async with self._answered:  # who waits for the dead keeper's answer must ask again
            for _, fds in self._answers.values():
                close_all(fds)
            self._answers.clear()
            self._answered.notify_all()

    @staticmethod
    async def _try_later(exc: OSError) -> None:
        log.error("keeper cannot be started: %s", exc)
        await trio.sleep(1.0)  # back-off: out of descriptors, processes or memory

    async def ask(self, request: Message) -> list[int]:
        """Sends a request; returns the descriptors of the answer. Raises DaemonError."""
        async with self._turn:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + REQUEST_TIMEOUT_S):
                deaths = self.keeper_deaths
                self._next_id += 1
                number = self._awaited = self._next_id
                try:
                    send_message(self._socket, request | {"id": number})
                    reply, fds = await self._answer(number, deaths, str(request["op"]))
                except OSError as exc:
                    raise DaemonError(f"keeper: {exc}") from exc
                finally:
                    self._awaited = 0
                    _, late = self._answers.pop(number, ({}, []))
                    close_all(late)
                if not reply.get("ok"):
                    close_all(fds)
                    raise DaemonError(f"keeper: {reply.get('error')}")
                return fds
        raise DaemonError(f"keeper: no answer to {request['op']}")

    async def _answer(self, number: int, deaths: int, op: str) -> tuple[Message, list[int]]:
        async with self._answered:
            while number not in self._answers:
                if self.keeper_deaths != deaths:
                    raise DaemonError(f"keeper died during {op}")
                await self._answered.wait()
            return self._answers.pop(number)

    def tell(self, message: Message) -> None:
        """Sends a message that needs no answer."""
        try:
            send_message(self._socket, message)
        except OSError as exc:
            log.warning("keeper: %s", exc)

    async def mount_tree(self, image_id: str, target: str, config: dict[str, object]) -> None:
        """Has the keeper show a tree in mode fuse. Raises MountError."""
        request = {"op": "mount_tree", "image_id": image_id, "target": target, "config": config}
        try:
            fds = await self.ask(request)
        except DaemonError as exc:
            raise MountError(f"tree {image_id}: {exc.message}") from exc
        if len(fds) != 1:
            close_all(fds)
            raise MountError(f"tree {image_id}: the keeper sent no connection")
        self.trees[image_id] = fds[0]

    async def unmount_tree(self, image_id: str) -> None:
        """Has the keeper take a mode-fuse tree away."""
        await self.ask({"op": "unmount_tree", "image_id": image_id})
        fd = self.trees.pop(image_id, -1)
        if fd >= 0:
            os.close(fd)


async def _ignore(message: Message) -> None:
    log.warning("keeper: order %r came too early", message.get("op"))


class ServerArguments(NamedTuple):
    """What the keeper starts a server with."""

    fds: dict[str, int]  # control, listener, layers, lock
    trees: dict[str, int]
    generation: str
    restarts: int  # servers that died before this one

    @classmethod
    def parse(cls, text: str) -> "ServerArguments":
        """From the command line."""
        return cls(**json.loads(text))

"""The keeper's event loop: what it holds, whom it watches, whom it obeys.

How it starts is keeper.py's. Standard library only.
"""

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import sys
import time
from typing import Any

from clipshim.errors import DaemonError
from clipshim.lazy import fuse_wire
from clipshim.mounts import mountinfo, syscalls
from clipshim.node import fuse_connection, own_cgroup, sd_notify
from clipshim.node.children import Child
from clipshim.node.control import (
    Message,
    close_all,
    control_pair,
    in_memory,
    receive_message,
    send_message,
)
from clipshim.node.keeper_state import (
    STATE_NAME,
    KeeperState,
    TreeState,
    new_generation,
    write_state,
)
from clipshim.node.processes import ProcessId
from clipshim.settings import Settings

log = logging.getLogger("clipshim.node.keeper")

# More makes the kernel ask for spans that nobody reads; lazy/readahead.py looks ahead itself.
READAHEAD_KIB = 128
END_TIMEOUT_S = 20.0  # for children that were told to end, before SIGKILL
SERVER_MODULE = "clipshim.node.server"
TREE_MODULE = "clipshim.node.tree_server"
MAX_ARGUMENT = 64 << 10  # MAX_ARG_STRLEN of execve(2) is 128 KiB; a thousand layers need more

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
early_signals: set[int] = set()  # that came before the loop


def note_early_signals() -> None:
    """For a keeper that executed itself, before it starts a child: takes signals, for the loop."""
    for number in SIGNALS:
        signal.signal(number, lambda number, _frame: early_signals.add(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class Keeper:
    """The event loop. Descriptors are plain ints here: they outlive everything else."""

    def __init__(
        self,
        settings: Settings,
        state: KeeperState,
        *,
        lock_fd: int,
        listener_fd: int,
        layers_fd: int,
        tree_fds: dict[str, int],
    ) -> None:
        self.settings = settings
        self.state = state
        self.lock_fd = lock_fd
        self.listener_fd = listener_fd
        self.layers_fd = layers_fd
        self.tree_fds = tree_fds
        self.server = Child("server")
        self.trees: dict[str, Child] = {image_id: Child(image_id) for image_id in tree_fds}
        self.control: socket.socket | None = None
        self.stopping = False  # the server agreed to stop: its exit is the end
        self.stop_wanted: Message | None = None  # to be sent when a server is up
        self.leave_mounts = False
        self.replacing = False
        self._end_by = 0.0
        self._selector = selectors.DefaultSelector()
        self._wakeup, writer = socket.socketpair()
        for sock in (self._wakeup, writer):
            sock.setblocking(False)
        self._wakeup_writer = writer
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._on_wakeup)

    # Processes

    def start_server(self) -> None:
        """Starts a server that takes over the connections and the listening socket."""
        if self.layers_fd >= 0 and not fuse_connection.is_alive(self.layers_fd):
            self._replace_layers()
        try:
            ours, theirs = control_pair()
        except OSError as exc:
            self._try_server_later(exc)
            return
        names = {
            "control": theirs.fileno(),
            "listener": self.listener_fd,
            "layers": self.layers_fd,
            "lock": self.lock_fd,
        }
        arguments = {
            "fds": names,
            "trees": self.tree_fds,
            "generation": self.state.generation,
            "restarts": self.server.deaths,
        }
        fds = [fd for fd in (*names.values(), *self.tree_fds.values()) if fd >= 0]
        with theirs:
            try:
                self.server.start(SERVER_MODULE, [json.dumps(arguments)], fds)
            except OSError as exc:  # out of processes or memory: it may pass
                ours.close()
                self._try_server_later(exc)
                return
        self._watch_server(ours)
        log.info(
            "server started", extra={"server_pid": self.server.process and self.server.process.pid}
        )

    def _try_server_later(self, exc: OSError) -> None:
        self.server.restart_at = time.monotonic() + 1.0
        log.error("server cannot be started: %s", exc)

    def _replace_layers(self) -> None:
        """Somebody aborted the layers mount: trees on it are lost, new ones are not."""
        log.error("the layers mount is gone; containers that need uncached data are lost")
        try:
            unmount_all(self.settings.layers_mount)
            fd = mount_layers(self.settings)
        except (OSError, DaemonError) as exc:
            log.error("layers mount: %s", exc)
            return  # the server ends at once, and after the back-off this is tried again
        os.close(self.layers_fd)
        self.layers_fd = fd
        self.state.generation = new_generation()

    def adopt_server(self, control_fd: int) -> None:
        """Goes on with a server that outlived the last keeper."""
        if self.server.adopt(self.state.server):
            self._watch_server(socket.socket(fileno=control_fd))
        else:
            os.close(control_fd)
            self.server.restart_soon()

    def _watch_server(self, control: socket.socket) -> None:
        self.control = control
        self.state.server = self.server.process
        self._selector.register(control, selectors.EVENT_READ, self._on_control)
        self._selector.register(self.server.pidfd, selectors.EVENT_READ, self._on_server_exit)
        self.write_state()

    def start_tree(self, image_id: str) -> None:
        """Starts the server of one tree on its connection."""
        child, tree = self.trees[image_id], self.state.trees[image_id]
        arguments = {"fuse_fd": self.tree_fds[image_id], "image_id": image_id} | tree.config
        try:
            self._start_with(child, json.dumps(arguments), self.tree_fds[image_id])
        except OSError as exc:
            child.restart_at = time.monotonic() + 1.0
            log.error("tree server cannot be started: %s", exc, extra={"image_id": image_id})
            return
        self._watch_tree(image_id)

    @staticmethod
    def _start_with(child: Child, text: str, fd: int) -> None:
        if len(text) <= MAX_ARGUMENT:
            child.start(TREE_MODULE, [text], [fd])
            return
        config_fd = in_memory(text.encode())
        try:
            child.start(TREE_MODULE, [str(config_fd)], [fd, config_fd])
        finally:
            os.close(config_fd)

    def adopt_trees(self) -> None:
        """Goes on with the tree servers of the last keeper, or starts them again."""
        for image_id, child in self.trees.items():
            if child.adopt(self.state.trees[image_id].process):
                self._watch_tree(image_id)
            else:
                child.restart_soon()

    def _watch_tree(self, image_id: str) -> None:
        child = self.trees[image_id]

        def on_exit() -> None:
            self._on_tree_exit(image_id)

        self._selector.register(child.pidfd, selectors.EVENT_READ, on_exit)
        self.state.trees[image_id].process = child.process
        self.write_state()

    def _on_server_exit(self) -> None:
        self._selector.unregister(self.server.pidfd)
        pid = self.server.process.pid if self.server.process else 0
        status = self.server.exited()
        self.state.server = None
        if self.control is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self.control)
            self.control.close()
            self.control = None
        if self.stopping:
            return
        if self.replacing:
            self.server.restart_soon()
            return
        log.warning(
            "server ended, a new one takes over", extra={"server_pid": pid, "status": status}
        )

    def _on_tree_exit(self, image_id: str) -> None:
        child = self.trees[image_id]
        self._selector.unregister(child.pidfd)
        status = child.exited()
        tree = self.state.trees[image_id]
        tree.process = None
        if not fuse_connection.is_alive(self.tree_fds[image_id]):  # nothing has it mounted any more
            self._drop_tree(image_id)
        elif self.replacing:
            child.restart_soon()
        else:
            log.warning(
                "tree server ended, a new one takes over",
                extra={"image_id": image_id, "status": status},
            )
        self.write_state()

    def _drop_tree(self, image_id: str) -> None:
        os.close(self.tree_fds.pop(image_id))
        del self.trees[image_id], self.state.trees[image_id]
        sd_notify.forget_fd(f"tree-{image_id}")

    # Requests of the server

    def _on_control(self) -> None:
        assert self.control is not None
        try:
            message, fds = receive_message(self.control)
        except (EOFError, OSError, ValueError):
            self._selector.unregister(self.control)  # its exit comes through the pidfd
            return
        close_all(fds)
        reply: Message
        reply_fds: list[int] = []
        try:
            reply, reply_fds = self._serve(message)
        except (OSError, KeyError, TypeError, DaemonError) as exc:
            reply = {"ok": False, "error": str(exc)}
        except Exception as exc:
            log.exception("request of the server failed")  # the keeper must not die of a bug
            reply = {"ok": False, "error": f"{type(exc).__name__}: {exc}"}
        if "id" in message:
            self._tell(reply | {"id": message["id"]}, reply_fds)

    def _serve(self, message: Message) -> tuple[Message, list[int]]:
        match message.get("op"):
            case "ready":
                sd_notify.notify("READY=1\nSTATUS=serving")
                if self.stop_wanted is not None:
                    self._tell(self.stop_wanted)
                    self.stop_wanted = None
            case "mount_tree":
                return {"ok": True}, [self._mount_tree(message)]
            case "unmount_tree":
                self._unmount_tree(message["image_id"])
            case "stop":
                self.stopping, self.leave_mounts = True, bool(message.get("leave"))
                sd_notify.notify("STOPPING=1")
            case "refuse_stop":
                log.error(
                    "not stopped: containers use mounted trees",
                    extra={"containers": ",".join(message.get("in_use", []))},
                )
            case "replace":
                self.replace()
            case other:
                raise DaemonError(f"keeper: unknown request {other!r}")
        return {"ok": True}, []

    def _mount_tree(self, message: Message) -> int:
        image_id, target = str(message["image_id"]), str(message["target"])
        if image_id in self.trees:
            raise DaemonError(f"tree {image_id} is being shown already")
        fd, kernel_flags = fuse_connection.mount_fuse(target, nosuid=False, posix_acl=True)
        self.tree_fds[image_id] = fd
        no_opendir = bool(kernel_flags & fuse_wire.NO_OPENDIR_SUPPORT)
        config = dict(message["config"]) | {"no_opendir": no_opendir}
        self.state.trees[image_id] = TreeState(target, config)
        self.trees[image_id] = Child(image_id)
        if not self.write_state():  # the next keeper would not know of it
            self._unmount_tree(image_id)
            self._drop_tree(image_id)
            raise DaemonError(f"{STATE_NAME} cannot be written: see the daemon's log")
        sd_notify.store_fd(f"tree-{image_id}", fd)
        fuse_connection.set_readahead(target, READAHEAD_KIB)
        self.start_tree(image_id)
        return fd

    def _unmount_tree(self, image_id: str) -> None:
        tree = self.state.trees.get(image_id)
        if tree is None:
            return
        self.trees[image_id].ending = True
        with contextlib.suppress(OSError):  # EINVAL: somebody unmounted it by hand
            syscalls.umount2(tree.target, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)

    def _tell(self, message: Message, fds: list[int] | None = None) -> None:
        if self.control is not None:
            with contextlib.suppress(OSError):  # it died: the pidfd says so too
                send_message(self.control, message, fds or ())

    # Stop and replace

    def ask_to_stop(self, *, force: bool) -> None:
        """Has the server decide whether the daemon may stop."""
        # under systemd the descriptor store keeps the connections until the next start
        leave = "NOTIFY_SOCKET" in os.environ
        message: Message = {"op": "stop", "force": force, "leave": leave}
        if self.control is not None:
            self._tell(message)
        else:
            self.stop_wanted = message

    def replace(self) -> None:
        """Ends the children; when the last is gone the keeper executes itself anew."""
        if self.replacing or self.stopping:
            return
        log.info("replacing the daemon's processes")
        self.replacing, self._end_by = True, time.monotonic() + END_TIMEOUT_S
        for child in (self.server, *self.trees.values()):
            child.kill(signal.SIGTERM)

    def _execute_anew(self) -> None:
        if not self.write_state():  # it would not find what it holds
            self._stay()
            return
        adoption = {
            "control": None,
            "listener": self.listener_fd,
            "layers": self.layers_fd,
            "lock": self.lock_fd,
            "trees": self.tree_fds,
        }
        for fd in (self.listener_fd, self.layers_fd, self.lock_fd, *self.tree_fds.values()):
            if fd >= 0:
                os.set_inheritable(fd, True)
        # till there are handlers again: one more SIGHUP must not end it, and a SIGTERM is not lost
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            os.execv(sys.executable, keeper_command(adoption))  # noqa: S606  # no shell is meant
        except OSError as exc:  # in the middle of an upgrade there may be no Python
            log.error("not replaced: %s: %s", sys.executable, exc)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            self._stay()

    def _stay(self) -> None:
        """Goes on with the old code: its children are started again."""
        self.replacing = False
        for child in (self.server, *self.trees.values()):
            child.restart_soon()

    # Loop

    def run(self) -> int:
        """Until the daemon has stopped. Returns the exit status."""
        self._handle_signals()
        self.write_state()
        while True:
            if self.stopping and not self.server.running:
                return self._finish()
            children = (self.server, *self.trees.values())
            if self.replacing and not any(child.running for child in children):
                self._execute_anew()
            self._restart_what_is_due()
            for key, _ in self._selector.select(self._timeout()):
                key.data()
            if self.replacing and time.monotonic() > self._end_by:
                for child in children:
                    child.kill(signal.SIGKILL)

    def _restart_what_is_due(self) -> None:
        if self.replacing or self.stopping:
            return
        now = time.monotonic()
        if self.server.restart_at is not None and now >= self.server.restart_at:
            self.start_server()
        for image_id, child in list(self.trees.items()):
            if child.restart_at is not None and now >= child.restart_at:
                self.start_tree(image_id)

    def _timeout(self) -> float | None:
        if self.replacing:
            return 0.5
        times = [child.restart_at for child in (self.server, *self.trees.values())]
        due = [at for at in times if at is not None]
        return max(0.0, min(due) - time.monotonic()) if due and not self.stopping else None

    def _handle_signals(self) -> None:
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        for early in sorted(early_signals):
            self._on_signal(early)
        early_signals.clear()

    def _on_wakeup(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self._wakeup.recv(64):
                self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP:
            self.replace()
        else:
            self.ask_to_stop(force=False)

    def write_state(self) -> bool:
        """Brings keeper.json up to date; whether that worked."""
        try:
            self.state.keeper = ProcessId.of(os.getpid())
            write_state(self.settings.run_dir, self.state)
        except OSError as exc:  # disk full: a successor would find less, nothing else breaks
            log.error("%s cannot be written: %s", STATE_NAME, exc)
            return False
        return True

    def _finish(self) -> int:
        """The server is gone for good: ends tree servers and unmounts, or leaves it to systemd."""
        run_dir = self.settings.run_dir
        for name in () if self.leave_mounts else ("daemon.sock", STATE_NAME):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{run_dir}/{name}")
        for image_id, child in self.trees.items():
            if not self.leave_mounts:
                self._unmount_tree(image_id)
            if child.ending:  # unmounted, perhaps a moment ago: its server may still be there
                sd_notify.forget_fd(f"tree-{image_id}")
            child.kill(signal.SIGTERM)
        if self.leave_mounts:
            log.info("stopped, mounts stay for the next start")
            return 0
        unmount_all(self.settings.layers_mount)
        sd_notify.forget_fd("layers")
        own_cgroup.remove()
        log.info("stopped")
        return 0


def keeper_command(adoption: dict[str, Any] | None = None) -> list[str]:
    """The command line of a keeper, as itself and the server start it."""
    command = [sys.executable, "-I", "-m", "clipshim.node.keeper"]
    return [*command, "--adopt", json.dumps(adoption)] if adoption is not None else command


def unmount_all(target: str) -> None:
    """Detaches whatever is mounted at `target`, without touching it: it may be dead or hang."""
    while mountinfo.mount_at(target) is not None:
        syscalls.umount2(target, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)


def mount_layers(settings: Settings) -> int:
    """The connection of the layers mount; -1 without FUSE, if images may be unpacked instead."""
    try:
        fd = fuse_connection.mount_fuse(settings.layers_mount, nosuid=True).fd
    except OSError as exc:
        if settings.fallback != "unpack":
            raise DaemonError(
                f"layers mount at {settings.layers_mount}: {exc}",
                hint='load the module fuse, or set fallback = "unpack"',
            ) from exc
        log.warning("no FUSE here, images are unpacked whole: %s", exc)
        return -1
    fuse_connection.set_readahead(settings.layers_mount, READAHEAD_KIB)
    sd_notify.store_fd("layers", fd)
    return fd

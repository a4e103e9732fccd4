"""The client of the node daemon, against a socket that the test answers."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

from clipshim.shim import daemon_client

if TYPE_CHECKING:
    from pathlib import Path


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    """A server that is being replaced accepts nobody for a moment."""
    path = str(tmp_path / "daemon.sock")
    waiting: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(path)
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(path)
                waiting.append(client)
        assert waiting
        started = threading.Event()

        def serve() -> None:
            started.wait()
            while True:
                connection, _ = listener.accept()
                with connection:
                    if connection.recv(100).endswith(b"\n"):
                        connection.sendall(b'{"ok": true, "n": 7}\n')
                        return

        def end_the_others() -> None:
            started.set()
            for client in waiting:
                client.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(0.2, end_the_others)
        server = threading.Thread(target=serve)
        server.start()
        timer.start()
        try:
            reply = daemon_client.ask(path, {"op": "ping"}, timeout_s=120)
        finally:
            timer.join()
            server.join()
        assert reply.values["n"] == 7

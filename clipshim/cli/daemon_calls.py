"""Calls of the node daemon from commands: one place that knows its client."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from clipshim.errors import DaemonError
from clipshim.node import client

if TYPE_CHECKING:
    from collections.abc import Callable

    from clipshim.settings import Settings


def is_running(settings: Settings) -> bool:
    """Whether a daemon listens; a socket file that nobody serves is none.

    Raises DaemonError when the caller may not know.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(settings.daemon_socket)
        except PermissionError as exc:
            raise DaemonError(
                f"node daemon: {settings.daemon_socket}: {exc.strerror}", hint="run it as root"
            ) from exc
        except OSError:
            return False
    return True


def call(
    settings: Settings,
    request: dict[str, Any],
    *,
    start: bool = True,
    timeout_s: float | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The daemon's answer; starts one if none runs, unless told not to. Raises ClipError."""
    return client.call(settings, request, start=start, timeout_s=timeout_s, on_progress=on_progress)


def call_for_tree(
    settings: Settings, index_fd: int, origin: str, container: str, mode: str
) -> tuple[dict[str, Any], int]:
    """Has a tree mounted and held under the name `container`; its facts and a mount's fd."""
    request = {
        "op": "mount",
        "container": container,
        "cid": None,
        "source": {"fd": True, "origin": origin},
        "mode": mode,
        "hold": True,
    }
    reply, tree = client.call_for_fd(settings, request, fds=[index_fd])
    if tree is None:
        raise DaemonError("node daemon: expected a descriptor with its reply, got none")
    return reply, tree


def release(settings: Settings, container: str) -> None:
    """Gives up what `container` holds; nothing happens if no daemon runs."""
    if is_running(settings):
        client.call(settings, {"op": "release", "container": container}, start=False)

"""The daemon's client for the command line: the shim's client, with a daemon started if needed."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from clipshim.settings import Settings
from clipshim.shim import daemon_client
from clipshim.shim.daemon_start import ask_daemon

LONG_TIMEOUT_S = 24 * 3600.0
LONG_OPERATIONS = ("complete", "gc")  # as long as the network or the disk takes


def call(
    settings: Settings,
    request: dict[str, Any],
    *,
    fds: Sequence[int] = (),
    start: bool = True,
    timeout_s: float | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The final answer; descriptors in it are closed. Raises ClipError."""
    values, fd = call_for_fd(
        settings, request, fds=fds, start=start, timeout_s=timeout_s, on_progress=on_progress
    )
    if fd is not None:
        os.close(fd)
    return values


def call_for_fd(
    settings: Settings,
    request: dict[str, Any],
    *,
    fds: Sequence[int] = (),
    start: bool = True,
    timeout_s: float | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[dict[str, Any], int | None]:
    """The final answer and its first descriptor, if any, which the caller then owns."""
    if timeout_s is None and request.get("op") in LONG_OPERATIONS:
        timeout_s = LONG_TIMEOUT_S
    if start and timeout_s is None:
        reply = ask_daemon(settings, request, fds=fds, on_progress=on_progress)
    else:
        if start:
            ask_daemon(settings, {"op": "ping"}).close()
        reply = daemon_client.ask(
            settings.daemon_socket,
            request,
            fds=fds,
            timeout_s=timeout_s or settings.daemon_timeout_s,
            on_progress=on_progress,
        )
    fd = reply.fds.pop(0) if reply.fds else None
    reply.close()
    return reply.values, fd

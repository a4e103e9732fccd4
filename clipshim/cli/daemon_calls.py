"""Calls of the node daemon from commands: one place that knows its client."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipshim.settings import Settings


def is_running(settings: Settings) -> bool:
    """Whether a daemon listens; a socket file that nobody serves is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(settings.daemon_socket)
        except OSError:
            return False
    return True

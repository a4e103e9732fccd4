"""Asks a registry whether it is there, for `clipshim doctor`. No credentials are sent."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from clipshim.registry.access import RegistryAccess
from clipshim.registry.references import Reference
from clipshim.registry.replies import drain

if TYPE_CHECKING:
    from clipshim.registry.mirrors import Endpoint
    from clipshim.settings import Settings

PATIENCE_S = 15.0


def ping_registry(settings: Settings, host: str) -> str:
    """How the registry `host` (or its first mirror that works) answers. Raises RegistryError."""
    access = RegistryAccess.from_settings(settings, anonymous=True)
    deadline = time.monotonic() + PATIENCE_S

    def ask(endpoint: Endpoint) -> str:
        with access.transport.fetch_url(
            f"{endpoint.base}/", headers={}, deadline=deadline, endpoint=endpoint,
            accept=(200, 401, 403),
        ) as reply:  # fmt: skip
            drain(reply)
            word = "answers" if reply.status == 200 else "answers, wants credentials"
            return f"{endpoint.host} {word}"

    try:
        return access.transport.exchange(
            Reference(host, "clipshim/doctor", "latest"), ask,
            capability="resolve", what=f"registry {host}", deadline=deadline, attempts=1,
        )  # fmt: skip
    finally:
        access.transport.close()

"""Which servers keep silent, so that a dead one costs its readers seconds, and not each of them.

While there is another server to ask, none is waited for longer than PATIENCE_S; one that kept
silent that long is asked after the others for a while. Not for refusals: a server that says no
is as quick as one that says yes. Nor for who is asked at all, which is for `exchange` to decide.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clipshim.registry.attempts import AttemptFailed
    from clipshim.registry.mirrors import Endpoint

# For a connection, and again for the first byte. A registry answers in tenths of a second; a lost
# SYN is sent again after one second.
PATIENCE_S = 3.0
FIRST_AVOIDED_S = 10.0
LONGEST_AVOIDED_S = 120.0
MAX_SERVERS = 1000  # indexes name hosts, and they are hostile
SILENCE = frozenset({"connect", "stall", "drip", "dns", "refused"})


class _Silence:
    __slots__ = ("times", "until")

    def __init__(self) -> None:
        self.times = 0
        self.until = 0.0


class ServerHealth:
    """What is known of servers by their base URL. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._silent: dict[str, _Silence] = {}  # the one that changed last is the last

    def in_order(self, servers: Iterable[Endpoint], distrusted: frozenset[str]) -> list[Endpoint]:
        """The servers as given, but the silent ones after the others, the distrusted last.

        When a server has been avoided for its time, one caller is told to try it again.
        """
        return sorted(
            servers, key=lambda item: (item.base in distrusted, not self._may_try(item.base))
        )

    def is_avoided(self, base: str) -> bool:
        """Whether the server kept silent a moment ago."""
        with self._lock:
            known = self._silent.get(base)
            return known is not None and time.monotonic() < known.until

    def answered(self, base: str) -> None:
        """The server said something, whatever it was."""
        if base in self._silent:
            with self._lock:
                self._silent.pop(base, None)

    def failed(self, base: str, failure: AttemptFailed, waited_s: float) -> None:
        """An attempt that began `waited_s` ago failed."""
        if failure.status is not None:
            self.answered(base)
        elif failure.cause in ("refused", "dns") or (
            # not when it was the caller's deadline that left it no time
            failure.cause in SILENCE and waited_s >= PATIENCE_S * 0.9
        ):
            self.kept_silent(base)

    def kept_silent(self, base: str) -> None:
        """Nothing came from the server within its time."""
        with self._lock:
            known = self._silent.pop(base, None) or _Silence()
            while len(self._silent) >= MAX_SERVERS:
                del self._silent[next(iter(self._silent))]
            self._silent[base] = known
            now = time.monotonic()
            if now >= known.until:  # else this attempt began before it was known
                known.times += 1
            longest = FIRST_AVOIDED_S * 2.0 ** min(known.times - 1, 16)
            known.until = now + min(longest, LONGEST_AVOIDED_S)

    def _may_try(self, base: str) -> bool:
        with self._lock:
            known = self._silent.get(base)
            if known is None:
                return True
            now = time.monotonic()
            if now < known.until:
                return False
            known.until = now + 2 * PATIENCE_S  # for the others, until this one knows
            return True

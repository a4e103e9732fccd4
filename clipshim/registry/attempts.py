"""One attempt's failure, and what is counted about attempts. No networking."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

from clipshim.errors import AuthError, ClipError, NotFoundError, RegistryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clipshim.registry.mirrors import Endpoint

# Causes that mean the registry does not have it, or will not give it: asking again cannot help.
MISSING = "missing"
UNAUTHORIZED = "unauthorized"
FORBIDDEN = "forbidden"


class AttemptFailed(Exception):
    """One request to one server failed; `exchange` decides what follows from it.

    `cause` is a short fixed word for counters; `retryable` says whether the same server may
    answer later; `retry_after` is its own wish in seconds.
    """

    def __init__(
        self,
        cause: str,
        message: str,
        *,
        retryable: bool,
        retry_after: float | None = None,
        status: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.cause = cause
        self.message = message
        self.retryable = retryable
        self.retry_after = retry_after
        self.status = status
        self.hint = hint
        self.progressed = False  # bytes of use came before it failed


class Statistics:
    """Counters of requests, thread-safe. Retries and failures are counted by cause."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = 0
        self._bytes = 0
        self._failures = 0
        self._retries: Counter[str] = Counter()

    def add_request(self) -> None:
        """One request left for a server."""
        with self._lock:
            self._requests += 1

    def add_bytes(self, count: int) -> None:
        """Body bytes that arrived and were of use."""
        with self._lock:
            self._bytes += count

    def add_retry(self, cause: str) -> None:
        """An attempt failed; in most cases another follows."""
        with self._lock:
            self._retries[cause] += 1

    def add_failure(self) -> None:
        """A whole exchange failed."""
        with self._lock:
            self._failures += 1

    def snapshot(self) -> dict[str, object]:
        """{"requests", "bytes", "failures": int, "retries": {cause: int}}."""
        with self._lock:
            return {
                "requests": self._requests,
                "bytes": self._bytes,
                "failures": self._failures,
                "retries": dict(self._retries),
            }


def final_error(
    what: str, failures: Sequence[tuple[Endpoint, AttemptFailed]], *, note: str = ""
) -> ClipError:
    """The one error that a caller sees after every server has failed.

    The origin, asked last, speaks for the registry; what mirrors said is added.
    """
    endpoint, failure = failures[-1]
    message = f"{what}: {endpoint.host}: {failure.message}"
    others = [f"{other.host}: {said.message}" for other, said in failures[:-1]]
    if others:
        message += f"; before that {'; '.join(others)}"
    message += note
    causes = {said.cause for _, said in failures}
    if UNAUTHORIZED in causes or FORBIDDEN in causes:
        hint = failure.hint or "log in with docker login or podman login, or pass -u USER"
        return AuthError(message, hint=hint)
    if causes == {MISSING}:
        return RegistryNotFoundError(message, hint=failure.hint)
    return RegistryError(message, hint=failure.hint)


class RegistryNotFoundError(RegistryError, NotFoundError):
    """A registry answered that it does not have what was asked for."""

    errno = NotFoundError.errno

"""Answers of HTTP servers: reading bodies within limits, and what kind of trouble a failure is.

No requests and no retries: transport.py makes them.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import urllib3
import urllib3.exceptions

from clipshim.registry.attempts import FORBIDDEN, MISSING, UNAUTHORIZED, AttemptFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from urllib3.response import BaseHTTPResponse

READ_BYTES = 1 << 20
DRIP_BYTES = 1024  # fewer than this within one read timeout is a stalled transfer
MAX_ERROR_BODY = 4096


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer whose body is still to be read, and the URL that gave it after redirects."""

    response: BaseHTTPResponse
    url: str
    moved: bool  # whether a redirect led away from the server that was asked
    patience_s: float = float("inf")  # how long its body may stall, at most

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.response.status

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, names in any case."""
        return self.response.headers


@contextlib.contextmanager
def released(reply: Reply) -> Iterator[None]:
    """Returns the connection to its pool, or closes it if the body was not read to its end.

    Transport trouble while the body is read becomes AttemptFailed.
    """
    try:
        yield
    except (urllib3.exceptions.HTTPError, OSError) as exc:
        raise transport_failure(exc) from exc
    finally:
        if getattr(reply.response, "length_remaining", None) == 0:
            reply.response.drain_conn()
        reply.response.close()
        reply.response.release_conn()


def read_chunks(
    reply: Reply, deadline: float, read_timeout_s: float, limit: int
) -> Iterator[bytes]:
    """The body piece by piece, at most `limit` bytes; short bodies just end.

    Raises AttemptFailed when nothing or next to nothing comes for `read_timeout_s`, or at the
    deadline.
    """
    read_timeout_s = min(read_timeout_s, reply.patience_s)
    window_start, window_bytes = time.monotonic(), 0
    while limit > 0:
        now = time.monotonic()
        if now >= deadline:
            raise AttemptFailed("deadline", "the deadline passed mid-body", retryable=True)
        if now - window_start >= read_timeout_s:
            if window_bytes < DRIP_BYTES:
                raise AttemptFailed(
                    "drip", f"only {window_bytes} bytes in {read_timeout_s:g} s", retryable=True
                )
            window_start, window_bytes = now, 0
        _set_timeout(reply, min(read_timeout_s, deadline - now))
        piece = reply.response.read1(min(READ_BYTES, limit), decode_content=False)
        if not piece:
            return
        limit -= len(piece)
        window_bytes += len(piece)
        yield piece


def read_body(reply: Reply, limit: int, deadline: float, read_timeout_s: float = 30.0) -> bytes:
    """A whole small body. Raises AttemptFailed if it is longer than `limit`."""
    body = b"".join(read_chunks(reply, deadline, read_timeout_s, limit + 1))
    if len(body) > limit:
        raise AttemptFailed(
            "long-body", f"expected at most {limit} bytes, got more", retryable=False
        )
    declared = reply.response.headers.get("Content-Length", "")
    if declared.isdigit() and int(declared) != len(body) and reply.response.status != 204:
        raise AttemptFailed(
            "short-body", f"expected {declared} bytes, got {len(body)}", retryable=True
        )
    return body


def transport_failure(exc: Exception) -> AttemptFailed:
    """Which kind of trouble an exception of urllib3 or the system is."""
    text = str(exc)
    root: BaseException = exc
    while root.__cause__ is not None or getattr(root, "reason", None) is not None:
        inner = getattr(root, "reason", None)
        following = inner if isinstance(inner, BaseException) else root.__cause__
        if following is None or following is root:
            break
        root = following
    chain = {type(item) for item in (exc, root)}

    def has(*kinds: type[BaseException]) -> bool:
        return any(issubclass(item, kinds) for item in chain)

    errors = urllib3.exceptions
    if has(errors.NameResolutionError):
        return AttemptFailed("dns", "the host name cannot be resolved", retryable=True)
    if has(ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in text:
        return AttemptFailed(
            "tls",
            f"the certificate is not trusted: {_last_part(text)}",
            retryable=False,
            hint="pass --ca-file, or --insecure for a test",
        )
    if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text.lower():
        return AttemptFailed(
            "tls",
            "expected TLS, got something else",
            retryable=False,
            hint="list the registry in plain_http, or pass --plain-http",
        )
    if has(ssl.SSLError, errors.SSLError):
        return AttemptFailed("tls", f"TLS failed: {_last_part(text)}", retryable=True)
    if has(errors.ReadTimeoutError):
        return AttemptFailed("stall", "no byte came within the read timeout", retryable=True)
    if has(ConnectionRefusedError) or "refused" in text:
        return AttemptFailed("refused", "connection refused", retryable=True)
    if has(errors.NewConnectionError):
        return AttemptFailed("connect", f"cannot connect: {_last_part(text)}", retryable=True)
    if has(errors.ConnectTimeoutError):
        return AttemptFailed("connect", "no connection within the timeout", retryable=True)
    if has(errors.LocationValueError, errors.InvalidHeader):
        return AttemptFailed("protocol", f"bad URL or header: {text[:200]}", retryable=False)
    if has(errors.ProtocolError, ConnectionError, errors.IncompleteRead):
        return AttemptFailed("reset", f"connection broken: {_last_part(text)}", retryable=True)
    return AttemptFailed("transport", f"{type(exc).__name__}: {text[:200]}", retryable=True)


def refusal(reply: Reply) -> AttemptFailed:
    status = reply.response.status
    said = _error_text(reply)
    where = f" at {urlsplit(reply.url).netloc} after a redirect" if reply.moved else ""
    message = f"{status}{where}{said}"
    if reply.moved and status in (400, 401, 403, 404, 410):
        # A signature that has expired: the registry hands out a new one.
        return AttemptFailed("redirect", message, retryable=True, status=status)
    if status == 401:
        return AttemptFailed(UNAUTHORIZED, message, retryable=False, status=status)
    if status == 403:
        return AttemptFailed(FORBIDDEN, message, retryable=False, status=status)
    if status in (404, 410):
        return AttemptFailed(MISSING, message, retryable=False, status=status)
    after = _retry_after_s(
        reply.response.headers.get("Retry-After"), reply.response.headers.get("Date")
    )
    if status == 429:
        return AttemptFailed(
            "rate-limited", message, retryable=True, retry_after=after, status=status
        )
    if status in (408, 425) or (status >= 500 and status not in (501, 505)):
        return AttemptFailed(
            "server-error", message, retryable=True, retry_after=after, status=status
        )
    return AttemptFailed("protocol", message, retryable=False, status=status)


def _error_text(reply: Reply) -> str:
    """The registry's own words (distribution spec, error codes), made fit for one line."""
    if reply.response.headers.get("Content-Length", "1") == "0":
        return ""
    try:
        body = reply.response.read(MAX_ERROR_BODY, decode_content=False)
        errors = json.loads(body)["errors"]
        words = "; ".join(
            str(item.get("message") or item.get("code"))
            for item in errors[:3]
            if isinstance(item, dict)
        )
    except (urllib3.exceptions.HTTPError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    words = "".join(char if char.isprintable() else " " for char in words)[:200]
    return f": {words}" if words else ""


def _retry_after_s(value: str | None, date: str | None = None) -> float | None:
    """RFC 9110 section 10.2.3: seconds, or a time by the server's clock, which `date` tells."""
    if not value:
        return None
    try:
        if value.strip().isdigit():
            return float(value.strip())
        wanted = parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    now = time.time()
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        now = parsedate_to_datetime(date or "").timestamp()
    return max(0.0, wanted - now)


def drain(reply: Reply) -> None:
    """Reads a small unwanted body, so that the connection can be used again."""
    with contextlib.suppress(urllib3.exceptions.HTTPError, OSError):
        reply.response.read(MAX_ERROR_BODY, decode_content=False)


def _set_timeout(reply: Reply, seconds: float) -> None:
    sock = getattr(getattr(reply.response, "connection", None), "sock", None)
    if sock is not None:
        sock.settimeout(max(seconds, 0.001))


def _last_part(text: str) -> str:
    return text.rsplit(": ", 1)[-1].strip("()'\"")[:200] or "unknown"

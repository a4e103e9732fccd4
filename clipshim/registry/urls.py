"""URLs that servers and files hand out: taken apart, or found to be none. No requests."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

if TYPE_CHECKING:
    from urllib.parse import SplitResult

MAX_URL = 8192  # signatures of CDNs are long, but not longer


def parse_url(text: str) -> SplitResult | None:
    """An http or https URL with a host and a good port; None for anything else."""
    if len(text) > MAX_URL or not text.isprintable():
        return None
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, ports that are no number
        return None
    return parts if good else None


def join_url(base: str, location: str) -> str | None:
    """What a Location header at `base` points to, if that is a URL for parse_url."""
    try:
        target = urljoin(base, location)
    except ValueError:
        return None
    return target if parse_url(target) is not None else None


def same_origin(one: str, other: str) -> bool:
    """Whether two URLs share scheme, host and port; False for what is no URL."""
    first, second = parse_url(one), parse_url(other)
    if first is None or second is None:
        return False
    return _origin(first) == _origin(second)


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    port = parts.port if parts.port is not None else {"http": 80, "https": 443}[parts.scheme]
    return parts.scheme, parts.hostname, port

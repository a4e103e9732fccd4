"""Logging in to registries: challenges, bearer tokens, and when to get a new one.

Formats: RFC 7235 (challenges), https://distribution.github.io/distribution/spec/auth/token/ and
…/auth/oauth/. Who the user is, credentials.py finds; requests are made by the caller's function.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode, urlunsplit

from clipshim.registry.attempts import UNAUTHORIZED, AttemptFailed
from clipshim.registry.credentials import Credentials, find_credentials
from clipshim.registry.references import is_loopback, split_port
from clipshim.registry.urls import parse_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from clipshim.registry.access import RegistryAccess
    from clipshim.registry.mirrors import Endpoint
    from clipshim.registry.references import Reference

MAX_TOKEN_BYTES = 1 << 20
MAX_GRANTS = 1000  # each as long as a token, some kB
DEFAULT_TOKEN_LIFE_S = 60.0  # the token specification's default for expires_in
_PARAMETER = re.compile(r'([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_SCHEME = re.compile(r"(?:^|,)\s*(Bearer|Basic)(?:\s+|\s*$|\s*,)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to log in that a server offered."""

    scheme: str  # "bearer" or "basic"
    realm: str = ""
    service: str = ""
    scope: str = ""


@dataclass(frozen=True, slots=True)
class Grant:
    """An Authorization header and until when (monotonic) it is good."""

    header: str
    expires_at: float

    @property
    def is_fresh(self) -> bool:
        """Whether it may still be used."""
        return time.monotonic() < self.expires_at


class _Login:
    """A log-in under way, and how many threads make it or wait for it."""

    __slots__ = ("lock", "threads")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads = 0


class Authorizer:
    """Grants by server, repository and actions; one log-in at a time for each, thread-safe."""

    def __init__(self, access: RegistryAccess) -> None:
        self._access = access
        self._lock = threading.Lock()
        self._grants: dict[tuple[str, str, str], Grant] = {}  # what was granted last is the last
        self._logins: dict[tuple[str, str, str], _Login] = {}  # under way

    def current(self, endpoint: Endpoint, repository: str, actions: str) -> Grant | None:
        """A grant that may still be used, without any request."""
        with self._lock:
            grant = self._grants.get((endpoint.base, repository, actions))
        return grant if grant is not None and grant.is_fresh else None

    def forget(self, endpoint: Endpoint, repository: str, actions: str, grant: Grant) -> None:
        """Drops a grant that a server no longer takes."""
        key = (endpoint.base, repository, actions)
        with self._lock:
            if self._grants.get(key) is grant:
                del self._grants[key]

    def renew(
        self,
        endpoint: Endpoint,
        reference: Reference,
        actions: str,
        challenges: Sequence[str],
        refused: Grant | None,
        request: Callable[[str, str, dict[str, str], bytes | None], tuple[int, bytes]],
    ) -> Grant:
        """A grant other than `refused`, made as the `challenges` want. Credentials are read anew.

        Raises AttemptFailed, AuthError.
        """
        key = (endpoint.base, reference.repository, actions)
        with self._one_at_a_time(key):
            # Lock, then look again: another thread may have logged in while this one waited.
            grant = self.current(endpoint, reference.repository, actions)
            if grant is not None and grant is not refused:
                return grant
            grant = self._log_in(endpoint, reference, actions, challenges, request)
            self._keep(key, grant)
            return grant

    @contextlib.contextmanager
    def _one_at_a_time(self, key: tuple[str, str, str]) -> Iterator[None]:
        with self._lock:
            login = self._logins.setdefault(key, _Login())
            login.threads += 1
        try:
            with login.lock:
                yield
        finally:
            with self._lock:
                login.threads -= 1
                if not login.threads:
                    del self._logins[key]

    def _keep(self, key: tuple[str, str, str], grant: Grant) -> None:
        with self._lock:
            self._grants.pop(key, None)
            self._grants[key] = grant
            if len(self._grants) > MAX_GRANTS:  # those that are over, else the oldest
                self._grants = {of: it for of, it in self._grants.items() if it.is_fresh}
                while len(self._grants) > MAX_GRANTS:
                    del self._grants[next(iter(self._grants))]

    def _log_in(
        self,
        endpoint: Endpoint,
        reference: Reference,
        actions: str,
        challenges: Sequence[str],
        request: Callable[[str, str, dict[str, str], bytes | None], tuple[int, bytes]],
    ) -> Grant:
        offers = parse_challenges(challenges)
        found = self._credentials(endpoint, reference)
        for offer in offers:
            if offer.scheme == "bearer" and offer.realm:
                return self._bearer(endpoint, reference, actions, offer, found, request)
            if offer.scheme == "basic" and found is not None and found.username:
                return Grant(basic_header(found), float("inf"))
        if not offers:
            raise AttemptFailed(
                UNAUTHORIZED, "401 without a usable challenge", retryable=False, status=401
            )
        raise AttemptFailed(
            UNAUTHORIZED, "credentials are needed and none were found", retryable=False, status=401
        )

    def _credentials(self, endpoint: Endpoint, reference: Reference) -> Credentials | None:
        if endpoint.host == reference.server:
            return find_credentials(self._access, reference.registry, reference.repository)
        # A password given for the registry is not a mirror's business.
        access = replace(self._access, username=None, password=None)
        return find_credentials(access, endpoint.host, reference.repository)

    def _bearer(
        self,
        endpoint: Endpoint,
        reference: Reference,
        actions: str,
        offer: Challenge,
        found: Credentials | None,
        request: Callable[[str, str, dict[str, str], bytes | None], tuple[int, bytes]],
    ) -> Grant:
        scope = offer.scope or f"repository:{reference.repository}:{actions}"
        realm = parse_url(offer.realm)
        if realm is None:
            raise AttemptFailed(
                "protocol",
                f"expected a URL as token realm, got {offer.realm[:200]!r}",
                retryable=False,
            )
        if realm.scheme == "http" and found is not None and not self._may_be_plain(realm.netloc):
            raise AttemptFailed(
                UNAUTHORIZED,
                f"token realm {offer.realm} has no TLS: credentials are not sent there",
                retryable=False,
                hint=f"list {realm.netloc} in plain_http to allow it",
            )
        query = dict(parse_qsl(realm.query))
        if offer.service:
            query["service"] = offer.service
        query["scope"] = scope
        headers: dict[str, str] = {}
        body: bytes | None = None
        method = "GET"
        if found is not None and found.identity_token:
            method = "POST"
            query |= {
                "grant_type": "refresh_token",
                "refresh_token": found.identity_token,
                "client_id": "clipshim",
            }
            body = urlencode(query).encode()
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            url = urlunsplit(realm._replace(query=""))
        else:
            if found is not None:
                headers["Authorization"] = basic_header(found)
                query["account"] = found.username
            url = urlunsplit(realm._replace(query=urlencode(query)))
        asked_at = time.monotonic()
        status, answer = request(method, url, headers, body)
        if status in (400, 401, 403, 404):
            who = f"the credentials from {found.origin}" if found else "anonymous access"
            raise AttemptFailed(
                UNAUTHORIZED,
                f"token server {realm.netloc} refused {who} with {status}",
                retryable=False,
                status=status,
            )
        if status != 200:
            raise AttemptFailed(
                "token-server",
                f"token server {realm.netloc} answered {status}",
                retryable=status == 429 or status >= 500,
                status=status,
            )
        return _parse_token(answer, asked_at, realm.netloc)

    def _may_be_plain(self, host: str) -> bool:
        allowed = self._access.plain_http
        return is_loopback(host) or host in allowed or split_port(host)[0] in allowed


def parse_challenges(headers: Sequence[str]) -> list[Challenge]:
    """WWW-Authenticate headers to challenges, bearer first; unknown schemes are left out."""
    found = []
    for header in headers:
        # A quoted text may hold anything, also what looks like another challenge.
        unquoted = _QUOTED.sub(lambda match: "x" * len(match[0]), header)
        starts = list(_SCHEME.finditer(unquoted))
        for number, start in enumerate(starts):
            end = starts[number + 1].start() if number + 1 < len(starts) else len(header)
            values: dict[str, str] = {}
            for name, quoted, bare in _PARAMETER.findall(header[start.end() : end]):
                values.setdefault(name.lower(), re.sub(r"\\(.)", r"\1", quoted) or bare)
            found.append(
                Challenge(
                    start.group(1).lower(),
                    values.get("realm", ""),
                    values.get("service", ""),
                    values.get("scope", ""),
                )
            )
    return sorted(found, key=lambda offer: offer.scheme != "bearer")


def basic_header(found: Credentials) -> str:
    """The Authorization header of RFC 7617."""
    pair = f"{found.username}:{found.password}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def _parse_token(answer: bytes, asked_at: float, host: str) -> Grant:
    try:
        document = json.loads(answer)
        token = document.get("token") or document.get("access_token")
        life = float(document.get("expires_in") or DEFAULT_TOKEN_LIFE_S)
    except (ValueError, AttributeError, TypeError, RecursionError):
        token, life = None, 0.0
    if not isinstance(token, str) or not token or not re.fullmatch(r"[\x21-\x7e]+", token):
        raise AttemptFailed(
            "token-server", f"token server {host}: expected a token in JSON", retryable=True
        )
    # A tenth early: the request that carries it is still under way when it ends.
    return Grant(f"Bearer {token}", asked_at + max(life, 1.0) * 0.9)

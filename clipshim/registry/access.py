"""How registries are to be spoken to: credentials, TLS, mirrors, timeouts. Options, no behaviour.

One RegistryAccess is shared by everything that works under the same options; its `transport` (the
connection pools and tokens) is made when it is first used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipshim.registry.transport import Transport
    from clipshim.settings import Settings


@dataclass(frozen=True)
class RegistryAccess:
    """Options of registry access; times in seconds.

    `username` and `password` beat `authfile`, which beats the usual files (credentials.py); they
    are for `login_registry` (as in Reference.registry) only, where that is given.
    `anonymous` never looks for credentials. `plain_http` names registries (host or host:port)
    that are spoken to without TLS; loopback always is unless mirrors say otherwise. `insecure`
    skips the check of certificates. `deadline_s` bounds one request with all its retries where
    the caller gives no deadline of its own.
    """

    authfile: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    login_registry: str | None = None
    anonymous: bool = False
    plain_http: frozenset[str] = frozenset()
    insecure: bool = False
    ca_file: str | None = None
    certs_dir: str | None = None
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    deadline_s: float = 120.0

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        *,
        authfile: str | None = None,
        username: str | None = None,
        password: str | None = None,
        login_registry: str | None = None,
        anonymous: bool = False,
        plain_http: frozenset[str] = frozenset(),
        insecure: bool = False,
        ca_file: str | None = None,
    ) -> RegistryAccess:
        """The configuration's values, and what a command line adds to them."""
        return cls(
            authfile=authfile,
            username=username,
            password=password,
            login_registry=login_registry,
            anonymous=anonymous,
            plain_http=frozenset(settings.plain_http) | plain_http,
            insecure=insecure,
            ca_file=ca_file,
            certs_dir=settings.certs_dir,
            connect_timeout_s=settings.connect_timeout_s,
            read_timeout_s=settings.read_timeout_s,
            deadline_s=settings.fetch_deadline_s,
        )

    @cached_property
    def transport(self) -> Transport:
        """Connection pools and tokens under these options; thread-safe, close() ends it."""
        from clipshim.registry.transport import Transport  # urllib3 only when a request is made

        return Transport(self)

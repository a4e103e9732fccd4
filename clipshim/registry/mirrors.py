"""Where a registry is really asked: containerd's certs.d/<host>/hosts.toml, else the host itself.

Format: https://github.com/containerd/containerd/blob/main/docs/hosts.md. Also read, as containerd
and Docker do when there is no hosts.toml: *.crt, *.cert and *.key in the same directory.
"""

from __future__ import annotations

import logging
import os
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clipshim.errors import ConfigError
from clipshim.registry.references import is_loopback, split_port
from clipshim.registry.urls import parse_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clipshim.registry.access import RegistryAccess
    from clipshim.registry.references import Reference

log = logging.getLogger(__name__)

CAPABILITIES = ("pull", "resolve", "push")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server that may answer for a registry."""

    base: str  # scheme://host[:port]/v2, no slash at the end
    host: str  # host[:port] of base
    capabilities: frozenset[str] = frozenset(CAPABILITIES)
    ca_files: tuple[str, ...] = ()
    client_certs: tuple[tuple[str, str | None], ...] = ()  # (certificate, key)
    skip_verify: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    namespace: str | None = None  # sent as ?ns=: which registry a mirror stands for
    # How long it may keep silent in this attempt, because there is another one to ask (health.py).
    patience_s: float = field(default=float("inf"), compare=False)

    @property
    def is_plain(self) -> bool:
        """Whether it is spoken to without TLS."""
        return self.base.startswith("http://")


def endpoints_for(reference: Reference, access: RegistryAccess) -> tuple[Endpoint, ...]:
    """The servers for the registry of `reference` in the order to ask them, the origin last.

    Raises ConfigError for a hosts.toml that cannot be used.
    """
    directory = _hosts_directory(access.certs_dir, reference.registry)
    if directory is None:
        return (_origin(reference, access),)
    path = os.path.join(directory, "hosts.toml")
    try:
        with open(path, "rb") as file:
            config = tomllib.load(file)
    except FileNotFoundError:
        return (_origin(reference, access, **_loose_certificates(directory)),)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"mirrors {path}: {exc}") from exc
    return _from_config(config, path, reference, access)


def _hosts_directory(certs_dir: str | None, registry: str) -> str | None:
    if not certs_dir:
        return None
    host, port = split_port(registry)
    # containerd: host_port_ is for systems that cannot have ':' in names; tried first.
    names = [f"{host}_{port}_", f"{host}:{port}"] if port is not None else []
    for name in [*names, host, "_default"]:
        if "/" not in name and os.path.isdir(os.path.join(certs_dir, name)):
            return os.path.join(certs_dir, name)
    return None


def _origin(reference: Reference, access: RegistryAccess, **more: Any) -> Endpoint:
    host = reference.server
    names = {host, split_port(host)[0], reference.registry}
    plain = is_loopback(host) or not names.isdisjoint(access.plain_http)
    if more.get("ca_files") or more.get("client_certs"):
        plain = False
    return Endpoint(f"{'http' if plain else 'https'}://{host}/v2", host, **more)


def _loose_certificates(directory: str) -> dict[str, Any]:
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return {}
    authorities = tuple(os.path.join(directory, name) for name in names if name.endswith(".crt"))
    pairs = [
        (os.path.join(directory, name), os.path.join(directory, name[:-5] + ".key"))
        for name in names
        if name.endswith(".cert") and name[:-5] + ".key" in names
    ]
    return {"ca_files": authorities, "client_certs": tuple(pairs)}


def _from_config(
    config: dict[str, Any], path: str, reference: Reference, access: RegistryAccess
) -> tuple[Endpoint, ...]:
    result = []
    hosts = config.get("host", {})
    if not isinstance(hosts, dict):
        raise ConfigError(f"mirrors {path}: host: expected tables, got {hosts!r}")
    for url, table in hosts.items():
        result.append(_endpoint(url, table, path, reference))
    top = {key: value for key, value in config.items() if key not in ("host", "server")}
    server = config.get("server")
    if server is None:
        origin = _origin(reference, access)
        server = origin.base.removesuffix("/v2")
    last = _endpoint(server, top, path, reference)
    if not any(endpoint.base == last.base for endpoint in result):
        result.append(last)
    return tuple(result)


def _endpoint(url: Any, table: Any, path: str, reference: Reference) -> Endpoint:
    where = f"mirrors {path}: host {url}"
    if not isinstance(url, str) or not isinstance(table, dict):
        raise ConfigError(f"{where}: expected a URL and a table")
    text = url if "://" in url else f"{'http' if is_loopback(url) else 'https'}://{url}"
    parts = parse_url(text)
    if parts is None or parts.query:
        raise ConfigError(f"{where}: expected an http or https URL")
    route = parts.path.rstrip("/")
    if not table.get("override_path", False) and not route.endswith("/v2"):
        route += "/v2"
    capabilities = table.get("capabilities", list(CAPABILITIES))
    if not isinstance(capabilities, list) or not set(capabilities) <= set(CAPABILITIES):
        raise ConfigError(f"{where}: capabilities: expected some of {', '.join(CAPABILITIES)}")
    return Endpoint(
        base=f"{parts.scheme}://{parts.netloc}{route}",
        host=parts.netloc,
        capabilities=frozenset(capabilities),
        ca_files=_paths(table.get("ca"), where, path),
        client_certs=_client_pairs(table.get("client"), where, path),
        skip_verify=bool(table.get("skip_verify", False)),
        headers=_headers(table.get("header", {}), where),
        namespace=None if parts.netloc == reference.server else reference.registry,
    )


def _paths(value: Any, where: str, config_path: str) -> tuple[str, ...]:
    items = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in items):
        raise ConfigError(f"{where}: ca: expected paths, got {value!r}")
    return tuple(os.path.join(os.path.dirname(config_path), item) for item in items)


def _client_pairs(value: Any, where: str, config_path: str) -> tuple[tuple[str, str | None], ...]:
    if value is None:
        return ()
    base = os.path.dirname(config_path)
    if isinstance(value, str):
        return ((os.path.join(base, value), None),)
    pairs: list[tuple[str, str | None]] = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            pairs.append((os.path.join(base, item), None))
        elif isinstance(item, list) and len(item) == 2 and all(isinstance(p, str) for p in item):
            key = os.path.join(base, item[1]) if item[1] else None
            pairs.append((os.path.join(base, item[0]), key))
        else:
            raise ConfigError(f"{where}: client: expected [certificate, key], got {item!r}")
    return tuple(pairs)


def _headers(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: header: expected a table, got {value!r}")
    headers = {}
    for name, content in value.items():
        items = content if isinstance(content, list) else [content]
        if not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{where}: header {name}: expected text, got {content!r}")
        headers[name] = ", ".join(items)
    return headers

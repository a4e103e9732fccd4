"""Credentials for registries, found where users of other tools have already put them.

Order: explicit, $REGISTRY_AUTH_FILE, $DOCKER_CONFIG/config.json,
$XDG_RUNTIME_DIR/containers/auth.json, $XDG_CONFIG_HOME/containers/auth.json,
~/.docker/config.json. Inside a file: credHelpers for the host, auths (the longest path wins),
credsStore. Nothing is cached: every look-up reads the files again, so that a login or a rotated
password is noticed. Formats: docker's config.json, containers-auth.json(5),
docker-credential-helpers.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clipshim.errors import AuthError
from clipshim.registry.references import DOCKER_HUB, DOCKER_HUB_SERVER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clipshim.registry.access import RegistryAccess

log = logging.getLogger(__name__)

HELPER_TIMEOUT_S = 30.0
MAX_FILE_BYTES = 4 << 20
TOKEN_USER = "<token>"  # noqa: S105 - docker-credential-helpers: the secret is an identity token
_HUB_KEYS = (
    "https://index.docker.io/v1/",
    "index.docker.io",
    DOCKER_HUB,
    DOCKER_HUB_SERVER,
)
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_NOT_FOUND_WORDS = ("credentials not found", "no credentials", "not found in native keychain")


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user name with a password, or an identity token. The repr shows no secret."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    origin: str = ""  # where they were found, for messages


def find_credentials(
    access: RegistryAccess,
    registry: str,
    repository: str,
    *,
    environ: Mapping[str, str] | None = None,
) -> Credentials | None:
    """What to log in with for `repository` on `registry` (host[:port]); None is anonymous.

    Raises AuthError if a file or helper that the user named cannot be used.
    """
    if access.anonymous:
        return None
    if access.username is not None and access.login_registry in (None, registry):
        if access.username == TOKEN_USER:
            return Credentials(identity_token=access.password or "", origin="command line")
        return Credentials(access.username, access.password or "", origin="command line")
    for path, named in credential_files(access.authfile, environ):
        config = _read_config(path, named=named)
        if config is None:
            continue
        found = _from_config(config, path, registry, repository)
        if found is not None:
            return found
    return None


def credential_files(
    authfile: str | None, environ: Mapping[str, str] | None = None
) -> list[tuple[str, bool]]:
    """The files in order, each with whether the user named it (then it must be readable)."""
    env = os.environ if environ is None else environ
    if authfile:
        return [(authfile, True)]
    files: list[tuple[str, bool]] = []
    if env.get("REGISTRY_AUTH_FILE"):
        files.append((env["REGISTRY_AUTH_FILE"], False))
    if env.get("DOCKER_CONFIG"):
        files.append((os.path.join(env["DOCKER_CONFIG"], "config.json"), False))
    if env.get("XDG_RUNTIME_DIR"):
        files.append((os.path.join(env["XDG_RUNTIME_DIR"], "containers/auth.json"), False))
    home = env.get("HOME") or _home_from_passwd()
    config_home = env.get("XDG_CONFIG_HOME") or (os.path.join(home, ".config") if home else "")
    if config_home:
        files.append((os.path.join(config_home, "containers/auth.json"), False))
    if home:
        files.append((os.path.join(home, ".docker/config.json"), False))
    return files


def _home_from_passwd() -> str:
    """A service often has no HOME; the account's entry may say, and may be missing too."""
    import pwd  # only without HOME

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""


def _read_config(path: str, *, named: bool) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
        config = json.loads(raw)
        if not isinstance(config, dict):
            raise ValueError("expected a JSON object")
    except FileNotFoundError:
        if named:
            raise AuthError(f"credentials file {path}: no such file") from None
        return None
    except (OSError, ValueError) as exc:
        if named:
            raise AuthError(f"credentials file {path}: {exc}") from exc
        log.warning("credentials file %s is ignored: %s", path, exc)
        return None
    return config


def _from_config(
    config: dict[str, Any], path: str, registry: str, repository: str
) -> Credentials | None:
    keys = _HUB_KEYS if registry in _HUB_KEYS else (registry,)
    helpers = config.get("credHelpers")
    if isinstance(helpers, dict):
        for key in keys:
            if isinstance(helpers.get(key), str):
                # A helper named for this very host is the answer: nothing else is asked.
                return _ask_helper(helpers[key], key, path)
    auths = config.get("auths")
    found = _from_auths(auths, path, keys, repository) if isinstance(auths, dict) else None
    if found is not None:
        return found
    store = config.get("credsStore")
    if isinstance(store, str) and store:
        for key in keys:
            found = _ask_helper(store, key, path)
            if found is not None:
                return found
    return None


def _from_auths(
    auths: dict[str, Any], path: str, keys: tuple[str, ...], repository: str
) -> Credentials | None:
    by_name: dict[str, Any] = {}
    for key, entry in auths.items():
        by_name.setdefault(key, entry)
        by_name.setdefault(_plain_key(key), entry)
    parts = repository.split("/")
    for count in range(len(parts), -1, -1):
        for key in keys:
            name = "/".join([key, *parts[:count]]) if count else key
            entry = by_name.get(name)
            if isinstance(entry, dict):
                found = _from_entry(entry, f"{path}, {name}")
                if found is not None:
                    return found
    return None


def _plain_key(key: str) -> str:
    """https://host/v2/ and the like, as old docker clients wrote them, without the trimmings."""
    bare = key.split("://", 1)[-1].rstrip("/")
    for suffix in ("/v1", "/v2"):
        bare = bare.removesuffix(suffix)
    return bare


def _from_entry(entry: dict[str, Any], origin: str) -> Credentials | None:
    token = entry.get("identitytoken")
    username, password = entry.get("username"), entry.get("password")
    auth = entry.get("auth")
    if isinstance(auth, str) and auth:
        try:
            decoded = base64.b64decode(auth, validate=False).decode()
        except (binascii.Error, UnicodeDecodeError):
            log.warning("credentials in %s are ignored: auth is not base64 text", origin)
            return None
        username, _, password = decoded.partition(":")
        password = password.rstrip("\0")  # docker pads with NUL
    if isinstance(token, str) and token:
        return Credentials(identity_token=token, origin=origin)
    if isinstance(username, str) and username and isinstance(password, str):
        return Credentials(username, password, origin=origin)
    return None


def _ask_helper(name: str, server: str, path: str) -> Credentials | None:
    """`docker-credential-NAME get`, the server's name on stdin."""
    if not _HELPER_NAME.fullmatch(name):
        raise AuthError(f"credentials file {path}: bad name of a credential helper {name!r}")
    # podman and systemd start us without a PATH: look where helpers are installed.
    search = (
        os.environ.get("PATH") or "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    )
    program = shutil.which(f"docker-credential-{name}", path=search)
    origin = f"credential helper {name}"
    if program is None:
        raise AuthError(
            f"{path} names credential helper docker-credential-{name}: not found",
            hint="install it, or take it out of the file",
        )
    try:
        done = subprocess.run(
            [program, "get"],
            input=server.encode(),
            capture_output=True,
            timeout=HELPER_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise AuthError(f"{origin}: no answer for {server} in {HELPER_TIMEOUT_S:.0f} s") from None
    except OSError as exc:
        raise AuthError(f"{origin}: {exc.strerror}") from exc
    if done.returncode != 0:
        said = (done.stdout + done.stderr).decode(errors="replace").strip()
        if any(words in said.lower() for words in _NOT_FOUND_WORDS):
            return None
        raise AuthError(f"{origin}: failed for {server}: {said[:200]}")
    try:
        answer = json.loads(done.stdout)
        username, secret = answer["Username"], answer["Secret"]
    except (ValueError, KeyError, TypeError) as exc:
        raise AuthError(f"{origin}: expected Username and Secret for {server}") from exc
    if username == TOKEN_USER:
        return Credentials(identity_token=str(secret), origin=origin)
    return Credentials(str(username), str(secret), origin=origin)

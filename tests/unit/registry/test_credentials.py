"""Credentials: which file wins, what helpers say, and what a service without HOME gets."""

from __future__ import annotations

import base64
import json
import stat
from typing import TYPE_CHECKING, Any

import pytest

from clipshim.errors import AuthError
from clipshim.registry import credentials
from clipshim.registry.access import RegistryAccess
from clipshim.registry.credentials import Credentials, credential_files, find_credentials

if TYPE_CHECKING:
    from pathlib import Path


def auth(name: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{name}:{password}".encode()).decode()}


def write(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def find(
    file: Path, registry: str = "r.io", repository: str = "a/b", **more: Any
) -> Credentials | None:
    return find_credentials(RegistryAccess(authfile=str(file), **more), registry, repository)


def helper(directory: Path, name: str, script: str) -> None:
    path = directory / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_command_line_wins_and_anonymous_asks_nobody(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {"auths": {"r.io": auth("file", "x")}})
    found = find(file, username="flag", password="y")
    assert found is not None
    assert (found.username, found.password) == ("flag", "y")
    assert find(file, anonymous=True) is None
    assert find(tmp_path / "missing.json", anonymous=True) is None


def test_a_password_for_one_registry_does_not_reach_another(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {"auths": {"o.io": auth("file", "x")}})
    given = {"username": "flag", "password": "y", "login_registry": "r.io"}
    assert "s3cret" not in repr(RegistryAccess(password="s3cret"))
    own, other = find(file, "r.io", **given), find(file, "o.io", **given)
    assert own is not None
    assert other is not None
    assert (own.username, other.username) == ("flag", "file")


def test_the_files_come_in_the_usual_order() -> None:
    environ = {
        "REGISTRY_AUTH_FILE": "/1", "DOCKER_CONFIG": "/2", "XDG_RUNTIME_DIR": "/3",
        "XDG_CONFIG_HOME": "/4", "HOME": "/5",
    }  # fmt: skip
    assert [path for path, _ in credential_files(None, environ)] == [
        "/1", "/2/config.json", "/3/containers/auth.json", "/4/containers/auth.json",
        "/5/.docker/config.json",
    ]  # fmt: skip
    assert credential_files("/0", environ) == [("/0", True)]


def test_the_first_file_that_knows_the_registry_wins(tmp_path: Path) -> None:
    write(tmp_path / "2/config.json", {"auths": {"r.io": auth("second", "x")}})
    environ = {
        "REGISTRY_AUTH_FILE": str(write(tmp_path / "1", {"auths": {"o.io": auth("first", "x")}})),
        "DOCKER_CONFIG": str(tmp_path / "2"),
        "HOME": str(tmp_path),
    }
    found = find_credentials(RegistryAccess(), "r.io", "a", environ=environ)
    assert found is not None
    assert found.username == "second"


def test_no_home_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert credential_files(None, {}) == []
    assert find_credentials(RegistryAccess(), "r.io", "a", environ={}) is None


def test_the_longest_path_wins(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.json",
        {
            "auths": {
                "r.io": auth("host", "x"),
                "r.io/a": auth("short", "x"),
                "r.io/a/b": auth("long", "x"),
                "r.io/a/bc": auth("other", "x"),
            }
        },
    )
    for repository, name in (("a/b", "long"), ("a/b/c", "long"), ("a/z", "short"), ("z", "host")):
        found = find(file, repository=repository)
        assert found is not None
        assert found.username == name


@pytest.mark.parametrize(
    "key", ["https://index.docker.io/v1/", "docker.io", "index.docker.io", "registry-1.docker.io"]
)
def test_docker_hub_has_many_keys(tmp_path: Path, key: str) -> None:
    file = write(tmp_path / "a.json", {"auths": {key: auth("hub", "p:w")}})
    found = find(file, "docker.io", "library/ubuntu")
    assert found is not None
    assert (found.username, found.password) == ("hub", "p:w")
    assert find(file, "quay.io", "library/ubuntu") is None


def test_old_keys_with_scheme_and_path_are_understood(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {"auths": {"https://r.io:5000/v2/": auth("u", "p")}})
    found = find(file, "r.io:5000")
    assert found is not None
    assert found.username == "u"


def test_identity_tokens(tmp_path: Path) -> None:
    entry = {**auth("u", ""), "identitytoken": "secret"}
    found = find(write(tmp_path / "a.json", {"auths": {"r.io": entry}}))
    assert found is not None
    assert found.identity_token == "secret"
    assert "secret" not in repr(found)


def test_helpers_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    answer = '{"ServerURL":"%s","Username":"%s","Secret":"s3"}'
    helper(tmp_path, "one", f'read h; printf \'{answer}\' "$h" "$h"')
    helper(tmp_path, "token", f"printf '{answer}' x '<token>'")
    helper(tmp_path, "none", "echo 'credentials not found in native keychain'; exit 1")
    helper(tmp_path, "broken", "echo 'keychain is locked' >&2; exit 1")
    file = tmp_path / "a.json"
    write(file, {"credHelpers": {"r.io": "one"}, "auths": {"r.io": auth("file", "x")}})
    found = find(file)
    assert found is not None
    assert (found.username, found.password) == ("r.io", "s3")
    write(file, {"credsStore": "token"})
    found = find(file)
    assert found is not None
    assert found.identity_token == "s3"
    write(file, {"credsStore": "none"})
    assert find(file) is None
    write(file, {"credsStore": "one", "auths": {"r.io": auth("file", "x")}})
    found = find(file)
    assert found is not None
    assert found.username == "file"
    write(file, {"credHelpers": {"r.io": "broken"}})
    with pytest.raises(AuthError, match="keychain is locked"):
        find(file)
    write(file, {"credHelpers": {"r.io": "missing"}})
    with pytest.raises(AuthError, match="docker-credential-missing"):
        find(file)
    write(file, {"credHelpers": {"r.io": "../evil"}})
    with pytest.raises(AuthError, match="bad name"):
        find(file)


def test_a_helper_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(credentials, "HELPER_TIMEOUT_S", 0.2)
    helper(tmp_path, "slow", "exec sleep 600")
    with pytest.raises(AuthError, match="no answer"):
        find(write(tmp_path / "a.json", {"credHelpers": {"r.io": "slow"}}))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"auths": []}', '{"auths": {"r.io": 7}}'])
def test_a_broken_file_is_an_error_only_if_it_was_named(tmp_path: Path, text: str) -> None:
    file = write(tmp_path / "config.json", text)
    environ = {"DOCKER_CONFIG": str(tmp_path), "HOME": str(tmp_path)}
    assert find_credentials(RegistryAccess(), "r.io", "a", environ=environ) is None
    if not text.startswith('{"'):
        with pytest.raises(AuthError, match=r"config\.json"):
            find(file)


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(AuthError, match="no such file"):
        find(tmp_path / "missing.json")

"""Logging in: challenges as registries write them, and who gets which credentials."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest

from clipshim.registry import tokens
from clipshim.registry.access import RegistryAccess
from clipshim.registry.attempts import AttemptFailed
from clipshim.registry.mirrors import Endpoint
from clipshim.registry.references import parse_reference
from clipshim.registry.tokens import Authorizer, Challenge, Grant, parse_challenges

if TYPE_CHECKING:
    from pathlib import Path

REFERENCE = parse_reference("r.io/a/b")
ORIGIN = Endpoint("https://r.io/v2", "r.io")
MIRROR = Endpoint("https://m.io/v2", "m.io", namespace="r.io")
BEARER = 'Bearer realm="https://auth.r.io/token",service="r",scope="repository:a/b:pull"'


class TokenServer:
    """Answers token requests and remembers them."""

    def __init__(self, *answers: tuple[int, object]) -> None:
        self.answers = list(answers) or [(200, {"token": "t1"})]
        self.asked: list[tuple[str, str, dict[str, str], bytes | None]] = []

    def __call__(
        self, method: str, url: str, headers: dict[str, str], body: bytes | None
    ) -> tuple[int, bytes]:
        self.asked.append((method, url, headers, body))
        status, answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
        return status, answer if isinstance(answer, bytes) else json.dumps(answer).encode()


def renew(
    access: RegistryAccess,
    server: TokenServer,
    *challenges: str,
    endpoint: Endpoint = ORIGIN,
    refused: Grant | None = None,
) -> Grant:
    return Authorizer(access).renew(
        endpoint, REFERENCE, "pull", challenges or (BEARER,), refused, server
    )


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (BEARER, [Challenge("bearer", "https://auth.r.io/token", "r", "repository:a/b:pull")]),
        ('bearer realm="x", service=y', [Challenge("bearer", "x", "y")]),
        ('Basic realm="a, Bearer of b"', [Challenge("basic", "a, Bearer of b")]),
        ('Basic realm="x", Bearer realm="y"', [Challenge("bearer", "y"), Challenge("basic", "x")]),
        ("Basic", [Challenge("basic")]),
        (r'Basic realm="a\"b"', [Challenge("basic", 'a"b')]),
        ('Bearer realm="x",scope="repository:a:pull,push"',
         [Challenge("bearer", "x", "", "repository:a:pull,push")]),
        ("Negotiate", []),
        ("", []),
    ],
)  # fmt: skip
def test_challenges(header: str, expected: list[Challenge]) -> None:
    assert parse_challenges([header]) == expected


def test_an_anonymous_token() -> None:
    server = TokenServer((200, {"access_token": "anon"}))
    grant = renew(RegistryAccess(anonymous=True), server)
    assert grant.header == "Bearer anon"
    assert grant.is_fresh
    ((method, url, headers, body),) = server.asked
    assert (method, body) == ("GET", None)
    assert "Authorization" not in headers
    query = parse_qs(urlsplit(url).query)
    assert query == {"service": ["r"], "scope": ["repository:a/b:pull"]}


def test_a_password_goes_to_the_token_server() -> None:
    server = TokenServer()
    renew(RegistryAccess(username="u", password="p:w"), server)
    ((_, _, headers, _),) = server.asked
    assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")) == b"u:p:w"


def test_an_identity_token_is_exchanged(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"auths": {"r.io": {"identitytoken": "id"}}}))
    server = TokenServer()
    renew(RegistryAccess(authfile=str(file)), server)
    ((method, url, headers, body),) = server.asked
    assert method == "POST"
    assert url == "https://auth.r.io/token"
    assert "Authorization" not in headers
    assert body is not None
    assert parse_qs(body.decode())["refresh_token"] == ["id"]


def test_basic_is_taken_when_it_is_all_there_is() -> None:
    access = RegistryAccess(username="u", password="p")
    grant = renew(access, TokenServer(), "Basic realm=x")
    assert grant.header == "Basic " + base64.b64encode(b"u:p").decode()


def test_a_mirror_does_not_get_the_registrys_password() -> None:
    access = RegistryAccess(username="u", password="p", authfile="/nonexistent-but-unused")
    server = TokenServer()
    with pytest.raises(Exception, match="no such file"):  # its own credentials are looked up
        renew(access, server, endpoint=MIRROR)
    assert server.asked == []


def test_a_password_is_not_sent_to_a_token_server_without_tls() -> None:
    server = TokenServer()
    challenge = BEARER.replace("https:", "http:")
    with pytest.raises(AttemptFailed, match="no TLS"):
        renew(RegistryAccess(username="u", password="p"), server, challenge)
    assert server.asked == []
    renew(RegistryAccess(anonymous=True), server, challenge)
    allowed = RegistryAccess(username="u", password="p", plain_http=frozenset({"auth.r.io"}))
    renew(allowed, server, challenge)
    assert len(server.asked) == 2


@pytest.mark.parametrize("realm", ["file:///etc/passwd", "nonsense", "https://"])
def test_a_realm_must_be_a_url(realm: str) -> None:
    server = TokenServer()
    with pytest.raises(AttemptFailed, match="realm"):
        renew(RegistryAccess(anonymous=True), server, f'Bearer realm="{realm}"')
    assert server.asked == []


@pytest.mark.parametrize(
    ("answer", "retryable"),
    [
        ((401, b""), False), ((403, b""), False), ((500, b""), True), ((429, b""), True),
        ((200, b"no json"), True), ((200, []), True), ((200, {"token": ""}), True),
        ((200, {"token": "a\r\nX: y"}), True), ((200, {"token": 7}), True),
    ],
)  # fmt: skip
def test_answers_of_a_token_server_that_are_no_token(
    answer: tuple[int, object], retryable: bool
) -> None:
    with pytest.raises(AttemptFailed) as caught:
        renew(RegistryAccess(anonymous=True), TokenServer(answer))
    assert caught.value.retryable is retryable


def test_a_challenge_that_cannot_be_met() -> None:
    for challenge in ("Basic realm=x", "Negotiate"):
        with pytest.raises(AttemptFailed) as caught:
            renew(RegistryAccess(anonymous=True), TokenServer(), challenge)
        assert not caught.value.retryable


def test_a_grant_is_kept_until_it_is_refused_or_old() -> None:
    server = TokenServer((200, {"token": "t1"}), (200, {"token": "t2", "expires_in": 300}))
    authorizer = Authorizer(RegistryAccess(anonymous=True))

    def get(refused: Grant | None) -> Grant:
        return authorizer.renew(ORIGIN, REFERENCE, "pull", (BEARER,), refused, server)

    assert authorizer.current(ORIGIN, "a/b", "pull") is None
    first = get(None)
    assert authorizer.current(ORIGIN, "a/b", "pull") is first
    assert authorizer.current(ORIGIN, "a/b", "pull,push") is None
    assert get(None) is first  # somebody else has logged in meanwhile
    second = get(first)
    assert second.header == "Bearer t2"
    authorizer.forget(ORIGIN, "a/b", "pull", first)
    assert authorizer.current(ORIGIN, "a/b", "pull") is second
    authorizer.forget(ORIGIN, "a/b", "pull", second)
    assert authorizer.current(ORIGIN, "a/b", "pull") is None
    assert not Grant("Bearer x", 0.0).is_fresh


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_GRANTS", 5)
    authorizer = Authorizer(RegistryAccess(anonymous=True))
    server = TokenServer(
        *((200, {"token": f"t{number}", "expires_in": 3600}) for number in range(100))
    )
    for number in range(20):
        reference = parse_reference(f"r.io/a/b{number}")
        authorizer.renew(ORIGIN, reference, "pull", [BEARER], None, server)
    fresh = [number for number in range(20) if authorizer.current(ORIGIN, f"a/b{number}", "pull")]
    assert fresh == [15, 16, 17, 18, 19]
    assert not authorizer._logins


def test_a_log_in_that_fails_leaves_nothing_behind() -> None:
    authorizer = Authorizer(RegistryAccess(anonymous=True))
    for _ in range(2):
        with pytest.raises(AttemptFailed):
            authorizer.renew(ORIGIN, REFERENCE, "pull", [BEARER], None, TokenServer((500, {})))
    assert not authorizer._logins
    assert authorizer.renew(ORIGIN, REFERENCE, "pull", [BEARER], None, TokenServer()).is_fresh

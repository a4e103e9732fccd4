"""Platforms: normal forms and which one is taken."""

from __future__ import annotations

import pytest

from clipshim.errors import UsageError
from clipshim.registry.platforms import (
    Platform,
    best_match,
    host_platform,
    parse_platform,
    platform_of,
    rank,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("linux/amd64", "linux/amd64"), ("amd64", "linux/amd64"), ("linux/x86_64", "linux/amd64"),
        ("linux/amd64/v1", "linux/amd64"), ("linux/arm64/v8", "linux/arm64"),
        ("linux/aarch64", "linux/arm64"), ("linux/arm", "linux/arm/v7"),
        ("linux/arm/7", "linux/arm/v7"), ("linux/armhf", "linux/arm/v7"),
        ("Linux/AMD64/V3", "linux/amd64/v3"), ("linux/s390x", "linux/s390x"),
    ],
)  # fmt: skip
def test_platforms_have_one_spelling(text: str, normal: str) -> None:
    assert str(parse_platform(text)) == normal


@pytest.mark.parametrize("text", ["", "a/b/c/d", "linux/", "linux/am d64", "/amd64"])
def test_bad_platforms_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_platform(text)


@pytest.mark.parametrize(
    ("wanted", "offered", "best"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64"], 1),
        ("linux/arm64", ["linux/arm/v7", "linux/arm64"], 1),
        ("linux/arm64", ["linux/arm/v6", "linux/arm/v7"], 1),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6", "linux/arm64"], 1),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], 1),
        ("linux/amd64", ["linux/amd64/v2"], None),
        ("linux/amd64", ["windows/amd64"], None),
        ("linux/amd64", ["linux/386"], 0),
        ("linux/amd64", ["linux/amd64", "linux/amd64"], 0),
        ("linux/riscv64", [], None),
    ],
)
def test_the_best_is_taken(wanted: str, offered: list[str], best: int | None) -> None:
    assert best_match(parse_platform(wanted), [parse_platform(item) for item in offered]) == best


def test_platforms_of_documents() -> None:
    assert platform_of({"os": "linux", "architecture": "arm", "variant": "v6"}) == Platform(
        "linux", "arm", "v6"
    )
    assert str(platform_of({})) == "unknown/unknown"
    assert str(platform_of({"os": 7})) == "unknown/unknown"
    assert rank(host_platform(), host_platform()) == 0

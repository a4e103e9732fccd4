"""What containers may name, before anything is fetched."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio

from clipshim.errors import (
    AuthError,
    BadReferenceError,
    ClipError,
    IndexFormatError,
    NotFoundError,
    PolicyError,
    RegistryError,
    UsageError,
)
from clipshim.index.builder import BuildOptions, build_index
from clipshim.node import resolver as resolver_module
from clipshim.node.images import ImageNames
from clipshim.node.resolver import MISSING_S, Resolver
from clipshim.registry import artifacts
from clipshim.settings import Settings
from tests.unit.index.samples import every_encoding

if TYPE_CHECKING:
    from pathlib import Path


async def quiet(_: dict[str, Any]) -> None:
    """No progress."""


def resolve(tmp_path: Path, source: object, **values: object) -> ClipError:
    """The error that a source gets; nothing here may reach a network."""
    settings = Settings(
        {"state_dir": str(tmp_path / "state"), "run_dir": str(tmp_path / "run"), **values}
    )
    resolver = Resolver(settings, ImageNames(settings))
    with pytest.raises(ClipError) as caught:
        trio.run(resolver.resolve, source, [], quiet)
    return caught.value


def test_a_registry_that_is_not_allowed_is_never_asked(tmp_path: Path) -> None:
    error = resolve(
        tmp_path,
        {"image": "evil.example/x:1", "engine_named": False},
        allowed_registries=["*.good.example", "docker.io"],
    )
    assert isinstance(error, PolicyError)
    assert error.hint is not None
    assert "allowed_registries" in error.hint


def test_local_files_cannot_be_named_as_images(tmp_path: Path) -> None:
    for image in ("oci:/etc", "oci-archive:/etc/passwd", "docker-archive:/x"):
        error = resolve(tmp_path, {"image": image, "engine_named": True})
        assert isinstance(error, PolicyError), image
    assert isinstance(resolve(tmp_path, {"image": "/etc/passwd"}), BadReferenceError)


def test_an_engines_image_without_index_is_not_found_rather_than_refused(tmp_path: Path) -> None:
    error = resolve(
        tmp_path, {"image": "evil.example/x:1", "engine_named": True}, allowed_registries=[]
    )
    assert isinstance(error, NotFoundError)


@pytest.mark.parametrize("trouble", [None, NotFoundError, RegistryError, AuthError])
def test_that_a_registry_has_no_index_of_an_engines_image_is_remembered(
    trouble: type[ClipError] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def find_index(image: str, **_: object) -> None:
        asked.append(image)
        if trouble is not None:
            raise trouble("for the test")

    monkeypatch.setattr(artifacts, "find_index", find_index)
    settings = Settings({"state_dir": str(tmp_path / "state"), "run_dir": str(tmp_path / "run")})
    resolver = Resolver(settings, ImageNames(settings))
    now = 0.0
    monkeypatch.setattr(trio, "current_time", lambda: now)
    for later, times in ((0.0, 1), (1.0, 1), (MISSING_S - 1, 1), (MISSING_S + 1, 2)):
        now = later
        with pytest.raises(NotFoundError):
            trio.run(resolver.resolve, {"image": "r.example/x:1", "engine_named": True}, [], quiet)
        assert asked == ["r.example/x:1"] * times
    with pytest.raises(NotFoundError):
        trio.run(resolver.resolve, {"image": "r.example/y:1", "engine_named": True}, [], quiet)
    assert asked[-1] == "r.example/y:1", "other images are looked up"


def test_a_slow_registry_is_not_waited_for_and_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    asked: list[str] = []

    def find_index(image: str, **_: object) -> None:
        asked.append(image)
        answer.wait(60)

    monkeypatch.setattr(artifacts, "find_index", find_index)
    monkeypatch.setattr(resolver_module, "LOOK_UP_S", 0.2)
    settings = Settings({"state_dir": str(tmp_path / "state"), "run_dir": str(tmp_path / "run")})
    resolver = Resolver(settings, ImageNames(settings))

    async def main() -> None:
        for name in ("x", "x", "y"):
            source = {"image": f"slow.example/{name}:1", "engine_named": True}
            with pytest.raises(NotFoundError):
                await resolver.resolve(source, [], quiet)
        assert asked == ["slow.example/x:1"]
        assert not answer.is_set()

    try:
        trio.run(main)
    finally:
        answer.set()


def test_a_digest_must_be_one_and_be_here(tmp_path: Path) -> None:
    assert isinstance(resolve(tmp_path, {"digest": "../../x"}), BadReferenceError)
    assert isinstance(resolve(tmp_path, {"digest": "sha256:" + "0" * 64}), NotFoundError)


def test_a_source_of_another_shape_is_a_usage_error(tmp_path: Path) -> None:
    sources: tuple[object, ...] = (
        None,
        [],
        {},
        {"fd": True},
        {"fd": True, "origin": "/x"},
        {"image": 5},
    )
    for source in sources:
        assert isinstance(resolve(tmp_path, source), UsageError), source


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ImageNames, Resolver, str]:
    """A local store with an index that counts as large, as its daemon finds it."""
    config = tmp_path / "config.toml"
    config.write_text(f'state_dir = "{tmp_path}/state"\nrun_dir = "{tmp_path}/run"\n')
    monkeypatch.setenv("CLIPSHIM_CONFIG", str(config))
    monkeypatch.setattr(resolver_module, "LARGE_INDEX_BYTES", 0)
    settings = Settings({"state_dir": f"{tmp_path}/state", "run_dir": f"{tmp_path}/run"})
    images = ImageNames(settings)
    clip = tmp_path / "app.clip"
    sample = every_encoding()
    build_index(sample.source(), clip, BuildOptions())
    with clip.open("rb") as file:
        digest = images.add(file.fileno())
    return images, Resolver(settings, images), digest


def test_a_large_index_is_checked_in_a_process_of_its_own(
    stored: tuple[ImageNames, Resolver, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, resolver, digest = stored
    monkeypatch.setattr(resolver_module, "check_tree", None)  # not here
    facts = resolver.check(digest)
    assert facts == images.facts(digest)
    assert facts.reference == "registry.example/app:1"
    assert resolver.check(digest) == facts


def test_what_the_check_elsewhere_finds_is_the_error(
    stored: tuple[ImageNames, Resolver, str],
) -> None:
    images, resolver, digest = stored
    other = "sha256:" + "0" * 64
    os.rename(images.path(digest), images.path(other))
    with pytest.raises(IndexFormatError, match="the file holds"):
        resolver.check(other)
    assert images.facts(other) is None

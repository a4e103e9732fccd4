"""What containers may name, before anything is fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from clipshim.errors import BadReferenceError, ClipError, NotFoundError, PolicyError, UsageError
from clipshim.node.images import ImageNames
from clipshim.node.resolver import Resolver
from clipshim.settings import Settings

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

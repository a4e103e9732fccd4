"""The engines under test: each with runc and the full image, then with clipshim and a stub."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

import pytest

from tests.support import images
from tests.support.engine import Target, make_target
from tests.support.node import Node, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from tests.support.images import Image

IMAGE = "localhost/debian:test"  # the full image, or a stub of it
ORDINARY = "localhost/tiny:test"


class Engine(Protocol):
    """What the engines' classes have in common."""

    target: Target

    def __call__(self, *arguments: str | Path) -> str: ...

    def close(self) -> None: ...


E = TypeVar("E", bound=Engine)


@contextmanager
def loaded(engine: E, archives: Iterable[Path]) -> Iterator[E]:
    """An engine with images loaded; at the end its containers have left nothing mounted."""
    try:
        for archive in archives:
            engine("load", "-q", "-i", archive)
        yield engine
        wait_for("no container mount is left", lambda: not engine.target.container_mounts())
    finally:
        engine.close()


@pytest.fixture(scope="session", params=["runc", "clipshim"])
def target(request: pytest.FixtureRequest, run_root: Path) -> Iterator[Target]:
    """The runtime that the engine calls."""
    if request.param == "runc":
        yield make_target("runc", run_root / "target", None)
        return
    with Node(run_root / "engines-node") as node:
        yield make_target("clipshim", run_root / "target", node)


@pytest.fixture(scope="session")
def archives(
    request: pytest.FixtureRequest, run_root: Path, target: Target, debian: Image, tiny: Image
) -> list[Path]:
    """docker-archives of IMAGE and ORDINARY."""
    directory = run_root / f"archives-{target.name}"
    directory.mkdir()
    first, second = directory / "debian.tar", directory / "tiny.tar"
    images.convert(tiny, f"docker-archive:{second}", name=ORDINARY)
    if target.node is None:
        images.convert(debian, f"docker-archive:{first}", name=IMAGE)
    else:
        reference = request.getfixturevalue("debian_reference")
        target.node.clipshim(
            "stub", reference, "-o", first, "--archive-format", "docker-archive", "--name", IMAGE
        )
        assert first.stat().st_size < debian.compressed_size / 10
    return [first, second]

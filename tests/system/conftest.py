"""What the system tests share: one registry with the real images, an index, private nodes."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from tests.support import images
from tests.support.node import Node
from tests.support.registry import TestRegistry, running_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.images import Image

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def registry(run_root: Path) -> Iterator[TestRegistry]:
    """The real docker-registry on loopback."""
    with running_registry(run_root / "registry") as running:
        yield running


@pytest.fixture(scope="session")
def debian() -> Image:
    """The Debian image with python3, gzip layers."""
    return images.debian_image("gzip")


@pytest.fixture(scope="session")
def debian_reference(registry: TestRegistry, debian: Image) -> str:
    """Its name in the registry."""
    return registry.push_layout(debian.layout, "debian:test", tag=images.TAG)


@pytest.fixture(scope="session")
def tiny() -> Image:
    """One layer with busybox."""
    return images.tiny_image()


@pytest.fixture(scope="session")
def tiny_reference(registry: TestRegistry, tiny: Image) -> str:
    """Its name in the registry."""
    return registry.push_layout(tiny.layout, "tiny:test", tag=images.TAG)


@pytest.fixture(scope="session")
def debian_clip(run_root: Path, debian_reference: str) -> Path:
    """The index of the Debian image, made once."""
    path = run_root / "indexes" / "debian.clip"
    path.parent.mkdir()
    with Node(run_root / "indexer") as node:
        node.clipshim("index", debian_reference, path)
    return path


@pytest.fixture
def make_node(run_root: Path) -> Iterator[Callable[..., Node]]:
    """Makes private nodes with settings; closes them at the end."""
    nodes: list[Node] = []

    def make(**settings: object) -> Node:
        node = Node(run_root / f"n{next(_NUMBERS)}", **settings)
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.close()


@pytest.fixture
def node(make_node: Callable[..., Node]) -> Node:
    """One private node with the defaults."""
    return make_node()

"""A node, a runtime with a root of its own, and bundles that name the small image."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.support import images
from tests.support.node import Node
from tests.support.runtimes import Runtime, write_bundle
from tests.system.shim.containers import INDEX, assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny_clip(run_root: Path) -> Path:
    """A self-contained index of the small image: no registry is needed."""
    path = run_root / "tiny.clip"
    with Node(run_root / "tiny-indexer") as node:
        layout = f"oci:{images.tiny_image().layout}:{images.TAG}"
        node.clipshim("index", layout, path, "--embed", "--quiet")
    return path


@pytest.fixture(scope="module")
def node(request: pytest.FixtureRequest, run_root: Path) -> Iterator[Node]:
    """One node for the tests of a module that do not disturb it."""
    with Node(run_root / request.module.__name__.rpartition(".")[2]) as made:
        yield made


@pytest.fixture
def runtime(node: Node, tmp_path: Path) -> Iterator[Runtime]:
    """clipshim with a --root of this test's own; afterwards nothing of any container is left."""
    with Runtime.clipshim(tmp_path / "root", node) as made:
        yield made
    assert_clean(node)


@pytest.fixture
def bundle(tmp_path: Path, tiny_clip: Path) -> Callable[..., Path]:
    """Makes bundles that name the small image's index."""

    def make(arguments: list[str], name: str = "bundle") -> Path:
        path = write_bundle(tmp_path / name, arguments, annotations=INDEX)
        shutil.copy(tiny_clip, path / "index.clip")
        return path

    return make

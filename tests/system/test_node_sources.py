"""Where a layer's bytes come from when several images have it: any of their registries will do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support import images
from tests.support.fault_proxy import Fault, FaultProxy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.images import Image
    from tests.support.node import Node
    from tests.support.registry import TestRegistry


PROGRAMS = ("bin/tar", "bin/bash", "bin/ls", "bin/sed")


def two_directories(directory: Path) -> list[Path]:
    """Where the two images' trees are to be mounted."""
    trees = [directory / "first", directory / "second"]
    for tree in trees:
        tree.mkdir()
    return trees


def index_from_both(
    node: Node, first: FaultProxy, second: FaultProxy, name: str, directory: Path
) -> None:
    """The indexes first.clip and second.clip of one image in two registries."""
    for registry, index in ((first, "first.clip"), (second, "second.clip")):
        node.clipshim("index", "-q", f"{registry.host}/{name}", directory / index)


def read_in_turns(trees: list[Path]) -> None:
    """Different files from each, all of them right."""
    root = images.debian_root()
    for number, name in enumerate(PROGRAMS):
        found = (trees[number % len(trees)] / "usr" / name).read_bytes()
        assert found == (root / "usr" / name).read_bytes()


def test_a_second_registry_helps_out_when_the_first_is_gone(
    make_node: Callable[..., Node], registry: TestRegistry, debian: Image, tmp_path: Path
) -> None:
    """Also for the tree of the first, which was mounted and read when nobody knew the second."""
    registry.push_layout(debian.layout, "sources:1", tag=images.TAG)
    root = images.debian_root()
    node = make_node(connect_timeout_s=2.0, fetch_deadline_s=120.0)
    trees = two_directories(tmp_path)
    with FaultProxy(registry.host) as first, FaultProxy(registry.host) as second:
        index_from_both(node, first, second, "sources:1", tmp_path)
        node.clipshim("mount", tmp_path / "first.clip", trees[0])
        try:
            assert (trees[0] / "usr/bin/cat").read_bytes() == (root / "usr/bin/cat").read_bytes()
            with first.refusing():
                node.clipshim("mount", tmp_path / "second.clip", trees[1])
                read_in_turns(trees)
        finally:
            for tree in trees:
                node.clipshim("umount", tree, check=False)


def test_a_registry_that_keeps_silent_is_not_waited_for_when_another_has_the_layer(
    make_node: Callable[..., Node], registry: TestRegistry, debian: Image, tmp_path: Path
) -> None:
    """Only the second registry can end the reads within the patience of any test."""
    registry.push_layout(debian.layout, "silent:1", tag=images.TAG)
    node = make_node(read_timeout_s=36_000.0, fetch_deadline_s=36_000.0)
    trees = two_directories(tmp_path)
    with FaultProxy(registry.host) as first, FaultProxy(registry.host) as second:
        index_from_both(node, first, second, "silent:1", tmp_path)
        first.inject(Fault("stall-headers"), match="GET", times=1_000_000)
        try:
            for tree, name in zip(trees, ("first", "second"), strict=True):
                node.clipshim("mount", tmp_path / f"{name}.clip", tree)
            read_in_turns(trees)
        finally:
            for tree in trees:
                node.clipshim("umount", tree, check=False)

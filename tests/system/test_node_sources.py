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


def test_a_second_registry_helps_out_when_the_first_is_gone(
    make_node: Callable[..., Node], registry: TestRegistry, debian: Image, tmp_path: Path
) -> None:
    """Also for the tree of the first, which was mounted and read when nobody knew the second."""
    registry.push_layout(debian.layout, "sources:1", tag=images.TAG)
    root = images.debian_root()
    node = make_node(connect_timeout_s=2.0, fetch_deadline_s=120.0)
    trees = [tmp_path / "first", tmp_path / "second"]
    for tree in trees:
        tree.mkdir()
    with FaultProxy(registry.host) as first, FaultProxy(registry.host) as second:
        node.clipshim("index", "-q", f"{first.host}/sources:1", tmp_path / "first.clip")
        node.clipshim("index", "-q", f"{second.host}/sources:1", tmp_path / "second.clip")
        node.clipshim("mount", tmp_path / "first.clip", trees[0])
        try:
            assert (trees[0] / "usr/bin/cat").read_bytes() == (root / "usr/bin/cat").read_bytes()
            with first.refusing():
                node.clipshim("mount", tmp_path / "second.clip", trees[1])
                for number, name in enumerate(("bin/tar", "bin/bash", "bin/ls", "bin/sed")):
                    found = (trees[number % 2] / "usr" / name).read_bytes()
                    assert found == (root / "usr" / name).read_bytes()
        finally:
            for tree in trees:
                node.clipshim("umount", tree, check=False)


def test_a_registry_that_keeps_silent_is_not_waited_for_when_another_has_the_layer(
    make_node: Callable[..., Node], registry: TestRegistry, debian: Image, tmp_path: Path
) -> None:
    """Only the second registry can end the reads within the patience of any test."""
    registry.push_layout(debian.layout, "silent:1", tag=images.TAG)
    root = images.debian_root()
    node = make_node(read_timeout_s=36_000.0, fetch_deadline_s=36_000.0)
    trees = [tmp_path / "first", tmp_path / "second"]
    for tree in trees:
        tree.mkdir()
    with FaultProxy(registry.host) as first, FaultProxy(registry.host) as second:
        node.clipshim("index", "-q", f"{first.host}/silent:1", tmp_path / "first.clip")
        node.clipshim("index", "-q", f"{second.host}/silent:1", tmp_path / "second.clip")
        first.inject(Fault("stall-headers"), match="GET", times=1_000_000)
        try:
            for tree, name in zip(trees, ("first", "second"), strict=True):
                node.clipshim("mount", tmp_path / f"{name}.clip", tree)
            for number, name in enumerate(("bin/tar", "bin/bash", "bin/ls", "bin/sed")):
                found = (trees[number % 2] / "usr" / name).read_bytes()
                assert found == (root / "usr" / name).read_bytes()
        finally:
            for tree in trees:
                node.clipshim("umount", tree, check=False)

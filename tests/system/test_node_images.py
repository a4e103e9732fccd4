"""Images by name: the local store, an index beside the image in a registry, indexing on demand."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from clipshim.errors import ClipError, NotFoundError, PolicyError, RegistryError
from clipshim.index.model import MAX_LAYERS
from tests.support import images, small_images
from tests.support.node import wait_for
from tests.system import node_trees

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.node import Node
    from tests.support.registry import TestRegistry


@pytest.fixture
def pushed(registry: TestRegistry, tmp_path: Path) -> tuple[str, dict[str, str]]:
    """An image of this test's own in the registry."""
    reference, sums = node_trees.make_image(tmp_path, seed=11)
    layout = reference.removeprefix("oci:").removesuffix(":test")
    name = f"node/{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}:1"
    return registry.push_layout(layout, name, tag="test"), sums


def by_image(node: Node, image: str, *, engine_named: bool = False) -> dict[str, Any]:
    source = {"image": image, "engine_named": engine_named}
    return node_trees.mount_source(node, source, "c1")


def check(answer: dict[str, Any], sums: dict[str, str]) -> None:
    for name, expected in sums.items():
        data = (Path(answer["tree"]) / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == expected


def test_an_image_without_index_is_not_found_and_the_hint_says_what_to_do(
    node: Node, pushed: tuple[str, dict[str, str]]
) -> None:
    node.start()
    for engine_named in (False, True):
        with pytest.raises(NotFoundError) as caught:
            by_image(node, pushed[0], engine_named=engine_named)
        assert pushed[0] in str(caught.value)
    assert node.call("status")["images"] == []


def test_an_image_is_found_in_the_local_store(
    node: Node, pushed: tuple[str, dict[str, str]]
) -> None:
    node.clipshim("index", pushed[0])
    node.start()
    check(by_image(node, pushed[0], engine_named=True), pushed[1])


def test_an_index_beside_the_image_in_the_registry_is_fetched(
    node: Node, pushed: tuple[str, dict[str, str]]
) -> None:
    node.clipshim("push", node_trees.index(node, pushed[0]), pushed[0])
    node.start()
    check(by_image(node, pushed[0]), pushed[1])


def test_an_image_is_indexed_on_demand_once_if_so_configured(
    make_node: Callable[..., Node], pushed: tuple[str, dict[str, str]]
) -> None:
    node = make_node(index_on_demand=True)
    node.start()
    check(by_image(node, pushed[0]), pushed[1])
    by_image(node, pushed[0])
    text = node.call("metrics")["text"]
    assert "clipshim_indexed_total 1.0" in text


def test_a_registry_outside_the_policy_is_refused_whatever_names_it(
    make_node: Callable[..., Node], pushed: tuple[str, dict[str, str]]
) -> None:
    node = make_node(allowed_registries=["registry.example"], index_on_demand=True)
    node.start()
    with pytest.raises(PolicyError):
        by_image(node, pushed[0])
    clip = node_trees.index(node, pushed[0])
    with pytest.raises(PolicyError):  # a stub that names it
        node_trees.mount(node, clip, "c2", origin="stub")
    assert node_trees.mount(node, clip, "c3")["ok"]  # the owner's own file


def test_a_stub_cannot_have_local_files_read(node: Node, tmp_path: Path) -> None:
    reference, _ = node_trees.make_image(tmp_path, seed=12)
    clip = node_trees.index(node, reference)
    node.start()
    with pytest.raises(PolicyError):
        node_trees.mount(node, clip, "c1", origin="stub")


def test_a_damaged_index_is_refused_and_leaves_nothing(node: Node, tmp_path: Path) -> None:
    reference, _ = node_trees.make_image(tmp_path, seed=13)
    clip = node_trees.index(node, reference)
    data = bytearray(clip.read_bytes())
    for at in (len(data) // 2, 9, len(data) - 3):
        data[at] ^= 0xFF
    clip.write_bytes(data)
    node.start()
    with pytest.raises(ClipError):
        node_trees.mount(node, clip, "c1")
    status = node.call("status")
    assert status["images"] == []
    assert node.mounts() == [f"{node.run_dir}/layers"]


def test_an_unreachable_registry_is_an_error_that_names_it(
    make_node: Callable[..., Node],
) -> None:
    node = make_node(fetch_deadline_s=2.0, connect_timeout_s=1.0)
    node.start()
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:9"):
        by_image(node, "127.0.0.1:9/nobody/home:1")
    wait_for("the daemon still answers", node.ping)


@pytest.mark.parametrize("mode", ["erofs", "fuse"])
def test_layers_that_end_with_their_last_files_last_byte_are_read_to_the_end(
    node: Node, tmp_path: Path, mode: str
) -> None:
    reference, sums = node_trees.make_image(tmp_path, seed=14, padded=False)
    node.start()
    clip = node_trees.index(node, reference)
    check(node_trees.mount(node, clip, "c1", mode=mode), sums)
    # complete layers are read from the store's own files where that is possible
    answer = node_trees.mount(node, clip, "c1", mode=mode)
    assert node.call("complete", image=answer["index_digest"])["ok"]
    node.call("release", container="c1")
    node.call("gc", dry_run=False)
    check(node_trees.mount(node, clip, "c1", mode=mode), sums)


@pytest.mark.parametrize("mode", ["erofs", "fuse"])
def test_an_image_of_as_many_layers_as_there_may_be(node: Node, tmp_path: Path, mode: str) -> None:
    """Their names are more than one packet, or one argument of a process, can hold."""
    files = []
    for number in range(MAX_LAYERS):
        top = {"usr/": b"", "proc/": b""} if not number else {}
        contents = {**top, f"file-{number}": b"%d" % number * 1000}
        files.append(small_images.layer(tmp_path / f"{number}.tar", contents))
    made = small_images.image(tmp_path / "oci", files)
    clip = node_trees.index(node, f"oci:{made.layout}:{images.TAG}")
    node.start()
    tree = Path(node_trees.mount(node, clip, "c1", mode=mode)["tree"])
    for number in (0, 1, 500, MAX_LAYERS - 1):
        assert (tree / f"file-{number}").read_bytes() == b"%d" % number * 1000
    node.kill_server()
    assert (tree / "file-7").read_bytes() == b"7" * 1000

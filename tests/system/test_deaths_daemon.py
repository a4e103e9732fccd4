"""Deaths of the daemon's processes under reading: nobody fails, no byte is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.node import wait_for
from tests.system import node_trees

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.node import Node

MODES = ("erofs", "fuse")
KILLS = 5

Image = tuple[str, dict[str, str]]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return node_trees.make_image(tmp_path_factory.mktemp("deaths"))


@pytest.mark.parametrize("mode", MODES)
def test_readers_outlive_servers_killed_again_and_again(
    node: Node, image: Image, mode: str
) -> None:
    node.start()
    tree = node_trees.mount(node, node_trees.index(node, image[0]), "c1", mode=mode)["tree"]
    with node_trees.Reader(node, tree, image[1]) as reader:
        for _ in range(KILLS):
            node.kill_server()
            reader.wait_rounds(1)


def test_readers_outlive_tree_servers_killed_again_and_again(node: Node, image: Image) -> None:
    node.start()
    tree = node_trees.mount(node, node_trees.index(node, image[0]), "c1", mode="fuse")["tree"]
    with node_trees.Reader(node, tree, image[1]) as reader:
        for _ in range(KILLS):
            (found,) = node_trees.daemon_ids(node)["trees"].values()
            os.kill(found["process"][0], signal.SIGKILL)
            before = found["process"]

            def replaced(before: list[int] = before) -> bool:
                (now,) = node_trees.daemon_ids(node)["trees"].values()
                return now["process"] not in (None, before)

            wait_for("another tree server", replaced)
            reader.wait_rounds(1)


@pytest.mark.parametrize("mode", MODES)
def test_readers_outlive_the_keeper_and_then_the_server(
    node: Node, image: Image, mode: str
) -> None:
    node.start()
    tree = node_trees.mount(node, node_trees.index(node, image[0]), "c1", mode=mode)["tree"]
    with node_trees.Reader(node, tree, image[1]) as reader:
        for _ in range(3):
            keeper = int(node.call("ping")["keeper_pid"])
            os.kill(keeper, signal.SIGKILL)

            def replaced(keeper: int = keeper) -> bool:
                return node.call("ping")["keeper_pid"] not in (None, keeper)

            wait_for("another keeper", replaced)
            reader.wait_rounds(1)
            node.kill_server()  # the new keeper must know how to replace it
            reader.wait_rounds(1)
    node.call("release", container="c1")
    assert node.call("stop")["ok"]
    wait_for("every process is gone", lambda: not node.processes())
    assert node.mounts() == []


@pytest.mark.parametrize("mode", MODES)
def test_an_orderly_replacement_under_reading(node: Node, image: Image, mode: str) -> None:
    before = node.start()
    tree = node_trees.mount(node, node_trees.index(node, image[0]), "c1", mode=mode)["tree"]
    with node_trees.Reader(node, tree, image[1]) as reader:
        assert node.call("replace")["ok"]
        wait_for(
            "another server", lambda: (node.ping() or {}).get("pid") not in (None, before["pid"])
        )
        reader.wait_rounds(2)
        assert node_trees.mount(node, node.directory / "index.clip", "c2")["tree"] == tree


@pytest.mark.parametrize("mode", MODES)
def test_when_all_die_the_next_daemon_repairs_and_says_what_it_cannot(
    make_node: Callable[..., Node], image: Image, mode: str
) -> None:
    node = make_node(mode=mode)
    node.start()
    clip = node_trees.index(node, image[0])
    answer = node_trees.mount(node, clip, "c1")
    tree = answer["tree"]
    (node.run_dir / "c1").mkdir()
    state = {"version": 1, "id": "c1", "root": "/", "image_id": answer["image_id"]}
    (node.run_dir / "c1" / "state.json").write_text(json.dumps(state))
    node_trees.kill_everything(node)
    node.start()
    assert "dead layers mount" in node.log_tail(200)
    assert "containers=c1" in node.log_tail(200)
    answer = node_trees.mount(node, clip, "c2")
    assert answer["tree"] == tree
    assert node.mounts().count(tree) == 1
    with node_trees.Reader(node, tree, image[1]) as reader:
        reader.wait_rounds(1)


def test_a_mount_request_survives_the_server_that_worked_on_it(node: Node, image: Image) -> None:
    node.start()
    clip = node_trees.index(node, image[0])
    for i in range(KILLS):
        pid = int(node.call("ping")["pid"])
        os.kill(pid, signal.SIGKILL)  # what is asked now waits for the next server
        assert node_trees.mount(node, clip, f"c{i}")["ok"]
    assert node.call("status")["images"][0]["containers"] >= 1


@pytest.mark.parametrize("mode", MODES)
def test_a_complete_image_outlives_its_registry_and_every_process(
    make_node: Callable[..., Node], tmp_path: Path, mode: str
) -> None:
    reference, sums = node_trees.make_image(tmp_path, seed=7)
    node = make_node(mode=mode)
    node.start()
    clip = node_trees.index(node, reference)
    digest = node_trees.mount(node, clip, "c0")["index_digest"]
    node.call("release", container="c0")
    layers = node.call("complete", image=digest)["layers"]
    assert [layer["complete"] for layer in layers] == [True] * node_trees.LAYERS
    shutil.rmtree(tmp_path / "image-7")
    node.call("gc", dry_run=False)  # so that the next mount sees that the layers are complete
    tree = node_trees.mount(node, clip, "c1")["tree"]
    with node_trees.Reader(node, tree, sums) as reader:
        reader.wait_rounds(1)
    if mode == "erofs":  # the kernel reads the store's files itself
        node_trees.kill_everything(node)
        layers_mount = f"{node.run_dir}/layers"
        subprocess.run(["umount", "--lazy", layers_mount], check=True)
        with node_trees.Reader(node, tree, sums) as reader:
            reader.wait_rounds(1)
        node.start()
        assert node_trees.mount(node, clip, "c2")["tree"] == tree
        assert node.mounts().count(tree) == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_layers_mount_that_somebody_aborted_is_made_anew(
    make_node: Callable[..., Node], image: Image, mode: str
) -> None:
    node = make_node(mode=mode)
    node.start()
    clip = node_trees.index(node, image[0])
    tree = node_trees.mount(node, clip, "c1")["tree"]
    before = node_trees.daemon_ids(node)["generation"]
    # aborts the connection even if the mount is busy
    subprocess.run(["umount", "--force", f"{node.run_dir}/layers"], check=False)
    wait_for("another connection", lambda: node_trees.daemon_ids(node)["generation"] != before)
    assert node_trees.mount(node, clip, "c2")["tree"] == tree
    with node_trees.Reader(node, tree, image[1]) as reader:
        reader.wait_rounds(1)
    assert "layers mount is gone" in node.log_tail(200)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "text",
    [
        'run_dir = "/elsewhere"\nno such key = [',
        'run_dir = "{0}/other-run"\nstate_dir = "{0}/other-state"\n',
        None,
    ],
    ids=["broken", "moved", "gone"],
)
def test_no_edit_of_the_configuration_harms_what_runs(
    node: Node, image: Image, mode: str, text: str | None
) -> None:
    node.start()
    tree = node_trees.mount(node, node_trees.index(node, image[0]), "c1", mode=mode)["tree"]
    with node_trees.Reader(node, tree, image[1]) as reader:
        if text is None:
            node.config.unlink()
        else:
            node.config.write_text(text.replace("{0}", str(node.directory)))
        node.kill_server()
        reader.wait_rounds(1)
        if mode == "fuse":
            (found,) = node_trees.daemon_ids(node)["trees"].values()
            os.kill(found["process"][0], signal.SIGKILL)
            reader.wait_rounds(1)
        answer = node.call("replace")
        if text is None or "no such key" in text:
            assert not answer["ok"]
            assert "configuration" in answer["error"]
        before = wait_for("an answer", node.ping)
        os.kill(before["keeper_pid"], signal.SIGHUP)  # who does not ask is not refused

        def replaced() -> bool:
            now = node.ping()
            return now is not None and now["pid"] != before["pid"]

        wait_for("the daemon is replaced", replaced)
        reader.wait_rounds(1)
        keeper = int(wait_for("an answer", node.ping)["keeper_pid"])
        os.kill(keeper, signal.SIGKILL)

        def another_keeper() -> bool:
            now = node.ping()
            return now is not None and now["keeper_pid"] not in (None, keeper)

        wait_for("another keeper", another_keeper)
        node.kill_server()
        reader.wait_rounds(1)
    assert not (node.directory / "other-run").exists()
    assert not (node.directory / "other-state").exists()
    node.configure()


@pytest.mark.parametrize("mode", MODES)
def test_replacements_that_are_asked_for_all_the_time_harm_nobody(
    node: Node, image: Image, mode: str
) -> None:
    """Also while the keeper executes itself and has not got to its signals yet."""
    node.start()
    tree = node_trees.mount(node, node_trees.index(node, image[0]), "c1", mode=mode)["tree"]
    with node_trees.Reader(node, tree, image[1]) as reader:
        keeper = int(node.call("ping")["keeper_pid"])
        servers: set[int] = set()

        def replaced_often() -> bool:
            os.kill(keeper, signal.SIGHUP)
            server = node_trees.daemon_ids(node)["server"]
            if server is not None:
                servers.add(server[0])
            return len(servers) > 5

        wait_for("replacements", replaced_often)
        reader.wait_rounds(1)
        assert wait_for("an answer", node.ping)["keeper_pid"] == keeper

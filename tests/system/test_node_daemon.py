"""The node daemon as a whole: mounts in both modes, sharing, lingering, stop, hostile clients."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import images
from tests.support.node import wait_for
from tests.system import node_trees

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.node import Node

MODES = ("erofs", "fuse")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    return node_trees.make_image(tmp_path_factory.mktemp("node"))


def sums_below(tree: str) -> dict[str, str]:
    found = {}
    for path in sorted(Path(tree).rglob("*")):
        if path.is_file():
            found[str(path.relative_to(tree))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("mode", MODES)
def test_a_mounted_tree_has_every_byte_of_the_image(
    node: Node, image: tuple[str, dict[str, str]], mode: str
) -> None:
    node.start()
    answer = node_trees.mount(node, node_trees.index(node, image[0]), "c1", mode=mode)
    assert answer["mode"] == mode
    assert answer["has_proc"] is True
    assert answer["has_usr"] is True
    assert sums_below(answer["tree"]) == image[1]
    assert os.stat(f"{answer['tree']}/proc").st_nlink >= 2


@pytest.mark.parametrize("mode", MODES)
def test_containers_of_an_image_share_one_tree_that_goes_when_the_last_is_gone(
    make_node: Callable[..., Node], image: tuple[str, dict[str, str]], mode: str
) -> None:
    node = make_node(linger_s=0.1)
    node.start()
    clip = node_trees.index(node, image[0])
    answers: list[dict[str, Any]] = []
    threads = [
        threading.Thread(
            target=lambda i=i: answers.append(node_trees.mount(node, clip, f"c{i}", mode=mode))
        )
        for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 12
    assert len({answer["tree"] for answer in answers}) == 1
    assert node.mounts().count(answers[0]["tree"]) == 1
    for i in range(12):
        assert node.call("release", container=f"c{i}")["ok"]
        assert node.call("release", container=f"c{i}")["ok"]  # twice is once
    wait_for("the tree is unmounted", lambda: answers[0]["tree"] not in node.mounts())
    assert node_trees.mount(node, clip, "again", mode=mode)["tree"] in node.mounts()


def test_a_tree_with_a_container_outlives_linger_and_collection(
    make_node: Callable[..., Node], image: tuple[str, dict[str, str]]
) -> None:
    node = make_node(linger_s=0.0)
    node.start()
    tree = node_trees.mount(node, node_trees.index(node, image[0]), "c1")["tree"]
    assert node.call("gc", dry_run=False)["ok"]
    assert tree in node.mounts()
    refused = node.call("stop")
    assert not refused["ok"]
    assert "c1" in refused["error"]
    assert node.call("release", container="c1")["ok"]
    wait_for("the tree is unmounted", lambda: tree not in node.mounts())


def test_a_stopped_daemon_leaves_no_process_and_no_mount(
    node: Node, image: tuple[str, dict[str, str]]
) -> None:
    node.start()
    for mode in MODES:
        node_trees.mount(node, node_trees.index(node, image[0]), "c1", mode=mode)
        node.call("release", container="c1")
        node.call("gc", dry_run=False)
    node_trees.mount(node, node_trees.index(node, image[0]), "c1", mode="fuse")
    node.call("release", container="c1")
    assert node.call("stop")["ok"]
    wait_for("every process is gone", lambda: not node.processes())
    assert node.mounts() == []
    assert node.start()["ok"]


def test_sigterm_stops_an_unused_daemon_and_not_a_used_one(
    node: Node, image: tuple[str, dict[str, str]]
) -> None:
    keeper = int(node.start()["keeper_pid"])
    node_trees.mount(node, node_trees.index(node, image[0]), "c1")
    os.kill(keeper, signal.SIGTERM)
    wait_for("the refusal is logged", lambda: "not stopped" in node.log_tail(200))
    assert node.ping() is not None
    node.call("release", container="c1")
    os.kill(keeper, signal.SIGTERM)
    wait_for("every process is gone", lambda: not node.processes())
    assert node.mounts() == []


def test_a_second_daemon_leaves_the_first_alone(node: Node) -> None:
    first = node.start()
    node.clipshim("daemon")
    assert node.call("ping")["pid"] == first["pid"]


def test_hand_mounts_are_held_across_servers(
    make_node: Callable[..., Node], image: tuple[str, dict[str, str]]
) -> None:
    node = make_node(linger_s=0.0)
    node.start()
    tree = node_trees.mount(node, node_trees.index(node, image[0]), "mount:/x", hold=True)["tree"]
    node.kill_server()
    assert node.call("gc", dry_run=False)["ok"]
    assert tree in node.mounts()
    node.call("release", container="mount:/x")
    wait_for("the tree is unmounted", lambda: tree not in node.mounts())


@pytest.mark.parametrize("mode", ["erofs", "fuse"])
def test_an_upgrade_keeps_trees_that_are_held_whatever_wrote_their_records(
    make_node: Callable[..., Node], image: tuple[str, dict[str, str]], mode: str
) -> None:
    reference, sums = image
    node = make_node(linger_s=0.0)
    before = node.start()["pid"]
    clip = node_trees.index(node, reference)
    answer = node_trees.mount(node, clip, "mount:/x", hold=True, mode=mode)
    tree = answer["tree"]
    record = node.state_dir / "trees" / f"{answer['image_id']}.json"
    raw = json.loads(record.read_text())
    for name in ("kept", "pinned"):  # as a version wrote it that did not know them
        del raw[name]
    record.write_text(json.dumps(raw | {"from_the_future": True}))
    assert node.call("replace")["ok"]

    def replaced() -> bool:
        reply = node.ping()
        return reply is not None and reply["pid"] != before

    wait_for("another server answers", replaced)
    assert node.call("gc", dry_run=False)["ok"]
    assert tree in node.mounts()
    with node_trees.Reader(node, tree, sums) as reader:
        reader.wait_rounds(1)
    record.write_text("{}")  # not even the version is known
    node.kill_server()
    assert node.call("gc", dry_run=False)["ok"]
    assert tree in node.mounts()
    node.call("release", container="mount:/x")
    assert node.call("gc", dry_run=False)["ok"]
    wait_for("the tree is unmounted", lambda: tree not in node.mounts())


def test_holds_of_trees_that_are_gone_are_forgotten(
    node: Node, image: tuple[str, dict[str, str]]
) -> None:
    node.start()
    clip = node_trees.index(node, image[0])
    node_trees.mount(node, clip, "mount:/x", hold=True)
    assert "mount:/x" in (node.run_dir / "hand-mounts.json").read_text()
    node_trees.kill_everything(node)
    node.start()  # the tree's connection died with the daemon
    assert "mount:/x" not in (node.run_dir / "hand-mounts.json").read_text()


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"nonsense\n",
        b"[]\n",
        b'{"op": 7}\n',
        b'{"op": "mount"}\n',
        b'{"op": "mount", "source": {"fd": true, "origin": "/x"}}\n',
        b'{"op": "mount", "source": {"digest": "../../etc/passwd"}}\n',
        b'{"op": "mount", "source": {"image": "/etc/passwd"}}\n',
        b'{"op": "mount", "source": {"image": "oci:/etc"}}\n',
        b'{"op": "release", "container": null}\n',
        b'{"op": "report", "container": "../.."}\n',
        b'{"op": "event", "name": "x"}\n',
        b"[" * 5000 + b"\n",
        b"x" * 200_000,
    ],
)
def test_a_bad_request_gets_an_error_and_the_daemon_lives(node: Node, line: bytes) -> None:
    before = node.start()["pid"]
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(node.run_dir / "daemon.sock"))
        try:
            client.sendall(line)
            reply = client.makefile("rb").readline()
        except ConnectionError:
            reply = b""  # cut off: it sent more than a request may have
        if reply:
            assert json.loads(reply)["ok"] is False
            assert "Traceback" not in reply.decode()
    assert node.call("ping")["pid"] == before


def test_silent_and_half_finished_clients_hold_up_nobody(node: Node) -> None:
    before = node.start()["pid"]
    clients = []
    try:
        for i in range(100):
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(node.run_dir / "daemon.sock"))
            client.sendall(b'{"op": "pi' if i % 2 else b"")
            clients.append(client)
        assert node.call("ping")["pid"] == before
    finally:
        for client in clients:
            client.close()


def test_run_and_state_directories_are_roots_alone(node: Node) -> None:
    node.run_dir.mkdir(mode=0o777)
    node.state_dir.mkdir(mode=0o777)
    os.chmod(node.run_dir, 0o777)
    node.start()
    for path in (node.run_dir, node.state_dir):
        assert path.stat().st_mode & 0o077 == 0
    assert (node.run_dir / "daemon.sock").stat().st_mode & 0o177 == 0


def test_status_and_metrics_say_what_is_mounted(
    node: Node, image: tuple[str, dict[str, str]]
) -> None:
    node.start()
    answer = node_trees.mount(node, node_trees.index(node, image[0]), "c1")
    assert sums_below(answer["tree"]) == image[1]
    status = node.call("status")
    assert [found["image_id"] for found in status["images"]] == [answer["image_id"]]
    assert status["images"][0]["containers"] == 1
    assert status["fetch"]["fetched_bytes"] > 0
    assert status["fetch"]["verify_failures"] == 0
    node.call("event", name="container_failed", cause="VerifyError", container="c1")
    text = node.call("metrics")["text"]
    assert 'clipshim_container_failures_total{cause="VerifyError"} 1.0' in text
    assert "clipshim_deleted_directory_total 0.0" in text
    assert "clipshim_mounts_total 1.0" in text


def test_collection_removes_what_a_crashed_create_left(node: Node) -> None:
    node.start()
    node.call("gc", dry_run=False)  # returns when the collection at the start is over
    crashed = node.run_dir / "crashed"
    crashed.mkdir()
    (crashed / "lock").touch()
    for parent in ("upper", "work"):
        (node.state_dir / parent / "crashed").mkdir(parents=True)
    (node.state_dir / "upper" / "crashed" / "file").write_text("x")
    (node.state_dir / "upper" / "lost").mkdir()
    would = node.call("gc", dry_run=True)["removed"]
    assert any("crashed" in text for text in would)
    assert crashed.exists()
    removed = node.call("gc", dry_run=False)["removed"]
    assert any("crashed" in text for text in removed)
    assert any("lost" in text for text in removed)
    for path in (crashed, node.state_dir / "upper/crashed", node.state_dir / "upper/lost"):
        assert not path.exists()
    assert node.call("gc", dry_run=False)["removed"] == []


def test_collection_leaves_what_a_runtime_still_knows(node: Node, tmp_path: Path) -> None:
    node.start()
    node.call("gc", dry_run=False)  # returns when the collection at the start is over
    root = tmp_path / "runc"
    (root / "alive").mkdir(parents=True)
    directory = node.run_dir / "alive-12345678"
    directory.mkdir()
    (directory / "lock").touch()
    state = {"version": 1, "id": "alive", "root": str(root), "kind": "own", "image_id": "0" * 32}
    (directory / "state.json").write_text(json.dumps(state))
    upper = node.state_dir / "upper" / "alive-12345678"
    upper.mkdir(parents=True)
    assert node.call("gc", dry_run=False)["removed"] == []
    assert upper.exists()
    (root / "alive").rmdir()
    assert any("alive" in text for text in node.call("gc", dry_run=False)["removed"])
    assert not upper.exists()
    assert not directory.exists()


def test_a_start_is_learned_and_fetched_ahead_the_next_time(
    make_node: Callable[..., Node], image: tuple[str, dict[str, str]]
) -> None:
    node = make_node(linger_s=3600.0)
    node.start()
    clip = node_trees.index(node, image[0])
    answer = node_trees.mount(node, clip, "c1")
    name = "data/1-2"
    data = (Path(answer["tree"]) / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == image[1][name]
    node.call("release", container="c1")
    profile = node.state_dir / "profiles" / f"{answer['image_id']}.json"
    wait_for("the profile", profile.exists)
    spans = json.loads(profile.read_text())["spans"]
    assert spans
    assert {layer for layer, _ in spans} == {1}

    assert node.call("stop")["ok"]
    wait_for("every process is gone", lambda: not node.processes())
    shutil.rmtree(node.state_dir / "layers")
    node.start()
    node_trees.mount(node, clip, "c2")

    def fetched_ahead() -> bool:
        fetch = node.call("status")["fetch"]
        return int(fetch["ahead_spans"]) >= len(spans)

    wait_for("the profile's spans are fetched", fetched_ahead)


def test_the_first_start_of_an_image_begins_with_a_guess(make_node: Callable[..., Node]) -> None:
    node = make_node()
    node.start()
    clip = node_trees.index(node, images.tiny_image().reference)
    node_trees.mount(node, clip, "c1")

    def fetched_ahead() -> bool:
        return bool(node.call("status")["fetch"]["ahead_spans"])

    wait_for("the program's first span is fetched", fetched_ahead)


def test_collection_forgets_what_was_learned_of_images_that_are_gone(node: Node) -> None:
    profiles = node.state_dir / "profiles"
    profiles.mkdir(mode=0o700, parents=True)
    old = time.time() - 30 * 86400
    for name in ("ab" * 16 + ".json", "ab" * 16 + ".json.new", "somebody else's"):
        (profiles / name).write_text("{}")
        os.utime(profiles / name, (old, old))
    (profiles / ("cd" * 16 + ".json")).write_text("{}")
    node.start()
    node.call("gc", dry_run=False)  # unless the server's own was faster
    assert sorted(os.listdir(profiles)) == ["cd" * 16 + ".json", "somebody else's"]


def test_a_report_says_what_a_container_has_fetched(
    node: Node, image: tuple[str, dict[str, str]]
) -> None:
    node.start()
    answer = node_trees.mount(node, node_trees.index(node, image[0]), "box")
    directory = node.run_dir / "box"
    directory.mkdir()
    state = {"version": 1, "id": "box", "root": "/nowhere", "kind": "own"} | {
        key: answer[key] for key in ("image_id", "index_digest", "mode", "reference")
    }
    (directory / "state.json").write_text(json.dumps(state))
    (Path(answer["tree"]) / "data/2-0").read_bytes()
    report = node.call("report", container="box")
    assert report["ok"], report
    assert report["image_id"] == answer["image_id"]
    assert 0 < report["fetched_bytes"] <= report["image_bytes"]
    assert [layer["fetched_bytes"] > 0 for layer in report["layers"]] == [False, False, True]
    assert {touch["layer"] for touch in report["touched_at_start"]} == {2}
    assert not node.call("report", container="other")["ok"]


def test_without_fuse_an_image_is_unpacked_if_so_configured(
    make_node: Callable[..., Node], image: tuple[str, dict[str, str]]
) -> None:
    node = make_node(fallback="unpack")
    clip = node_trees.index(node, image[0])
    hidden = node.directory / "no-fuse"
    os.mknod(hidden, 0o20600, os.makedev(240, 240))  # nobody's device: open says ENXIO
    script = 'mount --bind "$0" /dev/fuse; exec "$@"'
    command = [sys.executable, "-I", "-m", "clipshim.node.keeper"]
    with open(node.directory / "keeper.log", "wb") as log:
        keeper = subprocess.Popen(
            ["unshare", "--mount", "sh", "-ec", script, hidden, *command],
            env=node.env,
            stdin=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        wait_for("the daemon answers", node.ping)
        answer = node_trees.mount(node, clip, "c1")
        assert answer["mode"] == "unpacked"
        assert sums_below(str(node.state_dir / "unpacked" / answer["image_id"])) == image[1]
        node.call("release", container="c1")
        assert node.call("stop")["ok"]
        assert keeper.wait(120) == 0
    finally:
        keeper.kill()
        keeper.wait()


def test_metrics_are_served_on_a_loopback_port(make_node: Callable[..., Node]) -> None:
    for _ in range(5):  # another program may take the port first
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        node = make_node(metrics_address=f"127.0.0.1:{port}")
        node.start()

        def tried(node: Node = node, port: int = port) -> str | None:
            if "metrics at" in node.log_tail(200):
                return "taken"
            url = f"http://127.0.0.1:{port}/metrics"
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=60) as page:
                return str(page.read().decode())
            return None

        text = wait_for("the metrics page", tried)
        if text != "taken":
            assert "clipshim_container_starts_total" in text
            with pytest.raises(urllib.error.HTTPError, match="404") as refused:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60)
            refused.value.close()
            return
    raise AssertionError("no port was free")


def test_a_tree_stays_while_a_container_is_recorded_with_it(
    make_node: Callable[..., Node], image: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    node = make_node(linger_s=0.0)
    node.start()
    answer = node_trees.mount(node, node_trees.index(node, image[0]), "box")
    (tmp_path / "box").mkdir()  # its runtime knows it
    (node.run_dir / "box").mkdir()
    state = {"version": 1, "id": "box", "root": str(tmp_path), "image_id": answer["image_id"]}
    record = node.run_dir / "box" / "state.json"
    record.write_text(json.dumps(state))
    node.call("release", container="box")  # as a successor that has never heard of the hold
    assert node.call("gc", dry_run=False)["removed"] == []
    assert answer["tree"] in node.mounts()
    record.unlink()
    wait_for("the tree is unmounted", lambda: answer["tree"] not in node.mounts())

"""What a successor reads: keeper.json, tree records, holds by hand, containers."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from clipshim.node.containers import container_directories, read_containers
from clipshim.node.hand_mounts import HandMounts
from clipshim.node.keeper_state import (
    STATE_NAME,
    KeeperState,
    TreeState,
    read_state,
    write_state,
)
from clipshim.node.processes import ProcessId
from clipshim.node.tree_records import LayerName, TreeRecord, TreeRecords

if TYPE_CHECKING:
    from pathlib import Path

RECORD = TreeRecord(
    image_id="ab" * 16,
    digest="sha256:" + "ab" * 32,
    reference="a.example/b:c",
    mode="erofs",
    layers=(LayerName("k1", 10), LayerName("k2", 20)),
    generation="g",
    pinned=("k1",),
)


def test_the_keepers_state_survives_a_round_trip(tmp_path: Path) -> None:
    tree = TreeState("/x/ro", {"tree": "/t"}, ProcessId(3, 4))
    state = KeeperState("g", ProcessId(1, 2), None, {"abc": tree})
    write_state(str(tmp_path), state)
    assert os.listdir(tmp_path) == [STATE_NAME]
    found = read_state(str(tmp_path))
    assert found is not None
    assert (found.generation, found.keeper, found.server) == ("g", ProcessId(1, 2), None)
    assert {name: vars(each) for name, each in found.trees.items()} == {"abc": vars(tree)}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "trees": 5}'])
def test_a_damaged_keeper_state_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / STATE_NAME).write_text(text)
    assert read_state(str(tmp_path)) is None


def test_a_record_survives_a_round_trip(tmp_path: Path) -> None:
    records = TreeRecords(str(tmp_path))
    records.write(RECORD)
    assert records.read_all() == [RECORD]
    assert not RECORD.independent
    records.remove(RECORD.image_id)
    records.remove(RECORD.image_id)
    assert records.read_all() == []


def test_records_of_older_and_newer_versions_are_understood(tmp_path: Path) -> None:
    """Else an upgrade would take the trees of running containers for garbage."""
    records = TreeRecords(str(tmp_path))
    records.write(RECORD)
    path = tmp_path / "trees" / f"{RECORD.image_id}.json"
    raw = json.loads(path.read_text())
    raw["layers"][0]["newer"] = 1
    path.write_text(json.dumps(raw | {"newer": [1, 2]}))
    assert records.read_all() == [RECORD]
    for name in ("pinned", "kept", "fuse_name", "trusted"):
        del raw[name]
    path.write_text(json.dumps(raw))
    assert records.read_all() == [replace(RECORD, pinned=())]
    del raw["digest"]
    path.write_text(json.dumps(raw))
    assert records.read_all() == []


def test_a_damaged_record_or_one_of_another_image_is_ignored(tmp_path: Path) -> None:
    records = TreeRecords(str(tmp_path))
    records.write(RECORD)
    path = tmp_path / "trees" / f"{RECORD.image_id}.json"
    (tmp_path / "trees" / "other.json").write_bytes(path.read_bytes())
    path.write_text("{")
    assert records.read_all() == []
    assert records.image_ids() == {RECORD.image_id, "other"}


def test_a_tree_that_a_crash_left_torn_is_written_again(tmp_path: Path) -> None:
    records = TreeRecords(str(tmp_path))
    path = records.write_tree("i", lambda: [b"ri", b"ght"])
    with open(path, "wb") as file:
        file.write(b"wrong")
    assert records.write_tree("i", lambda: [b"right"]) == path
    with open(path, "rb") as file:
        assert file.read() == b"right"


def test_holds_by_hand_survive_and_forgetting_twice_is_once(tmp_path: Path) -> None:
    HandMounts(str(tmp_path)).add("mount:/a", "i1")
    holds = HandMounts(str(tmp_path))
    assert holds.all() == {"mount:/a": "i1"}
    holds.remove("mount:/a")
    holds.remove("mount:/a")
    assert holds.all() == {}


def test_containers_are_read_and_damaged_ones_passed_over(tmp_path: Path) -> None:
    for name, text in (
        ("good", json.dumps({"id": "c", "root": "/run/runc", "image_id": "i"})),
        ("torn", "{"),
        ("list", "[]"),
        ("odd", json.dumps({"id": 5})),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(text)
    (tmp_path / "layers").mkdir()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "state.json").symlink_to("/etc/passwd")
    assert container_directories(str(tmp_path)) == ["good", "link", "list", "odd", "torn"]
    found = {container.cid: container for container in read_containers(str(tmp_path))}
    assert set(found) == {"good", "odd"}
    assert found["good"].image_id == "i"
    assert found["odd"].id == ""


def test_the_layers_mount_is_never_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is the one that answers there: it would wait for itself for ever."""
    (tmp_path / "layers").mkdir()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "state.json").write_text("{}")
    asked: list[str] = []
    lexists = os.path.lexists

    def note(path: str) -> bool:
        asked.append(path)
        return lexists(path)

    monkeypatch.setattr(os.path, "lexists", note)

    assert container_directories(str(tmp_path)) == ["c"]
    assert not any("/layers" in path for path in asked)

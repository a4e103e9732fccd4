"""What counts as garbage, and what is left alone."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from clipshim.node.cleanup import (
    HOLD_AGE_S,
    IndexFile,
    ProfileFile,
    choose_holds,
    choose_indexes,
    choose_profiles,
    choose_trees,
    unpacked_ids,
)
from clipshim.node.container_cleanup import clean
from clipshim.settings import Settings
from clipshim.shim.state import ContainerLock

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings({"run_dir": str(tmp_path / "run"), "state_dir": str(tmp_path / "state")})
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "state").mkdir(mode=0o700)
    return settings


def container(settings: Settings, key: str, tmp_path: Path, *, alive: bool, **more: object) -> Path:
    with ContainerLock(settings, key, wait_s=0):
        pass
    root = tmp_path / "runc"
    (root / key).mkdir(parents=True) if alive else root.mkdir(exist_ok=True)
    directory = tmp_path / "run" / key
    state = {"version": 1, "id": key, "root": str(root), "kind": "own"} | more
    (directory / "state.json").write_text(json.dumps(state))
    for parent in ("upper", "work"):
        (tmp_path / "state" / parent / key).mkdir(parents=True)
    return directory


def removed(settings: Settings, *, dry_run: bool = False) -> dict[str, str]:
    return {found["key"]: found["kind"] for found in clean(settings, dry_run=dry_run)}


def test_an_image_that_is_being_unpacked_is_left_alone_whatever_the_time_of_its_root(
    tmp_path: Path,
) -> None:
    for name in ("a" * 32, ".new-draft"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    assert unpacked_ids(str(tmp_path)) == {"a" * 32}


def test_only_old_indexes_that_nobody_named_or_uses_go() -> None:
    files = [
        IndexFile("old", 100.0, named=False, in_use=False),
        IndexFile("young", 1.0, named=False, in_use=False),
        IndexFile("named", 100.0, named=True, in_use=False),
        IndexFile("used", 100.0, named=False, in_use=True),
    ]
    assert choose_indexes(files, age_s=50.0) == ["old"]


def test_profiles_without_an_index_go_when_they_are_old() -> None:
    files = [
        ProfileFile("old", 100.0, 10, has_index=False),
        ProfileFile("young", 1.0, 10, has_index=False),
        ProfileFile("kept", 100.0, 10, has_index=True),
    ]
    assert choose_profiles(files, age_s=50.0) == ["old"]


def test_profiles_are_bounded_and_the_oldest_go_first() -> None:
    files = [ProfileFile(str(n), float(n), 10, has_index=True) for n in range(10)]
    assert choose_profiles(files, max_files=7) == ["7", "8", "9"]
    assert choose_profiles(files, max_bytes=85) == ["8", "9"]
    files.append(ProfileFile("big", 0.0, 100, has_index=True))
    assert set(choose_profiles(files, max_bytes=85)) == {"big", "8", "9"}


def test_only_trees_that_nobody_knows_go() -> None:
    assert choose_trees({"a", "b", "c"}, {"b"}) == ["a", "c"]


def test_a_container_whose_runtime_forgot_it_goes_with_all_it_had(
    settings: Settings, tmp_path: Path
) -> None:
    directory = container(settings, "gone", tmp_path, alive=False)
    assert removed(settings, dry_run=True) == {"gone": "container"}
    assert directory.exists()
    assert removed(settings) == {"gone": "container"}
    assert not directory.exists()
    assert not (tmp_path / "state/upper/gone").exists()
    assert removed(settings) == {}


def test_living_checkpointed_locked_and_unreadable_containers_stay(
    settings: Settings, tmp_path: Path
) -> None:
    container(settings, "alive", tmp_path, alive=True)
    container(settings, "checkpointed", tmp_path, alive=False, checkpointed=True)
    torn = container(settings, "torn", tmp_path, alive=False)
    (torn / "state.json").write_text("{")
    container(settings, "busy", tmp_path, alive=False)
    with ContainerLock(settings, "busy", wait_s=0):
        assert removed(settings) == {}
    for key in ("alive", "checkpointed", "torn", "busy"):
        assert (tmp_path / "state/upper" / key).exists()
        assert (tmp_path / "run" / key).exists()


def test_what_a_killed_create_or_a_reboot_left_goes(settings: Settings, tmp_path: Path) -> None:
    with ContainerLock(settings, "planned", wait_s=0):
        pass
    (tmp_path / "run/planned/lower").mkdir()
    (tmp_path / "state/upper/lost").mkdir(parents=True)
    (tmp_path / "state/work/lost").mkdir(parents=True)
    assert removed(settings, dry_run=True) == {"planned": "unfinished", "lost": "orphan"}
    assert not (tmp_path / "run/lost").exists()  # looking leaves no trace
    assert removed(settings) == {"planned": "unfinished", "lost": "orphan"}
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == []
    assert list((tmp_path / "state/upper").iterdir()) == []


def test_a_link_in_place_of_an_upper_directory_is_not_followed(
    settings: Settings, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (tmp_path / "state/upper").mkdir()
    (tmp_path / "state/upper/lost").symlink_to(precious)
    removed(settings)
    assert (precious / "file").exists()


def test_holds_without_a_container_go_after_a_while_unless_it_appears() -> None:
    seen: dict[str, float] = {}
    assert choose_holds(["lost", "here"], {"here"}, seen, 0.0) == []
    assert choose_holds(["lost", "here"], {"here"}, seen, HOLD_AGE_S) == []
    assert choose_holds(["lost", "here"], {"here"}, seen, HOLD_AGE_S + 1) == ["lost"]
    assert choose_holds(["lost"], {"lost"}, seen, HOLD_AGE_S + 2) == []
    assert choose_holds(["lost"], set(), seen, HOLD_AGE_S + 3) == []
    assert choose_holds([], set(), seen, HOLD_AGE_S + 4) == []
    assert seen == {}

"""State files, keys and locks of containers."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from clipshim.errors import MountError, StoreError
from clipshim.settings import Settings
from clipshim.shim import state, teardown
from clipshim.shim.undo import Undo

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings({"run_dir": f"{tmp_path}/run", "state_dir": f"{tmp_path}/state"})


def test_keys_tell_roots_apart() -> None:
    assert state.container_key("box", state.DEFAULT_ROOT) == "box"
    one, other = state.container_key("box", "/r1"), state.container_key("box", "/r2")
    assert one != other
    assert one.startswith("box-")
    assert state.container_key("box", "/r1/../r1/") == one


def test_an_id_cannot_be_a_name_of_the_nodes() -> None:
    for name in (
        "layers",
        "daemon.sock",
        "daemon.lock",
        "start.lock",
        "keeper.json",
        ".keeper.json.12",
        "hand-mounts.json",
        "hand-mounts.json.new",
    ):
        key = state.container_key(name, state.DEFAULT_ROOT)
        assert key.startswith(f"{name}-")
        assert state.container_key(name, "/elsewhere") != key


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a\0b", "x" * 300])
def test_names_that_are_no_ids(name: str) -> None:
    assert not state.is_valid_id(name)


def test_save_and_load(settings: Settings) -> None:
    with state.ContainerLock(settings, "box", wait_s=0):
        made = state.ContainerState(
            settings.container_dir("box"), {"version": 1, "id": "box", "root": "/r"}
        )
        made.save(image_id="i")
        found = state.load_state(settings, "box")
        assert found is not None
        assert found.values == {"version": 1, "id": "box", "root": "/r", "image_id": "i"}
        assert (found.key, found.runtime_directory) == ("box", "/r/box")
        assert found.is_gone()
        assert found.text("missing") == ""
    assert state.list_states(settings) == ["box"]
    facts = os.stat(settings.container_dir("box"))
    assert facts.st_mode & 0o077 == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 99}'])
def test_a_damaged_state_is_an_error(text: str, settings: Settings) -> None:
    directory = settings.container_dir("box")
    os.makedirs(directory)
    with open(f"{directory}/state.json", "w") as file:
        file.write(text)
    with pytest.raises(StoreError):
        state.load_state(settings, "box")


def test_no_state_is_none(settings: Settings) -> None:
    assert state.load_state(settings, "box") is None
    assert state.list_states(settings) == []


def test_the_lock_is_one_holders(settings: Settings) -> None:
    with (
        state.ContainerLock(settings, "box", wait_s=0),
        pytest.raises(StoreError, match="another process"),
        state.ContainerLock(settings, "box", wait_s=0),
    ):
        pass
    with state.ContainerLock(settings, "box", wait_s=0):
        pass


def test_a_waiting_locker_gets_a_directory_of_its_own(settings: Settings) -> None:
    """The holder removes the directory; who waited for the lock must not hold the removed one."""
    first = state.ContainerLock(settings, "box", wait_s=0)
    first.__enter__()

    def leave() -> None:
        teardown.forget(settings, settings.container_dir("box"))
        first.__exit__()

    leaver = threading.Timer(0.05, leave)
    leaver.start()
    with state.ContainerLock(settings, "box", wait_s=60):
        assert os.path.exists(f"{settings.container_dir('box')}/lock")
    leaver.join()


def test_a_planted_link_is_refused(settings: Settings, tmp_path: Path) -> None:
    os.makedirs(settings.run_dir)
    os.symlink(tmp_path, settings.container_dir("box"))
    with (
        pytest.raises(MountError, match="root's own"),
        state.ContainerLock(settings, "box", wait_s=0),
    ):
        pass


def test_remove_tree_follows_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    deep = tmp_path / "upper"
    deep.mkdir()
    (deep / "link").symlink_to(outside)
    fd = os.open(deep, os.O_RDONLY)
    for _ in range(600):  # deeper than a path can be long, or Python recurses
        os.mkdir("directory", dir_fd=fd)
        below = os.open("directory", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    teardown.remove_tree(str(deep))
    teardown.remove_tree(str(deep))
    assert not deep.exists()
    assert (outside / "kept").exists()


def test_an_error_says_what_could_not_be_undone() -> None:
    def fail() -> None:
        raise OSError("stuck")

    def work() -> None:
        with Undo() as undo:
            undo.push(fail)
            raise MountError("rootfs /r: expected a mount", hint="look there")

    with pytest.raises(MountError) as caught:
        work()
    assert str(caught.value) == (
        "rootfs /r: expected a mount; then undoing failed: stuck (look there)"
    )


def test_undo_runs_backwards_and_to_the_end() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("stuck")

    with Undo() as undo:
        undo.push(done.append, 1)
        undo.push(fail)
        undo.push(done.append, 2)
    assert done == [2, 1]
    assert [str(failure) for failure in undo.failures] == ["stuck"]
    with Undo() as undo:
        undo.push(done.append, 3)
        undo.commit()
    assert done == [2, 1]

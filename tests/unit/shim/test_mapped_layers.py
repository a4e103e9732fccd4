"""Where the layers are that containerd named to overlayfs in a mount that is gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clipshim.errors import MountError
from clipshim.mounts.graft import EngineOverlay
from clipshim.shim import mapped_layers

GONE = "/nowhere/ovl-idmapped1095187461"


def engine_overlay(directory: Path, lowers: list[str]) -> EngineOverlay:
    """An overlay of containerd's snapshotter; its stub is layer 2."""
    for number in (1, 2, 3, 12):
        (directory / f"snapshots/{number}/fs/.clip").mkdir(parents=True)
        (directory / f"snapshots/{number}/fs/.clip/index.clip").write_text("an index")
    target = directory / "rootfs/.clip"
    target.mkdir(parents=True)
    os.link(directory / "snapshots/2/fs/.clip/index.clip", target / "index.clip")
    snapshots = directory / "snapshots"
    return EngineOverlay(
        target=str(target.parent), source="overlay", lowers=lowers, upper=f"{snapshots}/12/fs",
        work=f"{snapshots}/12/work", options=(), mount_options=(), volatile=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["fs", "0"])
def test_a_single_layer_is_the_one_with_the_stub(tmp_path: Path, name: str) -> None:
    lower = f"{GONE}/{name}"
    found = mapped_layers.find(engine_overlay(tmp_path, [lower]))
    assert found is not None
    assert (found.home, found.names) == (str(tmp_path / "snapshots/2/fs"), {lower: ""})


def test_of_several_layers_the_numbers_are_known(tmp_path: Path) -> None:
    found = mapped_layers.find(engine_overlay(tmp_path, [f"{GONE}/3/fs", f"{GONE}/2/fs"]))
    assert found is not None
    assert found.home == str(tmp_path / "snapshots")
    assert found.names == {f"{GONE}/3/fs": "3/fs", f"{GONE}/2/fs": "2/fs"}


@pytest.mark.parametrize(
    "lowers",
    [
        ["0", "1"],  # containerd 1.7
        ["3/fs", "4/fs"],
        ["3/fs", "../fs"],
        ["3/fs", "2/.clip"],
        ["3/fs", "3/work/x"],
    ],
)
def test_layers_that_are_not_certain_are_refused(tmp_path: Path, lowers: list[str]) -> None:
    (tmp_path / "snapshots/3/work/x").mkdir(parents=True)
    engine = engine_overlay(tmp_path, [f"{GONE}/{name}" for name in lowers])
    with pytest.raises(MountError, match="ovl-idmapped1095187461") as caught:
        mapped_layers.find(engine)
    assert caught.value.hint is not None


def test_a_single_layer_without_a_stub_is_refused(tmp_path: Path) -> None:
    engine = engine_overlay(tmp_path, [f"{GONE}/fs"])
    Path(engine.target, ".clip/index.clip").unlink()
    Path(engine.target, ".clip/index.clip").write_text("an index")
    with pytest.raises(MountError, match="expected a directory, found none"):
        mapped_layers.find(engine)


def test_layers_that_are_there_need_nothing(tmp_path: Path) -> None:
    there = tmp_path / "ovl-idmapped1/fs"
    there.mkdir(parents=True)
    for number, lower in enumerate((str(there), "/home/overlay/id/mapped/0/l/ABC")):
        engine = engine_overlay(tmp_path / str(number), [lower])
        assert mapped_layers.find(engine) is None

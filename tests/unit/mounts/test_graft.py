"""Reading an engine's overlay out of mountinfo."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipshim.errors import MountError
from clipshim.mounts import graft
from clipshim.mounts.mountinfo import Mount

if TYPE_CHECKING:
    from pathlib import Path

NAMES = st.lists(st.text(alphabet="ab:\\,/ .", min_size=1, max_size=6), min_size=1, max_size=5)


def _mount(options: str, mount_point: str = "/m", mount_options: str = "rw,relatime") -> Mount:
    raw = options.replace("\\", "\\134").replace(" ", "\\040")
    return Mount(f"9 1 0:9 / {mount_point} {mount_options} - overlay overlay rw,{raw}".encode())


@given(NAMES)
def test_lowerdir_escapes(names: list[str]) -> None:
    escaped = ":".join(
        name.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,") for name in names
    )
    assert graft.split_lowerdir(escaped) == names


def test_dockers_options() -> None:
    engine = graft.read_engine_overlay(
        _mount("lowerdir=/l/A:/l/B,upperdir=/u,workdir=/w,index=off,xino=off,seclabel")
    )
    assert (engine.lowers, engine.upper, engine.work) == (("/l/A", "/l/B"), "/u", "/w")
    assert engine.options == ("index=off", "xino=off")
    plan = engine.graft_plan("/tree")
    assert plan.lowers == ("/l/A", "/l/B", "/tree")
    assert (plan.upper, plan.work, plan.target) == ("/u", "/w", "/m")
    assert set(plan.options) == {"index=off", "metacopy=off"}


def test_layers_one_option_each() -> None:
    engine = graft.read_engine_overlay(_mount("lowerdir+=/a:b,lowerdir+=/c,upperdir=/u,workdir=/w"))
    assert engine.lowers == ("/a:b", "/c")


@pytest.mark.parametrize("option", ["volatile", "fsync=volatile"])
def test_podmans_volatile_stays(option: str) -> None:
    engine = graft.read_engine_overlay(
        _mount(f"lowerdir=/l,upperdir=/u,workdir=/w,{option},metacopy=on,redirect_dir=on,userxattr")
    )
    assert engine.volatile
    assert set(engine.graft_plan("/t").options) == {
        "index=off",
        "metacopy=off",
        "userxattr",
        "volatile",
    }
    assert set(engine.plan().options) == {"metacopy=on", "redirect_dir=on", "userxattr", "volatile"}


def test_labels_with_commas_stay_whole() -> None:
    label = "system_u:object_r:container_file_t:s0:c1,c2"
    engine = graft.read_engine_overlay(
        _mount(f'context="{label}",lowerdir=/l,upperdir=/u,workdir=/w')
    )
    assert f"context={label}" in engine.graft_plan("/t").options


def test_no_upper_directory_is_a_read_only_overlay() -> None:
    engine = graft.read_engine_overlay(_mount("lowerdir=/a:/b", mount_options="ro,nodev,relatime"))
    assert engine.upper is None
    assert engine.graft_plan("/t").mount_options == ("ro", "nodev")


def test_names_relative_to_the_storage_root(tmp_path: Path) -> None:
    storage = tmp_path / "overlay2"
    for name in ("l/A", "l/B", "id/diff", "id/work", "id/merged"):
        (storage / name).mkdir(parents=True)
    for upper in (f"{storage}/id/diff", "id/diff"):
        engine = graft.read_engine_overlay(
            _mount(
                f"lowerdir=l/A:l/B,upperdir={upper},workdir={storage}/id/work",
                mount_point=f"{storage}/id/merged",
            )
        )
        assert engine.lowers == (f"{storage}/l/A", f"{storage}/l/B")
        assert engine.upper == f"{storage}/id/diff"


def test_relative_names_that_nobody_has(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="l/A: not found"):
        graft.read_engine_overlay(_mount("lowerdir=l/A", mount_point=str(tmp_path)))


@pytest.mark.parametrize("options", ["lowerdir=/a::/data", "lowerdir+=/a,datadir+=/d"])
def test_data_only_layers_are_refused(options: str) -> None:
    with pytest.raises(MountError, match="data-only"):
        graft.read_engine_overlay(_mount(options))


def test_an_overlay_without_layers_is_refused() -> None:
    with pytest.raises(MountError, match="found none"):
        graft.read_engine_overlay(_mount("upperdir=/u"))


def test_a_volatile_work_directory_is_made_mountable(tmp_path: Path) -> None:
    marker = tmp_path / "work/incompat/volatile"
    marker.mkdir(parents=True)
    (marker / "dirty").touch()
    graft.forget_volatile(str(tmp_path))
    graft.forget_volatile(str(tmp_path))
    assert not marker.exists()

"""Mounts that need root and a real kernel: EROFS probe, overlays by both ways, verification."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from clipshim.errors import MountError, VerifyError
from clipshim.mounts import erofs, mountinfo, overlay, syscalls, verify
from tests.support.skips import kernel_cannot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A mount point that is no longer one afterwards."""
    path = tmp_path / "target"
    path.mkdir()
    yield path
    while mountinfo.mount_at(str(path)):
        syscalls.umount2(str(path), syscalls.MNT_DETACH)


def _layers(directory: Path, count: int) -> list[str]:
    names = []
    for number in range(count):
        path = directory / "odd, name: with \\ escapes" / str(number)
        (path / "proc").mkdir(parents=True)
        (path / f"file{number}").touch()
        names.append(str(path))
    return names


def test_the_probe_says_why_or_nothing(tmp_path: Path) -> None:
    reason = erofs.probe_erofs(str(tmp_path))
    if reason is not None:
        kernel_cannot(reason)
    assert os.listdir(tmp_path) == []


def test_an_image_is_mounted_with_its_device(tmp_path: Path, target: Path) -> None:
    if erofs.probe_erofs(str(tmp_path)) is not None:
        kernel_cannot("mount EROFS from files")
    (tmp_path / "meta").write_bytes(erofs.probe_image())
    (tmp_path / "layer").write_bytes(b"x" * 512)
    erofs.mount_erofs(str(tmp_path / "meta"), [str(tmp_path / "layer")], str(target))
    assert (target / "f").read_bytes() == b"x" * 512
    assert target.stat().st_nlink == 2
    with pytest.raises(MountError, match="missing"):
        erofs.mount_erofs_fd(str(tmp_path / "meta"), [str(tmp_path / "missing")])


@pytest.fixture(params=["new", "classic"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to mount an overlay: kernels before 6.8 cannot take one layer a call."""
    if request.param == "classic":

        def missing(_: str) -> int:
            raise OSError(errno.ENOSYS, "fsopen")

        monkeypatch.setattr(syscalls, "fsopen", missing)


@pytest.mark.usefixtures("way")
def test_mountinfo_names_the_directories(tmp_path: Path, target: Path) -> None:
    """What takes a mount down later looks for them there."""
    names = {}
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
        names[name] = str(tmp_path / name)
    overlay.OverlayPlan(
        str(target), [names["lower"]], upper=names["upper"], work=names["work"]
    ).execute()
    mount = mountinfo.mount_at(str(target))
    assert mount is not None
    for name in ("upper", "work"):
        assert f"{name}dir={names[name]}" in mount.super_options


@pytest.mark.usefixtures("way")
def test_overlays_with_odd_names_and_many_layers(tmp_path: Path, target: Path) -> None:
    layers = _layers(tmp_path, 120)
    upper, work = tmp_path / "up:p\\er \\", tmp_path / "w\\\\o,rk"
    for path in (upper, work):
        path.mkdir()
    before = os.getcwd()
    plan = overlay.OverlayPlan(str(target), layers, upper=str(upper), work=str(work))
    plan.execute()
    assert os.getcwd() == before
    assert len(list(target.glob("file*"))) == 120
    (target / "written").write_text("x")
    assert (upper / "written").exists()
    mount = mountinfo.mount_at(str(target))
    assert mount is not None
    assert mount.fstype == "overlay"


def test_a_name_longer_than_the_mount_api_takes(tmp_path: Path, target: Path) -> None:
    long_name = tmp_path / ("a" * 200) / ("b" * 200)
    (long_name / "proc").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    plan = overlay.OverlayPlan(str(target), [str(long_name), str(tmp_path / "other")])
    plan.execute()
    assert (target / "proc").is_dir()


@pytest.mark.parametrize("known", [True, False], ids=["volatile", "before Linux 5.10"])
def test_volatile_where_the_kernel_knows_it(
    known: bool, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        set_flag, mount = syscalls.fsconfig_flag, syscalls.mount

        def refuse_flag(fd: int, key: str) -> None:
            if key == overlay.VOLATILE:
                raise OSError(errno.EINVAL, "fsconfig")
            set_flag(fd, key)

        def refuse_option(source: str, path: str, kind: str, flags: int, options: str) -> None:
            if overlay.VOLATILE in options.split(","):
                raise OSError(errno.EINVAL, "mount")
            mount(source, path, kind, flags, options)

        monkeypatch.setattr(syscalls, "fsconfig_flag", refuse_flag)
        monkeypatch.setattr(syscalls, "mount", refuse_option)
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    overlay.OverlayPlan(
        str(target),
        [str(tmp_path / "lower")],
        upper=str(tmp_path / "upper"),
        work=str(tmp_path / "work"),
        options=(*overlay.FIXED_OPTIONS, overlay.VOLATILE),
    ).execute()
    found = mountinfo.mount_at(str(target))
    assert found is not None
    # "fsync=volatile" is Linux 6.18's
    shown = {overlay.VOLATILE, f"fsync={overlay.VOLATILE}"} & set(found.super_options)
    assert bool(shown) is known


def test_fuse_overlayfs_is_not_given_what_it_would_misread(tmp_path: Path) -> None:
    plan = overlay.OverlayPlan(str(tmp_path), ["/a:b"], upper="/u", work="/w")
    with pytest.raises(MountError, match="no colon in a layer: /a:b"):
        overlay.fuse_overlayfs_command(plan, "fuse-overlayfs")


def test_a_failed_mount_names_the_plan(tmp_path: Path, target: Path) -> None:
    plan = overlay.OverlayPlan(str(target), [str(tmp_path / "missing"), str(tmp_path)])
    with pytest.raises(MountError, match="missing"):
        plan.execute()
    assert mountinfo.mount_at(str(target)) is None


def test_an_upper_directory_that_cannot_be_one_has_a_hint(tmp_path: Path, target: Path) -> None:
    for name in ("lower", "upper", "work", "m"):
        (tmp_path / name).mkdir(parents=True)
    names = {name: str(tmp_path / name) for name in ("lower", "upper", "work")}
    overlay.OverlayPlan(
        str(target), [names["lower"]], upper=names["upper"], work=names["work"]
    ).execute()
    for name in ("u", "w"):
        (target / name).mkdir()
    plan = overlay.OverlayPlan(
        str(tmp_path / "m"), [names["lower"]], upper=str(target / "u"), work=str(target / "w")
    )
    with pytest.raises(MountError) as caught:
        plan.execute()
    assert caught.value.hint == "overlayfs cannot write to overlayfs: use ext4, xfs or btrfs"


def test_tmpfs_is_refused(target: Path) -> None:
    overlay.refuse_volatile(str(target), "upper directory")
    syscalls.mount("tmpfs", str(target), "tmpfs")
    with pytest.raises(MountError, match="found tmpfs"):
        overlay.refuse_volatile(str(target), "upper directory")


def _root(directory: Path) -> Path:
    for name in ("usr/bin", "proc"):
        (directory / name).mkdir(parents=True)
    (directory / "bin").symlink_to("usr/bin")
    return directory


def test_a_sound_root_passes(tmp_path: Path) -> None:
    root = _root(tmp_path / "root")
    verify.verify_rootfs(
        str(root), fstype=None, has_usr=True, top_symlinks={"bin": "usr/bin", "lib": "usr/lib"}
    )
    verify.verify_tree(str(root), root.stat().st_dev)


def test_a_missing_proc_is_made(tmp_path: Path) -> None:
    root = _root(tmp_path / "root")
    (root / "proc").rmdir()
    with pytest.raises(VerifyError, match="/proc"):
        verify.verify_rootfs(str(root), fstype=None, has_usr=True, top_symlinks={}, readonly=True)
    verify.verify_rootfs(str(root), fstype=None, has_usr=True, top_symlinks={})
    assert (root / "proc").is_dir()


@pytest.mark.parametrize("damage", ["usr", "proc is a file", "proc leaves", "bin dangles", "mount"])
def test_an_unfit_root_is_one_clear_error(damage: str, tmp_path: Path) -> None:
    root = _root(tmp_path / "root")
    fstype = None
    if damage == "usr":
        (root / "bin").unlink()
        (root / "usr/bin").rmdir()
        (root / "usr").rmdir()
    elif damage == "proc is a file":
        (root / "proc").rmdir()
        (root / "proc").touch()
    elif damage == "proc leaves":
        (root / "proc").rmdir()
        (root / "proc").symlink_to("/proc/self/root/etc")
    elif damage == "bin dangles":
        (root / "usr/bin").rmdir()
    else:
        fstype = "overlay"
    with pytest.raises(VerifyError, match="expected"):
        verify.verify_rootfs(
            str(root), fstype=fstype, has_usr=True, top_symlinks={"bin": "usr/bin"}, readonly=True
        )


def test_the_directory_beneath_a_mount_is_not_the_tree(tmp_path: Path, target: Path) -> None:
    syscalls.mount("tmpfs", str(target), "tmpfs")
    with pytest.raises(VerifyError, match="expected device"):
        verify.verify_tree(str(target), tmp_path.stat().st_dev)

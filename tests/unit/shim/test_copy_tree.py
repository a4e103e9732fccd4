"""Copying a directory: nothing that a tree can hold is lost, and no link is followed."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from clipshim.index.unpack_check import compare_trees
from clipshim.shim import copy_tree
from clipshim.shim.copy_tree import Owners

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
TIME_NS = 1_500_000_000_123_456_789


@contextmanager
def opened(*paths: Path) -> Iterator[list[int]]:
    fds = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in paths]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def copy(source: Path, target: Path, owners: Owners | None = None, leave: str = "") -> None:
    target.mkdir(exist_ok=True)
    with opened(source, target) as (one, other):
        copy_tree.copy_tree(one, other, owners or Owners(), leave=leave)


def make_everything(top: Path) -> Path:
    top.mkdir()
    (top / "file").write_bytes(b"bytes\n")
    os.setxattr(top / "file", "user.note", b"kept")
    os.link(top / "file", top / "hard")
    (top / "sub").mkdir(mode=0o700)
    os.link(top / "file", top / "sub/hard")
    (top / "setuid").write_bytes(b"#!")
    os.chown(top / "setuid", 1234, 1235)
    os.chmod(top / "setuid", 0o6755)
    (top / "soft").symlink_to("/etc/passwd")
    (top / "dangling").symlink_to("../../nothing")
    os.lchown(top / "dangling", 1, 2)
    os.mkfifo(top / "pipe", 0o620)
    os.mknod(top / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (top / os.fsdecode(b"odd \xff\\name")).write_bytes(b"")
    deep = top / "deep"
    for _ in range(100):
        deep /= "d"
    deep.mkdir(parents=True)
    (deep / "end").write_bytes(b"end\n")
    with open(top / "hole", "wb") as file:
        file.write(b"x")
        file.seek(20 * MIB)
        file.write(b"y")
    (top / "large").write_bytes(os.urandom(3 * MIB + 17) + bytes(100) + b"z")
    (top / "private").mkdir()
    os.chown(top / "private", 7, 8)
    os.chmod(top / "private", 0o1730)
    os.chmod(top, 0o2751)
    for path in [*top.rglob("*"), top]:
        os.utime(path, ns=(TIME_NS, TIME_NS), follow_symlinks=False)
    return top


def test_a_copy_has_everything(tmp_path: Path) -> None:
    source = make_everything(tmp_path / "source")
    copy(source, tmp_path / "target")
    assert compare_trees(source, tmp_path / "target") == []
    assert (tmp_path / "target/hole").stat().st_blocks < MIB // 512


def test_zeros_become_holes_and_bytes_stay(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    pieces = [b"a" * 5000, bytes(70_000), b"b", bytes(2 * MIB), b"c" * 4096, bytes(8192)]
    (source / "file").write_bytes(b"".join(pieces))
    (source / "zeros").write_bytes(bytes(MIB))
    copy(source, tmp_path / "target")
    assert compare_trees(source, tmp_path / "target") == []
    assert (tmp_path / "target/zeros").stat().st_blocks == 0


def test_owners_are_mapped_and_those_of_the_host_stay(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number, name in ((0, "root"), (33, "user"), (100_005, "shifted")):
        (source / name).write_bytes(b"")
        os.chown(source / name, number, number)
    (source / "user").chmod(0o4755)
    owners = Owners([(0, 100_000, 65_536)], [(0, 200_000, 1000), (1000, 100_000, 1000)])
    os.chown(source / "shifted", 100_005, 100_006)
    copy(source, tmp_path / "target", owners)
    found = {path.name: path.stat() for path in (tmp_path / "target").iterdir()}
    assert (found["root"].st_uid, found["root"].st_gid) == (100_000, 200_000)
    assert (found["user"].st_uid, found["user"].st_gid) == (100_033, 200_033)
    assert found["user"].st_mode == stat.S_IFREG | 0o4755
    assert (found["shifted"].st_uid, found["shifted"].st_gid) == (100_005, 100_006)
    assert (tmp_path / "target").stat().st_uid == 100_000


def test_an_owner_that_is_not_mapped_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub/file").write_bytes(b"")
    os.chown(source / "sub/file", 70_000, 0)
    with pytest.raises(OSError, match="70000") as caught:
        copy(source, tmp_path / "target", Owners([(0, 100_000, 65_536)], [(0, 0, 1)]))
    assert (caught.value.errno, caught.value.filename) == (errno.EOVERFLOW, "sub/file")


def test_one_name_at_the_top_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("not/x", "sub/not/x"):
        (source / name).mkdir(parents=True)
    copy(source, tmp_path / "target", leave="not")
    assert sorted(os.listdir(tmp_path / "target")) == ["sub"]
    assert (tmp_path / "target/sub/not/x").is_dir()


def test_same_content_sees_every_difference(tmp_path: Path) -> None:
    source = make_everything(tmp_path / "source")
    copy(source, tmp_path / "target")

    def same() -> bool:
        with opened(source, tmp_path / "target") as (one, other):
            return copy_tree.same_content(one, other)

    target = tmp_path / "target"
    assert same()
    os.utime(target / "sub", (1, 1))
    assert same(), "times of directories are engines' own"
    (target / "new").touch()
    assert not same()
    (target / "new").unlink()
    os.rename(target / "pipe", target / "elsewhere")
    assert not same()
    os.rename(target / "elsewhere", target / "pipe")
    assert same()
    (target / "deep/d/d/new").touch()
    assert not same()
    (target / "deep/d/d/new").unlink()
    os.chown(target / "setuid", 1, 1)
    assert not same()


def test_moving_keeps_what_is_there(tmp_path: Path) -> None:
    source, target = make_everything(tmp_path / "source"), tmp_path / "target"
    (target / "sub").mkdir(parents=True)
    (target / "sub/mine").write_bytes(b"mine")
    (target / "file").write_bytes(b"already")
    (target / "private").write_bytes(b"a file where a directory comes from")
    with opened(source, target) as (one, other):
        copy_tree.move_tree(one, other)
        copy_tree.move_tree(one, other)  # as after an interruption
    assert (target / "file").read_bytes() == b"already"
    assert (target / "sub/mine").read_bytes() == b"mine"
    assert (target / "sub/hard").read_bytes() == b"bytes\n"
    assert (target / "private").is_file()
    assert stat.S_IMODE((target / "sub").stat().st_mode) == 0o700
    assert stat.S_IMODE(target.stat().st_mode) == 0o2751
    assert (target / "deep/d/d").is_dir()


def test_links_are_never_followed(tmp_path: Path) -> None:
    source, target, outside = (tmp_path / name for name in ("source", "target", "outside"))
    for path in (source / "sub", target, outside):
        path.mkdir(parents=True)
    (source / "sub/file").write_bytes(b"x")
    (target / "sub").symlink_to(outside)
    with pytest.raises(FileExistsError):
        copy(source, target)
    with opened(source, target) as (one, other):
        copy_tree.move_tree(one, other)
    assert os.listdir(outside) == []
    assert (target / "sub").is_symlink()

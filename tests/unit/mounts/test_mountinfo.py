"""mountinfo: the kernel's escapes, propagation fields, and this machine's own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipshim.mounts import mountinfo

if TYPE_CHECKING:
    from pathlib import Path

LINE = (
    rb"36 35 98:0 /mnt1 /mnt/a\040b rw,noatime shared:1 master:2 - ext3 /dev/ro\134ot "
    rb"rw,errors=continue,lowerdir=/a\054b:/c"
)


def _escape(name: bytes) -> bytes:
    """As seq_path() does for mount points."""
    for character in b"\\ \t\n":
        name = name.replace(bytes((character,)), b"\\%03o" % character)
    return name


def test_a_line_is_taken_apart() -> None:
    mount = mountinfo.Mount(LINE)
    assert (mount.mount_id, mount.parent_id) == (36, 35)
    assert mount.device == os.makedev(98, 0)
    assert (mount.root, mount.mount_point) == ("/mnt1", "/mnt/a b")
    assert mount.options == "rw,noatime"
    assert mount.propagation == "shared:1 master:2"
    assert (mount.fstype, mount.source) == ("ext3", "/dev/ro\\ot")
    assert mount.super_options == ("rw", "errors=continue", "lowerdir=/a,b:/c")


def test_no_propagation_fields() -> None:
    mount = mountinfo.Mount(b"36 35 98:0 / /x rw - tmpfs - rw")
    assert mount.propagation == ""
    assert (mount.fstype, mount.source) == ("tmpfs", "-")


@given(st.binary(min_size=1).filter(lambda name: b"\0" not in name))
def test_escapes_are_undone(name: bytes) -> None:
    escaped = _escape(name)
    assert b" " not in escaped
    assert os.fsencode(mountinfo.unescape(escaped)) == name


@pytest.mark.parametrize("raw", [b"\\", b"a\\", b"\\04", b"\\9zz", b"\\08x"])
def test_half_an_escape_stays_as_it_is(raw: bytes) -> None:
    assert os.fsencode(mountinfo.unescape(raw)) == raw


def test_this_process_sees_the_mount_that_a_file_lies_on() -> None:
    fd = os.open("/proc/self", os.O_RDONLY)
    try:
        mount = mountinfo.mount_of_fd(fd)
    finally:
        os.close(fd)
    assert (mount.fstype, mount.mount_point) == ("proc", "/proc")
    assert mount.mount_id in {entry.mount_id for entry in mountinfo.read_mounts()}


def test_the_topmost_of_stacked_mounts_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        b"1 0 0:1 / /x rw - tmpfs a rw",
        b"2 1 0:2 / /x rw - tmpfs b rw",
        rb"3 1 0:3 / /x\040y rw - tmpfs c rw",
    ]
    monkeypatch.setattr(mountinfo, "_lines", lambda _process: lines)
    for path, source in (("/x", "b"), ("/x y", "c"), ("/y", None)):
        found = mountinfo.mount_at(path)
        assert (found.source if found else None) == source
    mounts = mountinfo.read_mounts()
    assert mountinfo.mounts_beneath("/x", mounts) == mounts[:2]
    assert mountinfo.mounts_beneath("/", mounts) == mounts


def test_a_mount_point_is_told_from_a_directory(tmp_path: Path) -> None:
    assert mountinfo.is_mount_point("/proc")
    assert not mountinfo.is_mount_point("/proc/self/fd")
    assert not mountinfo.is_mount_point(str(tmp_path))
    (tmp_path / "link").symlink_to("/proc")
    for name in ("link", "missing"):
        with pytest.raises(OSError, match=name):
            mountinfo.is_mount_point(str(tmp_path / name))

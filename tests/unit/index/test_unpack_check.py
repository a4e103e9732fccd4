"""The comparison of trees: it must see what it is there to see."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from clipshim.index.unpack_check import compare_trees


def made(root: Path) -> Path:
    root.mkdir()
    (root / "dir").mkdir()
    (root / "file").write_bytes(b"content")
    (root / "other").write_bytes(b"x" * 3_000_000)
    os.link(root / "file", root / "second")
    os.symlink("file", root / "link")
    os.mkfifo(root / "fifo")
    for path in (*sorted(root.iterdir()), root):
        os.utime(path, ns=(0, 10**18), follow_symlinks=False)
    return root


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(2_500_000)
        file.write(b"y")


def relink(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"content")


def retarget(path: Path) -> None:
    path.unlink()
    path.symlink_to("dir")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda root: (root / "fifo").unlink(), "/fifo: missing"),
    "unexpected": (lambda root: (root / "new").touch(), "/new: unexpected"),
    "mode": (lambda root: (root / "file").chmod(0o4755), "/file: mode: expected"),
    "type": (
        lambda root: relink(root / "link"),
        "/link: mode: expected 120777",
    ),
    "contents": (lambda root: rewrite(root / "other"), "/other: contents differ within 1 MiB"),
    "size": (lambda root: (root / "other").write_bytes(b""), "/other: size: expected 3000000"),
    "time": (lambda root: os.utime(root / "dir", ns=(0, 10**18 + 1)), "/dir: mtime_ns"),
    "target": (
        lambda root: retarget(root / "link"),
        "/link: target",
    ),
    "hard link": (lambda root: relink(root / "second"), "/second: first_name"),
    "attribute": (lambda root: os.setxattr(root / "file", "user.a", b"1"), "extended attribute"),
}


def test_equal_trees_do_not_differ(tmp_path: Path) -> None:
    assert compare_trees(made(tmp_path / "a"), made(tmp_path / "b")) == []


@pytest.mark.parametrize("change", CHANGES)
def test_differences_are_found_and_named(change: str, tmp_path: Path) -> None:
    expected, actual = made(tmp_path / "a"), made(tmp_path / "b")
    act, line = CHANGES[change]
    act(actual)
    assert any(line in found for found in compare_trees(expected, actual))


def test_times_that_the_unpacker_made_up_are_passed_over_for_directories_only(
    tmp_path: Path,
) -> None:
    expected, actual = made(tmp_path / "a"), made(tmp_path / "b")
    os.utime(expected / "dir", ns=(0, 2 * 10**18))
    assert compare_trees(expected, actual, unpacked_since_ns=2 * 10**18) == []
    os.utime(expected / "file", ns=(0, 2 * 10**18))
    assert compare_trees(expected, actual, unpacked_since_ns=2 * 10**18)

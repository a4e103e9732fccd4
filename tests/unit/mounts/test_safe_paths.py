"""Opening paths that others may have planted links in, by openat2 and without it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from clipshim.mounts import safe_paths, syscalls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=["openat2", "walking"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As on new kernels, and as on those before 5.6."""
    if request.param == "walking":

        def missing(*_: object, **__: object) -> int:
            raise OSError(errno.ENOSYS, "openat2")

        monkeypatch.setattr(syscalls, "openat2", missing)
    return str(request.param)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    top = tmp_path / "root"
    (top / "usr/bin").mkdir(parents=True)
    (top / "usr/bin/tool").write_text("tool")
    (tmp_path / "secret").write_text("secret")
    for name, target in (
        ("bin", "usr/bin"),
        ("absolute", "/usr/bin/tool"),
        ("outside", "../../../../secret"),
        ("loop", "loop"),
        ("deep", "./bin/../bin/tool"),
        ("dangling", "nowhere"),
    ):
        (top / name).symlink_to(target)
    fd = os.open(top, os.O_PATH | os.O_DIRECTORY)
    yield top, fd
    os.close(fd)


def _read(fd: int) -> str:
    with os.fdopen(fd) as file:
        return file.read()


@pytest.mark.usefixtures("way")
def test_beneath(root: tuple[Path, int]) -> None:
    _, fd = root
    assert _read(safe_paths.open_beneath(fd, "usr/bin/tool", os.O_RDONLY)) == "tool"
    assert _read(safe_paths.open_beneath(fd, "./usr/../usr/bin/tool", os.O_RDONLY)) == "tool"


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("bin/tool", errno.ELOOP),
        ("absolute", errno.ELOOP),
        ("loop", errno.ELOOP),
        ("../secret", errno.EXDEV),
        ("usr/../../secret", errno.EXDEV),
        ("missing", errno.ENOENT),
        ("usr/bin/tool/x", errno.ENOTDIR),
    ],
)
@pytest.mark.usefixtures("way")
def test_beneath_refuses(path: str, number: int, root: tuple[Path, int]) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        os.close(safe_paths.open_beneath(root[1], path, os.O_RDONLY))
    assert caught.value.errno == number


@pytest.mark.parametrize(
    "path", ["/usr/bin/tool", "bin/tool", "absolute", "deep", "../../usr/bin/tool", "/bin//tool"]
)
@pytest.mark.usefixtures("way")
def test_in_root(path: str, root: tuple[Path, int]) -> None:
    assert _read(safe_paths.open_in_root(root[1], path, os.O_RDONLY)) == "tool"


@pytest.mark.parametrize(
    ("path", "number"),
    [("outside", errno.ENOENT), ("loop", errno.ELOOP), ("dangling", errno.ENOENT)],
)
@pytest.mark.usefixtures("way")
def test_in_root_never_leaves(path: str, number: int, root: tuple[Path, int]) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        os.close(safe_paths.open_in_root(root[1], path, os.O_RDONLY))
    assert caught.value.errno == number


@pytest.mark.usefixtures("way")
def test_the_directory_itself(root: tuple[Path, int]) -> None:
    top, fd = root
    found = safe_paths.open_in_root(fd, "/")
    assert os.fstat(found).st_ino == top.stat().st_ino
    os.close(found)


@pytest.mark.usefixtures("way")
def test_a_real_directory(root: tuple[Path, int]) -> None:
    fd, real = safe_paths.open_real_directory(f"{root[0]}/bin")
    assert real == f"{os.path.realpath(root[0])}/usr/bin"
    assert os.fstat(fd).st_ino == os.stat(real).st_ino
    os.close(fd)


@pytest.mark.usefixtures("way")
def test_no_descriptor_is_left(root: tuple[Path, int]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in ("deep", "loop", "outside", "usr/bin/tool/x", "missing", "../x"):
        for opener in (safe_paths.open_in_root, safe_paths.open_beneath):
            try:
                os.close(opener(root[1], path, os.O_RDONLY))
            except OSError:
                continue
    assert len(os.listdir("/proc/self/fd")) == before


def test_is_inside_compares_whole_names() -> None:
    assert safe_paths.is_inside("/a/b", "/a")
    assert safe_paths.is_inside("/a/b", "/a/")
    assert not safe_paths.is_inside("/ab", "/a")
    assert not safe_paths.is_inside("/a", "/a")

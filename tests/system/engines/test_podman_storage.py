"""podman's other ways to store and mount layers: fuse-overlayfs, metacopy, plain directories."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from clipshim.mounts import mountinfo
from tests.support import leftovers, small_images
from tests.support.engine import ULIMITS, make_target
from tests.support.node import Node
from tests.support.podman_engine import Podman
from tests.system.engines.conftest import loaded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.engine import Target
    from tests.support.registry import TestRegistry

pytestmark = pytest.mark.engine
IMAGE = "localhost/tree:1"
HIDING = "localhost/hiding:1"  # a layer on top that removes a file and replaces a directory
STORAGES = {
    "metacopy": 'mountopt = "nodev,metacopy=on"\n',
    "fuse-overlayfs": 'mountopt = "nodev"\nmount_program = "/usr/bin/fuse-overlayfs"\n',
}


@pytest.fixture(scope="module", params=["runc", "clipshim"])
def target(request: pytest.FixtureRequest, run_root: Path) -> Iterator[Target]:
    """The runtime that podman calls, of a node of this module."""
    if request.param == "runc":
        yield make_target("runc", run_root / "ps-t", None)
        return
    with Node(run_root / "ps-n") as node:
        yield make_target("clipshim", run_root / "ps-t", node)


@pytest.fixture(scope="module")
def archives(
    tmp_path_factory: pytest.TempPathFactory, target: Target, registry: TestRegistry
) -> list[Path]:
    """An image with two layers of files, or its stub; and a layer on top of it."""
    directory = tmp_path_factory.mktemp("podman-storage")
    base = small_images.busybox_layer(directory / "1.tar")
    files = {
        "data/": b"",
        "data/a": b"a\n",
        "data/b": b"b\n",
        "data/sub/": b"",
        "data/sub/c": b"c\n",
        "data/blob": small_images.BLOB,
    }
    top = small_images.layer(directory / "2.tar", files)
    image = small_images.image(directory / "oci", [base, top])
    reference = registry.push_layout(image.layout, "podman-storage:1")
    first = small_images.archive(target, image, reference, directory / "image.tar", IMAGE)
    names = {"data/": b"", "data/.wh.b": b"", "data/sub/": b"", "data/sub/.wh..wh..opq": b""}
    above = small_images.layer(directory / "3.tar", {**names, "data/sub/d": b"d\n"})
    return [first, small_images.add_layer(first, above, directory / "hiding.tar", HIDING)]


@contextlib.contextmanager
def running(
    directory: Path, target: Target, archives: list[Path], driver: str, options: str
) -> Iterator[Podman]:
    """podman with another storage.conf than usual."""
    engine = Podman(directory, target)
    storage = f'graphroot = "{directory}/root"\nrunroot = "{directory}/rr"\n'
    (directory / "storage.conf").write_text(
        f'[storage]\ndriver = "{driver}"\n{storage}[storage.options.overlay]\n{options}'
    )
    with loaded(engine, archives):
        yield engine


@pytest.fixture(scope="module", params=STORAGES)
def podman(
    request: pytest.FixtureRequest, run_root: Path, target: Target, archives: list[Path]
) -> Iterator[Podman]:
    """podman with one of the storages."""
    directory = run_root / f"ps{request.param[0]}-{target.name[0]}"
    with running(directory, target, archives, "overlay", STORAGES[request.param]) as engine:
        yield engine


@pytest.fixture
def sleeper(podman: Podman) -> Iterator[str]:
    """A running container."""
    name = podman.start_container("-d", IMAGE, "sleep", "100000")
    yield name
    podman("rm", "-f", "-t", "0", name)


def run(podman: Podman, *arguments: str) -> str:
    return podman.start_container("--rm", *arguments)


def test_the_tree_is_read_and_written(podman: Podman) -> None:
    out = run(
        podman, IMAGE, "sh", "-c",
        "busybox sha256sum </data/blob; echo x >>/data/a; cat /data/a; busybox rm /data/b;"
        " busybox mv /data/sub /data/moved; cat /data/moved/c; ls /data",
    )  # fmt: skip
    assert out.split() == [small_images.BLOB_SHA256, "-", "a", "x", "c", "a", "blob", "moved"]


def test_a_changed_mode_is_no_bare_metacopy(podman: Podman, sleeper: str) -> None:
    """A copy of metadata alone would be an empty file to what reads podman's layers."""
    podman("exec", sleeper, "busybox", "chmod", "600", "/data/a")
    podman("commit", "-q", sleeper, "localhost/chmod:1")
    try:
        out = run(podman, "localhost/chmod:1", "busybox", "stat", "-c", "%a %s", "/data/a")
        assert out == "600 2"
        assert run(podman, "localhost/chmod:1", "cat", "/data/a") == "a"
    finally:
        podman("rmi", "-f", "localhost/chmod:1")


def test_what_was_written_is_kept_over_a_restart(podman: Podman, sleeper: str) -> None:
    podman("exec", sleeper, "sh", "-c", "echo kept >/data/kept; busybox rm /data/b")
    podman("restart", "-t", "0", sleeper)
    expected = ["kept", "a", "blob", "kept", "sub"]
    assert podman("exec", sleeper, "sh", "-c", "cat /data/kept; ls /data").split() == expected
    podman("stop", "-t", "0", sleeper)
    podman("start", sleeper)
    assert podman("exec", sleeper, "cat", "/data/kept", "/data/a") == "kept\na"


def test_diff_copy_and_commit(podman: Podman, sleeper: str, tmp_path: Path) -> None:
    podman("exec", sleeper, "sh", "-c", "echo new >/data/new")
    (tmp_path / "in").write_text("copied in\n")
    podman("cp", tmp_path / "in", f"{sleeper}:/data/in")
    assert podman("exec", sleeper, "cat", "/data/in") == "copied in"
    podman("cp", f"{sleeper}:/data/sub/c", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "c\n"
    assert "A /data/new" in podman("diff", sleeper).splitlines()
    podman("commit", "-q", sleeper, "localhost/committed:1")
    try:
        out = run(podman, "localhost/committed:1", "cat", "/data/new", "/data/in", "/data/a")
        assert out == "new\ncopied in\na"
    finally:
        podman("rmi", "-f", "localhost/committed:1")


def test_layers_above_hide_files_of_the_tree(podman: Podman) -> None:
    out = run(podman, HIDING, "sh", "-c", "ls /data /data/sub; cat /data/a")
    assert out.split() == ["/data:", "a", "blob", "sub", "/data/sub:", "d", "a"]


def test_a_build_on_top(podman: Podman, tmp_path: Path) -> None:
    (tmp_path / "Containerfile").write_text(
        f"FROM {IMAGE}\nRUN cat /data/a >/data/built\nCOPY added /data/sub/added\n"
    )
    (tmp_path / "added").write_text("added\n")
    build: list[str | Path] = ["build", "-q", "--network=none", "--isolation=oci", *ULIMITS]
    build += ["--runtime", podman.target.runtime, "-t", "localhost/built:1", tmp_path]
    if podman.target.lazy and "mount_program" in (podman.directory / "storage.conf").read_text():
        done = podman.run(*build, check=False)
        assert done.returncode != 0
        assert "without mount_program in storage.conf" in done.stderr, "no result without its files"
        return
    podman(*build)
    try:
        out = run(podman, "localhost/built:1", "cat", "/data/built", "/data/sub/added", "/data/b")
        assert out == "a\nadded\nb"
    finally:
        podman("rmi", "-f", "localhost/built:1")


@pytest.mark.parametrize("label", ["Z", "z"])
def test_labelled_volumes(podman: Podman, tmp_path: Path, label: str) -> None:
    (tmp_path / "f").write_text("bound\n")
    out = run(
        podman, "-v", f"{tmp_path}:/data/sub:{label}", "-v", f"fresh:/data/fresh:{label}", IMAGE,
        "sh", "-c", "cat /data/sub/f /data/a; echo z >/data/sub/z; echo y >/data/fresh/y",
    )  # fmt: skip
    assert out == "bound\na"
    assert (tmp_path / "z").read_text() == "z\n"
    podman("volume", "rm", "fresh")


def test_a_volatile_container_stays_volatile(podman: Podman) -> None:
    """`--rm` mounts so: nothing of the container is to outlive a crash."""
    if "mount_program" in (podman.directory / "storage.conf").read_text():
        return  # fuse-overlayfs shows no such option
    name = podman.start_container("-d", "--rm", IMAGE, "sleep", "100000")
    try:
        merged = podman("inspect", "-f", "{{.GraphDriver.Data.MergedDir}}", name)
        mount = mountinfo.mount_at(merged)
        assert mount is not None
        assert {"volatile", "fsync=volatile"} & set(mount.super_options)
        tree = any(option.endswith("/lower") for option in mount.super_options)
        assert tree == podman.target.lazy
    finally:
        podman("rm", "-f", "-t", "0", name)


def test_plain_directories_lie_above_the_tree(
    run_root: Path, target: Target, archives: list[Path]
) -> None:
    """The storage driver vfs mounts nothing: the container gets an overlay over tree and copy."""
    with running(run_root / f"psv-{target.name[0]}", target, archives, "vfs", "") as engine:
        script = "busybox sha256sum </data/blob; echo x >>/data/a; cat /data/a"
        out = run(engine, IMAGE, "sh", "-c", script)
        assert out.split() == [small_images.BLOB_SHA256, "-", "a", "x"]
        assert run(engine, HIDING, "cat", "/data/sub/d") == "d"
    assert not leftovers.mounts_below(engine.directory)

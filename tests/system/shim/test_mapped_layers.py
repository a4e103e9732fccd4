"""Stubs whose layers containerd has mounted with shifted owners, for a user namespace.

The overlays are mounted here as containerd 2 does it, which Debian 12 does not have.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from clipshim.mounts import erofs, mountinfo, syscalls
from tests.support.runtimes import write_bundle
from tests.support.skips import kernel_cannot
from tests.system.shim.containers import INDEX, LOOP, assert_clean
from tests.system.shim.test_user_namespaces import FIRST, in_user_namespace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.node import Node
    from tests.support.runtimes import Runtime

SCRIPT = (
    "id -u; cat /first /middle /etc/passwd; stat -c %u:%g /first /etc/passwd /bin/busybox; "
    "echo x >/bin/new; rm /first; ls /first || echo gone"
)


class Snapshots:
    """containerd's overlay snapshotter with a stub, perhaps a layer on it, and a container's."""

    def __init__(self, directory: Path, stub_clip: Path, *, layers: int) -> None:
        self.home = directory / "snapshots"
        self.rootfs = directory / "task/rootfs"
        self.rootfs.mkdir(parents=True)
        self.temporary = directory / "tmp/ovl-idmapped4711"
        stub = self.home / "1/fs"
        (stub / ".clip").mkdir(parents=True)
        shutil.copy(stub_clip, stub / ".clip/index.clip")
        (stub / "first").write_text("f\n")
        (stub / "middle").write_text("m\n")
        (stub / "etc").mkdir()
        (stub / "etc/passwd").write_text("from the stub\n")
        self.layers = ["1/fs"]
        if layers > 1:
            (self.home / "2/fs").mkdir(parents=True)
            (self.home / "2/fs/middle").write_text("on it\n")
            self.layers.insert(0, "2/fs")
        for name in ("fs", "work"):
            (self.home / "7" / name).mkdir(parents=True)
            os.chown(self.home / "7" / name, FIRST, FIRST)

    def mount(self, userns: str) -> None:
        """core/mount/mount_linux.go, doPrepareIDMappedOverlay."""
        common = self.home / "1" if len(self.layers) == 1 else self.home
        names = ["fs"] if len(self.layers) == 1 else self.layers
        self.temporary.mkdir(parents=True)
        namespace = os.open(userns, os.O_RDONLY)
        clone = syscalls.open_tree(syscalls.AT_FDCWD, str(common), syscalls.OPEN_TREE_CLONE)
        try:
            syscalls.mount_setattr(
                clone, "", set_attributes=syscalls.MOUNT_ATTR_IDMAP, userns_fd=namespace
            )
            syscalls.move_mount(clone, "", syscalls.AT_FDCWD, str(self.temporary))
        finally:
            os.close(clone)
            os.close(namespace)
        lower = ":".join(f"{self.temporary}/{name}" for name in names)
        words = f"lowerdir={lower},upperdir={self.home}/7/fs,workdir={self.home}/7/work"
        try:
            subprocess.run(
                ["mount", "-t", "overlay", "overlay", "-o", words, self.rootfs], check=True
            )
        finally:
            subprocess.run(["umount", self.temporary], check=True)
            self.temporary.rmdir()

    def bundle(self, directory: Path, script: str) -> Path:
        """A bundle for the mounted rootfs."""
        return write_bundle(directory, ["/bin/sh", "-c", script], rootfs=self.rootfs)


@pytest.fixture
def userns() -> Iterator[str]:
    """A user namespace whose root is FIRST on the host."""
    keeper = subprocess.Popen(
        ["unshare", "--user", "sh", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == b"ready\n"
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{keeper.pid}/{name}", "w") as file:
                file.write(f"0 {FIRST} 65536\n")
        yield f"/proc/{keeper.pid}/ns/user"
        keeper.stdin.close()


@pytest.mark.parametrize("layers", [1, 2])
def test_a_stub_runs_on_layers_that_are_gone_by_name(
    node: Node, runtime: Runtime, tmp_path: Path, tiny_clip: Path, userns: str, layers: int
) -> None:
    if reason := erofs.probe_erofs(str(tmp_path)):
        kernel_cannot(reason)
    snapshots = Snapshots(tmp_path / "c", tiny_clip, layers=layers)
    top = runtime.root.parents[2]
    in_user_namespace(snapshots.bundle(snapshots.rootfs.parent, SCRIPT), top)
    snapshots.mount(userns)
    try:
        done = runtime("run", "-b", snapshots.rootfs.parent, "box")
        middle = "m" if layers == 1 else "on it"
        expected = f"0\nf\n{middle}\nfrom the stub\n0:0\n0:0\n0:0\ngone\n"
        assert done.stdout == expected, done
        assert (snapshots.home / "7/fs/bin/new").stat().st_uid == FIRST
        assert_clean(node)
    finally:
        subprocess.run(["umount", snapshots.rootfs], check=False, capture_output=True)
    assert (snapshots.home / "1/fs/first").stat().st_uid == 0
    assert mountinfo.mount_at(str(snapshots.rootfs)) is None


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("arguments", [LOOP, ["/no/such/program"]])
def test_an_image_that_is_named_needs_none_of_them(
    node: Node,
    runtime: Runtime,
    tmp_path: Path,
    tiny_clip: Path,
    userns: str,
    layers: int,
    arguments: list[str],
) -> None:
    if reason := erofs.probe_erofs(str(tmp_path)):
        kernel_cannot(reason)
    snapshots = Snapshots(tmp_path / "c", tiny_clip, layers=layers)
    shutil.rmtree(snapshots.home / "1/fs/.clip")
    path = snapshots.rootfs.parent
    write_bundle(path, arguments, rootfs=snapshots.rootfs, annotations=INDEX)
    shutil.copy(tiny_clip, path / "index.clip")
    in_user_namespace(path, runtime.root.parents[2])
    snapshots.mount(userns)
    try:
        done = runtime.quietly("create", "-b", path, "box", check=False)
        if arguments == LOOP:
            assert done.returncode == 0, done.stdout
            assert (snapshots.rootfs / "bin/busybox").stat().st_uid == FIRST
            assert not (snapshots.rootfs / "first").exists()
        else:
            assert done.returncode == 1
            assert "/no/such/program" in done.stdout
        runtime("delete", "--force", "box")
        assert_clean(node)
    finally:
        subprocess.run(["umount", snapshots.rootfs], check=False, capture_output=True)
    assert mountinfo.mount_at(str(snapshots.rootfs)) is None


@pytest.mark.parametrize("layers", [1, 2])
def test_what_fails_leaves_the_engines_overlay_as_it_was(
    node: Node, runtime: Runtime, tmp_path: Path, tiny_clip: Path, userns: str, layers: int
) -> None:
    if reason := erofs.probe_erofs(str(tmp_path)):
        kernel_cannot(reason)
    snapshots = Snapshots(tmp_path / "c", tiny_clip, layers=layers)
    path = snapshots.bundle(snapshots.rootfs.parent, SCRIPT)
    in_user_namespace(path, runtime.root.parents[2])
    text = (path / "config.json").read_text().replace('"/bin/sh"', '"/no/such/program"')
    (path / "config.json").write_text(text)
    snapshots.mount(userns)
    try:
        done = runtime("create", "-b", path, "box", check=False)
        assert done.returncode == 1
        assert "/no/such/program" in done.stderr
        assert (snapshots.rootfs / "etc/passwd").read_text() == "from the stub\n"
        assert (snapshots.rootfs / "etc/passwd").stat().st_uid == FIRST
        assert not (snapshots.rootfs / "bin").exists()
        assert_clean(node)
    finally:
        subprocess.run(["umount", snapshots.rootfs], check=True)
    assert mountinfo.mount_at(str(snapshots.rootfs)) is None

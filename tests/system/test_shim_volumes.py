"""Volumes that create fills, and create dying, failing or running out of space meanwhile.

The engine's records are written here as Docker writes them; tests/system/engines has the engines.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from clipshim.index.unpack_check import compare_trees
from clipshim.shim import trace
from clipshim.shim.volumes import RECORD, STAGE
from tests.support import images, small_images
from tests.support.fault_proxy import FaultProxy
from tests.support.node import Node
from tests.support.runtimes import Runtime, write_bundle
from tests.system.shim.containers import LOOP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.images import Image
    from tests.support.registry import TestRegistry

ID = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """busybox, and a directory of several spans."""
    made = tmp_path_factory.mktemp("shim-volumes")
    files: dict[str, bytes | str] = {
        "srv/": b"",
        "srv/a": b"a\n",
        "srv/link": "a",
        "srv/sub/": b"",
        "srv/sub/b": b"b\n",
    }
    files |= {"srv/sub/blob": small_images.BLOB, "srv/z": small_images.BLOB}
    layers = [
        small_images.busybox_layer(made / "1.tar"),
        small_images.layer(made / "2.tar", files, {"srv/a": 1234}),
    ]
    return small_images.image(made / "oci", layers)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, image: Image) -> Path:
    """What the image holds at the volume's place."""
    return images.unpack(image, tmp_path_factory.mktemp("unpacked") / "rootfs") / "srv"


@pytest.fixture(scope="module")
def clip(run_root: Path, image: Image) -> Path:
    """A self-contained index of it."""
    path = run_root / "shim-volumes.clip"
    with Node(run_root / "shim-volumes-indexer") as node:
        node.clipshim("index", image.reference, path, "--embed", "--quiet")
    return path


class Engine:
    """What Docker leaves for the runtime: layers, an overlay, a volume, its record, a bundle."""

    def __init__(self, directory: Path, clip: Path) -> None:
        self.root = directory / "docker"
        storage = self.root / "overlay2"
        self.merged = storage / "id/merged"
        self.volume = self.root / "volumes/new/_data"
        self.record = self.root / "containers" / ID / "config.v2.json"
        for path in (self.merged, self.volume, self.record.parent, storage / "stub/.clip"):
            path.mkdir(parents=True)
        for name in ("diff", "work"):
            (storage / "id" / name).mkdir()
        shutil.copy(clip, storage / "stub/.clip/index.clip")
        self.options = (
            f"lowerdir={storage}/stub,upperdir={storage}/id/diff,workdir={storage}/id/work"
        )
        self.bundle = directory / "bundle"
        self.write("0001-01-01T00:00:00Z")

    def write(self, started: str) -> None:
        """The record and the bundle."""
        point = {"Type": "volume", "Driver": "local", "Name": "new", "Spec": {}}
        record = {"ID": ID, "State": {"StartedAt": started}, "MountPoints": {"/srv": point}}
        self.record.write_text(json.dumps(record))
        self.record.chmod(0o600)
        hostname = self.record.parent / "hostname"
        hostname.write_text("box\n")
        write_bundle(
            self.bundle, LOOP, rootfs=self.merged,
            mounts=[
                {"type": "bind", "source": str(source), "destination": name, "options": ["rbind"]}
                for source, name in ((hostname, "/etc/hostname"), (self.volume, "/srv"))
            ],
        )  # fmt: skip

    def mount(self) -> None:
        """Once for each start, as engines do."""
        self.close()
        subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", self.options, self.merged], check=True
        )

    def close(self) -> None:
        """As an engine cleans up."""
        while os.path.ismount(self.merged):
            subprocess.run(["umount", "-l", self.merged], check=True)

    def left(self) -> list[str]:
        """What lies in the volume and beside it."""
        return sorted(os.listdir(self.volume)) + sorted(os.listdir(self.volume.parent))


@pytest.fixture(scope="module")
def node(run_root: Path) -> Iterator[Node]:
    with Node(run_root / "shim-volumes") as made:
        yield made


@pytest.fixture
def engine(tmp_path: Path, clip: Path) -> Iterator[Engine]:
    made = Engine(tmp_path, clip)
    yield made
    made.close()


@pytest.fixture
def runtime(node: Node, tmp_path: Path, engine: Engine) -> Iterator[Runtime]:
    with Runtime.clipshim(tmp_path / "root", node) as made:
        yield made
    engine.close()
    assert node.container_mounts() == []
    assert list(node.run_dir.glob("*/lock")) == []


def assert_whole(engine: Engine, expected: Path) -> None:
    """The volume is as the image has it, but for the time of its top, which moving changes."""
    found = compare_trees(expected, engine.volume)
    assert [line for line in found if not line.startswith("/: mtime_ns")] == []


def create(engine: Engine, runtime: Runtime, *, check: bool = True) -> int:
    engine.mount()
    return runtime.quietly("create", "-b", engine.bundle, ID, check=check).returncode


def test_create_fills_a_volume_before_the_first_start_only(
    engine: Engine, runtime: Runtime, expected: Path
) -> None:
    create(engine, runtime)
    assert compare_trees(expected, engine.volume) == []
    runtime("delete", "--force", ID)
    assert compare_trees(expected, engine.volume) == []
    shutil.rmtree(engine.volume)
    engine.volume.mkdir()
    engine.write("2026-11-21T17:52:03.981846796Z")
    create(engine, runtime)
    assert engine.left() == ["_data"]


@pytest.mark.parametrize("step", trace.VOLUME_STEPS)
@pytest.mark.parametrize("next_one", ["delete", "gc", "create", "other create"])
def test_killed_while_it_fills_the_next_one_ends_it(
    step: str, next_one: str, engine: Engine, runtime: Runtime, node: Node, expected: Path
) -> None:
    runtime.env = {**node.env, trace.TRACE_ENV: step}
    assert create(engine, runtime, check=False) == -signal.SIGKILL
    assert (engine.volume.parent / RECORD).exists()
    runtime.env = node.env
    if next_one in ("delete", "gc"):
        if next_one == "delete":
            runtime("delete", "--force", ID)
        else:
            node.clipshim("gc")
        if step == "volume-copied":
            assert engine.left() == ["_data"]
        else:
            assert_whole(engine, expected)
    elif next_one == "other create":  # by another name, as after a reboot without a state
        shutil.rmtree(node.run_dir / next(node.run_dir.glob(f"{ID}*")).name)
    create(engine, runtime)
    assert_whole(engine, expected)
    assert not (engine.volume / STAGE).exists()


def test_a_full_disk_is_an_error_and_the_volume_is_empty_again(
    engine: Engine, runtime: Runtime, tmp_path: Path, expected: Path
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(5 << 20))
    images.run("mkfs.ext4", "-q", "-m", "0", disk)
    images.run("mount", "-o", "loop", disk, engine.volume)
    try:
        (engine.volume / "lost+found").rmdir()
        engine.mount()
        done = runtime("create", "-b", engine.bundle, ID, check=False)
        assert done.returncode == 1
        lines = done.stderr.splitlines()
        assert len(lines) == 1
        assert "volume new: " in lines[0]
        assert "No space left on device" in lines[0]
        assert engine.left() == ["_data"]
        assert os.path.ismount(engine.merged)  # the engine's own again
        assert os.listdir(engine.merged) == [".clip"]
    finally:
        images.run("umount", engine.volume)
    create(engine, runtime)
    assert compare_trees(expected, engine.volume) == []


def test_a_registry_that_is_gone_is_an_error_and_the_next_start_fills(
    engine: Engine,
    make_node: Callable[..., Node],
    registry: TestRegistry,
    image: Image,
    tmp_path: Path,
    expected: Path,
) -> None:
    name = registry.push_layout(image.layout, "shim-volumes:1").partition("/")[2]
    node = make_node(fetch_deadline_s=3.0)
    with FaultProxy(registry.host) as proxy, Runtime.clipshim(tmp_path / "root", node) as runtime:
        stub = engine.merged.parents[1] / "stub/.clip/index.clip"
        stub.unlink()
        node.clipshim("index", f"{proxy.host}/{name}", stub)
        with proxy.refusing():
            engine.mount()
            done = runtime("create", "-b", engine.bundle, ID, check=False)
        assert done.returncode == 1
        assert "volume new: " in done.stderr
        assert "Input/output error" in done.stderr
        assert engine.left() == ["_data"]
        create(engine, runtime)
        assert compare_trees(expected, engine.volume) == []
        runtime("delete", "--force", ID)
        engine.close()

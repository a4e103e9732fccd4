"""Grafts: the tree beneath an overlay that an engine has mounted, and what cannot be grafted.

The overlays are mounted here as the engines mount them; tests/system/engines has the engines.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from clipshim.mounts import mountinfo, overlay, syscalls
from clipshim.shim import state, trace
from tests.support import images, small_images
from tests.support.node import Node, wait_for
from tests.support.runtimes import Runtime, write_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCRIPT = (
    "ls /bin/busybox /top /middle; cat /etc/passwd /etc/group; echo new >/new; echo x >>/etc/group"
)


@pytest.fixture(scope="module")
def stub_clip(run_root: Path) -> Path:
    """A self-contained index of the small image."""
    path = run_root / "graft.clip"
    with Node(run_root / "graft-indexer") as node:
        layout = f"oci:{images.tiny_image().layout}:{images.TAG}"
        node.clipshim("index", layout, path, "--embed", "--quiet")
    return path


@pytest.fixture(scope="module")
def node(run_root: Path) -> Iterator[Node]:
    with Node(run_root / "graft") as made:
        yield made


class Engine:
    """What an engine leaves for the runtime: a storage directory, an overlay, a bundle."""

    def __init__(self, directory: Path, stub_clip: Path) -> None:
        self.storage = directory / "overlay2"
        self.merged = self.storage / "id" / "merged"
        self.upper, self.work = self.storage / "id" / "diff", self.storage / "id" / "work"
        for path in (self.merged, self.upper, self.work, self.storage / "l"):
            path.mkdir(parents=True)
        for name in ("stub", "middle"):
            (self.storage / name / "diff").mkdir(parents=True)
            (self.storage / "l" / name.upper()).symlink_to(f"../{name}/diff")
        stub = self.storage / "stub" / "diff"
        (stub / ".clip").mkdir()
        shutil.copy(stub_clip, stub / ".clip/index.clip")
        (stub / "etc").mkdir()
        (stub / "etc/passwd").write_text("from the stub\n")
        (self.storage / "middle/diff/middle").write_text("m")
        (self.upper / "top").write_text("t")
        self.bundle = directory / "bundle"

    def mount(self, *options: str) -> None:
        """Mounts as Docker does: from inside the storage directory, with short names."""
        words = "lowerdir=l/MIDDLE:l/STUB,upperdir=id/diff,workdir=id/work"
        command = ["mount", "-t", "overlay", "overlay", "-o", ",".join((words, *options))]
        subprocess.run([*command, self.merged], cwd=self.storage, check=True)

    def write_bundle(self, script: str = SCRIPT) -> Path:
        """A bundle for the merged directory."""
        return write_bundle(self.bundle, ["/bin/sh", "-c", script], rootfs=self.merged)

    def write_annotated_bundle(self, script: str, clip: Path) -> dict[str, Any]:
        """A bundle that names an index file in it; its configuration."""
        self.write_bundle(script)
        shutil.copy(clip, self.bundle / "it.clip")
        config: dict[str, Any] = json.loads((self.bundle / "config.json").read_text())
        config["annotations"] = {"io.clipshim.index": "it.clip"}
        (self.bundle / "config.json").write_text(json.dumps(config))
        return config

    def mounts(self) -> list[mountinfo.Mount]:
        """What is mounted at the merged directory."""
        return [m for m in mountinfo.read_mounts() if m.mount_point == str(self.merged)]

    def close(self) -> None:
        """As an engine cleans up."""
        while self.mounts():
            subprocess.run(["umount", "-l", self.merged], check=True)


@pytest.fixture
def engine(tmp_path: Path, stub_clip: Path) -> Iterator[Engine]:
    made = Engine(tmp_path, stub_clip)
    yield made
    made.close()


@pytest.fixture
def runtime(node: Node, tmp_path: Path, engine: Engine) -> Iterator[Runtime]:
    with Runtime.clipshim(tmp_path / "root", node) as made:
        yield made
    engine.close()
    assert node.container_mounts() == []
    assert list(node.run_dir.glob("*/lock")) == []


@pytest.mark.parametrize(
    "option", ["index=off", "volatile", "metacopy=on", "redirect_dir=on", "userxattr"]
)
def test_a_graft_shows_all_layers_and_writes_into_the_engines_upper(
    option: str, engine: Engine, runtime: Runtime
) -> None:
    engine.mount(option)
    config = (engine.write_bundle() / "config.json").read_text()
    log = runtime.root / "log"
    done = runtime("--log", log, "run", "--keep", "-b", engine.bundle, "box")
    assert log.read_text() == ""
    expected = ["/bin/busybox", "/middle", "/top", "from the stub", "root:x:0:", "testers:x:1235:"]
    assert sorted(done.stdout.splitlines()) == sorted(expected)
    assert (engine.upper / "new").read_text() == "new\n"
    assert (engine.upper / "etc/group").read_text().endswith("x\n"), "copied up whole"
    assert (engine.bundle / "config.json").read_text() == config
    (mount,) = engine.mounts()
    assert ("volatile" in " ".join(mount.super_options)) == (option == "volatile")
    assert ("userxattr" in mount.super_options) == (option == "userxattr")
    runtime("delete", "box")
    (mount,) = engine.mounts()
    subprocess.run(["umount", engine.merged], check=True)
    assert engine.mounts() == []


def test_delete_of_a_graft_needs_no_python(
    engine: Engine, runtime: Runtime, node: Node, tmp_path: Path
) -> None:
    engine.mount("index=off")
    engine.write_bundle("while :; do sleep 0.1; done")
    runtime.quietly("run", "--detach", "-b", engine.bundle, "box")
    key = state.container_key("box", str(runtime.root))
    alone = tmp_path / "alone" / "clipshim"  # no python3 beside it
    alone.parent.mkdir()
    program = runtime.program
    shutil.copy(program, alone)
    runtime.program = alone
    assert runtime("delete", "box", check=False).returncode == 1, "it is running"
    assert (node.run_dir / key / "state.json").exists()
    assert node.call("status")["images"][0]["containers"] == 1
    runtime("kill", "box", "KILL")
    wait_for("it stops", lambda: runtime.status("box") == "stopped")
    runtime("delete", "box")
    assert not (node.run_dir / key).exists()
    wait_for("it is released", lambda: not node.call("status")["images"][0]["containers"])
    again = runtime("delete", "box", check=False)
    assert (again.returncode, "does not exist" in again.stderr) == (1, True)
    runtime.program = program


def test_a_restart_on_the_same_upper_directory(engine: Engine, runtime: Runtime) -> None:
    for expected in ("1\n", "1\n1\n"):
        engine.mount("volatile")
        engine.write_bundle("echo 1 >>/count; cat /count; rm -f /etc/group; ls /etc")
        done = runtime("run", "-b", engine.bundle, "box")
        assert done.stdout == expected + "passwd\n"
        engine.close()
        shutil.rmtree(engine.work / "work/incompat", ignore_errors=True)


def test_a_restart_without_the_target_of_a_link_of_the_image(
    node: Node, engine: Engine, runtime: Runtime, tmp_path: Path
) -> None:
    files: dict[str, bytes | str] = {"data": "srv/data", "srv/": b"", "srv/data/": b""}
    layers = [
        small_images.busybox_layer(tmp_path / "1.tar"),
        small_images.layer(tmp_path / "2.tar", files),
    ]
    made = small_images.image(tmp_path / "oci", layers)
    stub = engine.storage / "stub/diff/.clip/index.clip"
    node.clipshim("index", made.reference, stub, "--embed", "--quiet")
    for expected in ("/data/.\n", "gone\n"):
        engine.mount()
        engine.write_bundle("ls -d /data/. 2>/dev/null || echo gone; rmdir /srv/data 2>/dev/null")
        done = runtime("run", "-b", engine.bundle, "box", check=False)
        assert (done.stdout, done.stderr) == (expected, "")
        engine.close()


def test_many_layers(engine: Engine, runtime: Runtime) -> None:
    names = []
    for number in range(90):
        path = engine.storage / f"layer-with-a-long-name-{number:064}" / "diff"
        path.mkdir(parents=True)
        (path / f"file{number}").touch()
        names.append(str(path))
    names.append(str(engine.storage / "stub/diff"))
    overlay.OverlayPlan(
        str(engine.merged), names, upper=str(engine.upper), work=str(engine.work)
    ).execute()
    engine.write_bundle("ls / | grep -c ^file; ls /bin/busybox")
    assert runtime("run", "-b", engine.bundle, "box").stdout == "90\n/bin/busybox\n"


def test_a_failed_create_puts_the_engines_overlay_back(engine: Engine, runtime: Runtime) -> None:
    engine.mount("volatile")
    (before,) = engine.mounts()
    write_bundle(engine.bundle, ["/nowhere"], rootfs=engine.merged)
    assert runtime.quietly("create", "-b", engine.bundle, "box", check=False).returncode == 1
    (after,) = engine.mounts()
    assert not any("clip" in option and "lower" in option for option in after.super_options[3:])
    assert (after.fstype, after.options) == (before.fstype, before.options)
    assert sorted(os.listdir(engine.merged)) == [".clip", "etc", "middle", "top"]


@pytest.mark.parametrize("step", ["create-unmounted", "create-mounted", "create-config"])
def test_killed_in_a_graft_the_next_one_cleans(
    step: str, engine: Engine, runtime: Runtime, node: Node
) -> None:
    engine.mount("index=off")
    engine.write_bundle()
    runtime.env = {**node.env, trace.TRACE_ENV: step}
    done = runtime.quietly("create", "-b", engine.bundle, "box", check=False)
    assert done.returncode == -signal.SIGKILL
    runtime.env = node.env
    runtime("delete", "--force", "box")
    engine.close()
    engine.mount("index=off")
    assert "/bin/busybox" in runtime("run", "-b", engine.bundle, "box").stdout


def test_a_graft_that_was_left_mounted_is_grafted_again(
    engine: Engine, runtime: Runtime, node: Node
) -> None:
    engine.mount("index=off")
    engine.write_bundle()
    runtime.env = {**node.env, trace.TRACE_ENV: "create-config"}
    runtime.quietly("create", "-b", engine.bundle, "box", check=False)
    runtime.env = node.env
    assert "/bin/busybox" in runtime("run", "-b", engine.bundle, "box").stdout
    assert len(engine.mounts()) == 1


def test_a_read_only_overlay_without_upper(engine: Engine, runtime: Runtime) -> None:
    names = [str(engine.storage / name / "diff") for name in ("middle", "stub")]
    overlay.OverlayPlan(str(engine.merged), names, mount_options=["ro"]).execute()
    engine.write_bundle("ls /bin/busybox /middle; echo x >/x")
    done = runtime("run", "-b", engine.bundle, "box", check=False)
    assert done.stdout == "/bin/busybox\n/middle\n"
    assert "Read-only" in done.stderr


@pytest.mark.parametrize("kind", ["directory", "bind", "fuse-overlayfs"])
def test_what_is_no_overlay_goes_above_the_tree(
    kind: str, engine: Engine, runtime: Runtime, node: Node
) -> None:
    stub = engine.storage / "stub/diff"
    if kind == "directory":
        shutil.copytree(stub, engine.merged, dirs_exist_ok=True)
    elif kind == "bind":
        syscalls.mount(str(stub), str(engine.merged), None, syscalls.MS_BIND)
    else:
        options = f"lowerdir={stub},upperdir={engine.upper},workdir={engine.work}"
        subprocess.run(["fuse-overlayfs", "-o", options, engine.merged], check=True)
    engine.write_bundle("ls /bin/busybox; cat /etc/passwd; echo new >/new")
    done = runtime("run", "-b", engine.bundle, "box")
    assert done.stdout == "/bin/busybox\nfrom the stub\n"
    assert not (stub / "new").exists()
    assert json.loads((engine.bundle / "config.json").read_text())["root"]["path"] == str(
        engine.merged
    )


def test_links_in_a_rootfs_make_no_stub(
    engine: Engine, runtime: Runtime, node: Node, stub_clip: Path
) -> None:
    target = engine.storage / "elsewhere"
    target.mkdir()
    shutil.copy(stub_clip, target / "index.clip")
    engine.merged.joinpath(".clip").symlink_to(target)
    engine.write_bundle("true")
    done = runtime("run", "-b", engine.bundle, "box", check=False)
    assert "/bin/sh" in done.stderr, "an ordinary, empty rootfs"


def test_an_image_that_is_named_takes_the_place_of_the_engines_layers(
    engine: Engine, runtime: Runtime, stub_clip: Path
) -> None:
    """What the container writes is the engine's, as its restarts and commits expect."""
    engine.mount("index=off")
    script = "ls /bin/busybox; ls -d /middle /top; cat /etc/passwd; echo new >/new"
    config = engine.write_annotated_bundle(script, stub_clip)
    output = engine.bundle / "output"
    with open(output, "wb") as out:
        command = runtime.command("create", "-b", engine.bundle, "box")
        subprocess.run(command, env=runtime.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                       check=True)  # fmt: skip
    runtime("start", "box")
    wait_for("it has ended", lambda: '"stopped"' in runtime("state", "box").stdout)
    runtime("delete", "box")
    lines = output.read_text().splitlines()
    assert lines[0] == "/bin/busybox"
    assert "/top" in lines, "the engine's upper directory"
    assert "/middle" not in lines, "the engine's image"
    assert "from the stub" not in lines
    assert (engine.upper / "new").read_text() == "new\n"
    assert json.loads((engine.bundle / "config.json").read_text()) == config
    assert len(engine.mounts()) == 1
    engine.close()


def test_a_rootfs_that_a_person_mounted_stays_as_it_is(
    engine: Engine, runtime: Runtime, stub_clip: Path
) -> None:
    engine.mount("index=off")
    engine.write_annotated_bundle("ls /bin/busybox; ls -d /top; echo new >/new", stub_clip)
    done = runtime("run", "-b", engine.bundle, "box", check=False)
    assert done.stdout == "/bin/busybox\n"
    assert not (engine.upper / "new").exists()
    assert sorted(os.listdir(engine.merged)) == [".clip", "etc", "middle", "top"]


@pytest.mark.parametrize("step", ["create-planned", "create-unmounted", "create-mounted"])
def test_killed_with_an_image_that_is_named_the_next_create_works(
    step: str, engine: Engine, runtime: Runtime, node: Node, stub_clip: Path
) -> None:
    engine.mount("index=off")
    engine.write_annotated_bundle("true", stub_clip)
    runtime.env = {**node.env, trace.TRACE_ENV: step}
    done = runtime.quietly("create", "-b", engine.bundle, "box", check=False)
    assert done.returncode == -signal.SIGKILL
    runtime.env = node.env
    if not engine.mounts():
        engine.mount("index=off")  # as an engine does before it starts a container again
    runtime.quietly("create", "-b", engine.bundle, "box")
    assert len(engine.mounts()) == 1
    runtime("delete", "--force", "box")


def test_a_failed_create_with_an_image_that_is_named_puts_the_engines_overlay_back(
    engine: Engine, runtime: Runtime, stub_clip: Path
) -> None:
    engine.mount("index=off")
    (before,) = engine.mounts()
    engine.write_annotated_bundle("true", stub_clip)
    config = json.loads((engine.bundle / "config.json").read_text())
    config["process"]["args"] = ["/nowhere"]
    (engine.bundle / "config.json").write_text(json.dumps(config))
    assert runtime.quietly("create", "-b", engine.bundle, "box", check=False).returncode == 1
    (after,) = engine.mounts()
    assert (after.fstype, after.options) == (before.fstype, before.options)
    assert sorted(os.listdir(engine.merged)) == [".clip", "etc", "middle", "top"]

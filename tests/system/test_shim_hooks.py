"""The OCI hooks under plain runc."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.node import CLIPSHIM, Node
from tests.support.runtimes import Runtime, write_bundle

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose root has busybox and, as merged-/usr distributions, a link /bin."""
    rootfs = tmp_path / "bundle" / "files"
    for name in ("usr/bin", "proc", "dev", "sys"):
        (rootfs / name).mkdir(parents=True)
    shutil.copy("/usr/bin/busybox", rootfs / "usr/bin/busybox")
    (rootfs / "bin").symlink_to("usr/bin")
    return write_bundle(tmp_path / "bundle", ["/usr/bin/busybox", "echo", "ran"], rootfs=rootfs)


def _add_hooks(bundle: Path, checkout: Path, config: Path) -> None:
    document: dict[str, Any] = json.loads((bundle / "config.json").read_text())
    env = [f"CLIPSHIM={CLIPSHIM}", f"CLIPSHIM_CONFIG={config}", "PATH=/usr/bin:/bin"]
    document["hooks"] = {
        stage: [{"path": str(checkout / "runc-hooks" / name), "args": [name], "env": env}]
        for stage, name in (("createRuntime", "clipshim-verify"), ("poststop", "clipshim-cleanup"))
    }
    (bundle / "config.json").write_text(json.dumps(document))


def test_a_sound_root_starts(bundle: Path, tmp_path: Path, checkout: Path, run_root: Path) -> None:
    with Node(run_root / "hooks") as node, Runtime.runc(tmp_path / "root") as runc:
        _add_hooks(bundle, checkout, node.config)
        done = runc("run", "--bundle", bundle, "box")
        assert (done.stdout, done.stderr) == ("ran\n", "")


@pytest.mark.parametrize("damage", ["proc", "link"])
def test_a_root_that_is_not_fit_is_refused(
    damage: str, bundle: Path, tmp_path: Path, checkout: Path, run_root: Path
) -> None:
    rootfs = bundle / "files"
    if damage == "proc":
        (rootfs / "proc").rmdir()
        (rootfs / "proc").write_text("no directory")
        config = json.loads((bundle / "config.json").read_text())
        config["mounts"] = [mount for mount in config["mounts"] if mount["destination"] != "/proc"]
        config["linux"].pop("maskedPaths", None)
        config["linux"].pop("readonlyPaths", None)
        (bundle / "config.json").write_text(json.dumps(config))
    else:
        (rootfs / "lib").symlink_to("usr/lib")
    with Node(run_root / "hooks") as node, Runtime.runc(tmp_path / "root") as runc:
        _add_hooks(bundle, checkout, node.config)
        done = runc("run", "--bundle", bundle, "box", check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert ("/proc" if damage == "proc" else "/lib -> usr/lib") in done.stderr


def test_clean_up_of_what_nobody_deleted(tmp_path: Path, checkout: Path, run_root: Path) -> None:
    """The state that a lost `delete` leaves, taken down by the hook alone."""
    with Node(run_root / "hooks") as node:
        directory = node.run_dir / "box"
        (directory / "rootfs").mkdir(parents=True)
        (directory / "lock").touch()
        values = {"version": 1, "id": "box", "root": str(tmp_path), "kind": "own"}
        (directory / "state.json").write_text(json.dumps(values))
        (node.state_dir / "upper/box/written").mkdir(parents=True)
        runtime = Runtime.clipshim(tmp_path / "root", node)
        done = subprocess.run(
            [checkout / "runc-hooks/clipshim-cleanup"],
            input=json.dumps({"ociVersion": "1.0.2", "id": "box", "status": "stopped"}),
            env={**runtime.env, "CLIPSHIM": str(CLIPSHIM)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert (done.stdout, done.stderr) == ("", "")
        assert not directory.exists()
        assert not (node.state_dir / "upper/box").exists()

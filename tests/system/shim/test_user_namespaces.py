"""Containers whose root is an ordinary user of the host."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from clipshim.mounts import erofs
from clipshim.shim import state
from tests.support.skips import kernel_cannot
from tests.system.shim.containers import assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.node import Node
    from tests.support.runtimes import Runtime

FIRST = 100_000  # what the container's root is on the host
SCRIPT = (
    "id -u; stat -c %u:%g /bin/busybox /etc /etc/passwd; echo x >>/etc/passwd; echo y >/etc/new; "
    "rm -r /usr/share; stat -c %u:%g /etc/passwd /etc/new; ls -d /usr/share || echo gone"
)


def in_user_namespace(path: Path, top: Path, namespace: str = "") -> Path:
    """Gives a bundle a user namespace, and that one's root a way to the bundle."""
    config = json.loads((path / "config.json").read_text())
    mapping = [{"containerID": 0, "hostID": FIRST, "size": 65_536}]
    config["linux"].update(uidMappings=mapping, gidMappings=mapping)
    entry = {"type": "user", **({"path": namespace} if namespace else {})}
    config["linux"]["namespaces"].append(entry)
    kept = ("proc", "tmpfs", "devpts")  # others need a network namespace or more
    config["mounts"] = [mount for mount in config["mounts"] if mount["type"] in kept]
    (path / "config.json").write_text(json.dumps(config))
    for above in (path, *path.parents):
        if above == top:
            break
        os.chmod(above, above.stat().st_mode | 0o011)
    return path


@pytest.fixture
def namespace() -> Iterator[str]:
    """A user namespace with the same mappings, which a process keeps."""
    keeper = subprocess.Popen(
        ["unshare", "--user", "sh", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    try:
        assert keeper.stdout.readline() == b"ready\n"
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{keeper.pid}/{name}", "w") as file:
                file.write(f"0 {FIRST} 65536\n")
        yield f"/proc/{keeper.pid}/ns/user"
    finally:
        keeper.stdin.close()
        keeper.stdout.close()
        keeper.wait()


def test_the_images_files_are_the_containers(
    node: Node, runtime: Runtime, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    if reason := erofs.probe_erofs(str(tmp_path)):
        kernel_cannot(reason)
    path = in_user_namespace(bundle(["/bin/sh", "-c", SCRIPT]), runtime.root.parents[2])
    before = (path / "config.json").read_text()
    done = runtime("run", "-b", path, "box")
    assert done.stdout.split() == ["0", *["0:0"] * 5, "gone"], done
    assert (path / "config.json").read_text() == before
    runtime.quietly("create", "-b", path, "box")
    upper = node.state_dir / "upper" / state.container_key("box", str(runtime.root))
    assert upper.stat().st_uid == FIRST
    second = runtime("create", "-b", path, "other", check=False)
    assert second.returncode == 1
    assert "another container's rootfs" in second.stderr
    runtime("delete", "--force", "box")
    assert_clean(node)
    assert os.listdir(path / "rootfs") == []


def test_a_namespace_to_join(
    runtime: Runtime, bundle: Callable[..., Path], tmp_path: Path, namespace: str
) -> None:
    if reason := erofs.probe_erofs(str(tmp_path)):
        kernel_cannot(reason)
    made = bundle(["/bin/sh", "-c", SCRIPT])
    path = in_user_namespace(made, runtime.root.parents[2], namespace)
    done = runtime("run", "-b", path, "box")
    assert done.stdout.split() == ["0", *["0:0"] * 5, "gone"], done


def test_in_mode_fuse_the_images_files_can_be_read(
    make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    from tests.support.runtimes import Runtime

    node = make_node(mode="fuse")
    with Runtime.clipshim(tmp_path / "root", node) as runtime:
        script = "id -u; ls /bin/busybox"
        path = in_user_namespace(bundle(["/bin/sh", "-c", script]), tmp_path.parents[1])
        assert runtime("run", "-b", path, "box").stdout.split() == ["0", "/bin/busybox"]
    assert_clean(node)

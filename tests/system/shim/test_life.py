"""The life of containers that name an index, with the real daemon and runc."""

from __future__ import annotations

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from clipshim.mounts import erofs
from clipshim.shim import state
from tests.support import images, small_images
from tests.support.node import CLIPSHIM, Node, wait_for
from tests.support.runtimes import Runtime, write_bundle
from tests.support.skips import kernel_cannot
from tests.system.shim.containers import INDEX, LOOP, assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_a_life(node: Node, runtime: Runtime, bundle: Callable[..., Path]) -> None:
    path = bundle(LOOP)
    before = (path / "config.json").read_text()
    runtime.quietly("create", "--bundle", path, "box")
    assert runtime.status("box") == "created"
    runtime("start", "box")
    wait_for("it runs", lambda: runtime("exec", "box", "/bin/ls", "/ready", check=False).stdout)
    key = state.container_key("box", str(runtime.root))
    assert (node.state_dir / "upper" / key / "ready").read_text() == "ready\n"
    found = runtime("exec", "box", "/bin/stat", "-c", "%h %F", "/proc", "/usr").stdout.splitlines()
    assert all(int(line.split()[0]) >= 2 for line in found)
    again = runtime("create", "--bundle", path, "box", check=False)
    assert again.returncode == 1
    assert "exists" in again.stderr
    assert runtime("delete", "box", check=False).returncode == 1, "it is running"
    assert runtime.status("box") == "running"
    runtime("kill", "box", "TERM")
    wait_for("it stops", lambda: runtime.status("box") == "stopped")
    runtime("delete", "box")
    assert_clean(node)
    assert (path / "config.json").read_text() == before
    assert runtime("delete", "--force", "box").stderr == ""
    assert runtime("delete", "box", check=False).returncode == 1


def test_run_in_the_foreground(node: Node, runtime: Runtime, bundle: Callable[..., Path]) -> None:
    done = runtime(
        "run", "--bundle", bundle(["/bin/sh", "-c", "id -u; exit 9"]), "box", check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (9, "0\n", "")
    assert_clean(node)


def test_run_detached_and_kept(node: Node, runtime: Runtime, bundle: Callable[..., Path]) -> None:
    runtime.quietly("run", "--detach", "--bundle", bundle(LOOP, "one"), "one")
    runtime.quietly("run", "--keep", "--bundle", bundle(["/bin/true"], "two"), "two")
    assert (runtime.status("one"), runtime.status("two")) == ("running", "stopped")
    assert len(node.container_mounts()) == 2
    runtime("delete", "two")
    assert len(node.container_mounts()) == 1
    runtime("delete", "--force", "one")
    assert_clean(node)


def test_delete_from_elsewhere_ends_a_run_in_the_foreground(
    node: Node, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    words = runtime.command("run", "-b", bundle(LOOP), "box")
    running = subprocess.Popen(
        words, env=runtime.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    wait_for("it runs", lambda: runtime("exec", "box", "/bin/ls", "/ready", check=False).stdout)
    runtime("delete", "--force", "box")
    running.wait(timeout=60)
    wait_for("all is clean", lambda: not node.container_mounts())


def test_indexes_of_the_local_store(make_node: Callable[..., Node], tmp_path: Path) -> None:
    node = make_node()
    layout = f"oci:{images.tiny_image().layout}:{images.TAG}"
    node.clipshim("index", layout, "--embed", "--quiet")
    (clip,) = (node.state_dir / "indexes").glob("sha256-*.clip")
    digest = clip.stem.replace("-", ":")
    ordinary = tmp_path / "ordinary"
    for name in ("bin", "proc", "dev", "sys"):
        (ordinary / name).mkdir(parents=True)
    shutil.copy("/usr/bin/busybox", ordinary / "bin/sh")
    with Runtime.clipshim(tmp_path / "root", node) as runtime:
        for annotations, rootfs, expected in (
            ({"io.clipshim.index": digest}, None, "/etc/passwd"),
            ({"io.kubernetes.cri.image-name": "registry.invalid/other:1"}, ordinary, "bin"),
        ):
            path = write_bundle(
                tmp_path / "bundle",
                ["/bin/sh", "-c", "echo /etc/passwd* /bin"],
                annotations=annotations,
                rootfs=rootfs,
            )
            log = tmp_path / "log"
            done = runtime("--log", log, "run", "-b", path, "box")
            assert expected in done.stdout
            assert ("*" in done.stdout) == (rootfs is not None), "the ordinary root has no passwd"
            assert log.read_text() == ""
    assert_clean(node)


@pytest.mark.parametrize("mode", ["erofs", "fuse"])
def test_both_modes(
    mode: str, make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    if mode == "erofs" and (reason := erofs.probe_erofs(str(tmp_path))):
        kernel_cannot(reason)
    node = make_node(mode=mode)
    with Runtime.clipshim(tmp_path / "root", node) as runtime:
        path = bundle(["/bin/sh", "-c", "ls /bin/busybox; stat -c %h /proc /usr; echo x >/etc/new"])
        runtime.quietly("create", "-b", path, "box")
        key = state.container_key("box", str(runtime.root))
        recorded = json.loads((node.run_dir / key / "state.json").read_text())
        assert recorded["mode"] == mode
        runtime("delete", "--force", "box")
        done = runtime("run", "-b", path, "box")
        name, *links = done.stdout.split()
        assert name == "/bin/busybox"
        assert all(int(count) >= 2 for count in links)
    assert_clean(node)


def test_links_of_the_image_may_dangle_and_their_targets_go(
    node: Node, runtime: Runtime, tmp_path: Path
) -> None:
    """As in an engine: only what the image itself has must be there, and only at the start."""
    layers = [
        small_images.busybox_layer(tmp_path / "1.tar"),
        small_images.layer(
            tmp_path / "2.tar",
            {"vmlinuz": "boot/vmlinuz-6.1", "log": "/run/log", "self": "self", "data": "srv/data",
             "srv/": b"", "srv/data/": b""},
        ),
    ]  # fmt: skip
    made = small_images.image(tmp_path / "oci", layers)
    path = write_bundle(
        tmp_path / "bundle",
        ["/bin/sh", "-c", "ls -d /data/. && rmdir /srv/data"],
        annotations=INDEX,
    )
    node.clipshim("index", made.reference, path / "index.clip", "--embed", "--quiet")
    assert runtime("run", "-b", path, "box").stdout == "/data/.\n"
    assert_clean(node)


def test_fuse_overlayfs_when_configured(
    make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    node = make_node(overlay="fuse-overlayfs")
    with Runtime.clipshim(tmp_path / "root", node) as runtime:
        path = bundle(["/bin/sh", "-c", "echo new >/new; cat /new; id -u; ls /bin/busybox"])
        done = runtime("run", "-b", path, "box")
        assert done.stdout.split() == ["new", "0", "/bin/busybox"]
    assert_clean(node)


def test_the_tree_is_right_where_the_daemons_mounts_are_not_seen(
    make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    node = make_node()
    node.start()
    path = bundle(["/bin/ls", "/bin/busybox"])
    words = [CLIPSHIM, "--root", tmp_path / "root", "run", "-b", path, "box"]
    done = subprocess.run(  # what buildah does; the daemon mounts the tree only after this
        ["unshare", "--mount", "--propagation", "private", *map(str, words)],
        env=node.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "/bin/busybox\n", "")
    assert_clean(node)


def test_many_at_once_start_one_daemon(
    make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    node = make_node()
    paths = [bundle(["/bin/echo", f"number {i}"], f"b{i}") for i in range(12)]
    with Runtime.clipshim(tmp_path / "root", node) as runtime:

        def run(number: int) -> str:
            return runtime("run", "-b", paths[number], f"box{number}").stdout

        with ThreadPoolExecutor(len(paths)) as pool:
            assert list(pool.map(run, range(len(paths)))) == [
                f"number {number}\n" for number in range(len(paths))
            ]
    assert_clean(node)


def test_directories_too_deep_for_the_descriptors_there_are(
    node: Node, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    script = (
        "cd /; mkdir .clipshim-0 .clipshim-1; touch .clipshim-0/x .clipshim-2; i=0; "
        "while [ $i -lt 400 ]; do mkdir d e; touch f e/g; cd d || break; i=$((i+1)); done; echo $i"
    )
    words = runtime.command("run", "-b", bundle(["/bin/sh", "-c", script]), "box")
    done = subprocess.run(
        ["bash", "-c", 'ulimit -Sn 256; exec "$@"', "bash", *map(str, words)],
        env=runtime.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "400\n", "")
    assert_clean(node)

"""checkpoint and restore, with a runtime that plays CRIU: it only keeps its state directory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from clipshim.shim import state
from tests.support.node import CLIPSHIM, Node, wait_for
from tests.support.runtimes import Runtime
from tests.system.shim.containers import LOOP, assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


FAKE_RUNTIME = """#!/bin/sh
root=$2; shift 2
verb=$1; shift
for id; do :; done
case "$verb $*" in
    create*|restore*) mkdir -p "$root/$id" ;;
    "checkpoint --leave-running"*) ;;
    run*) mkdir -p "$root/$id"; while [ -d "$root/$id" ]; do sleep 0.1; done ;;
    checkpoint*) rmdir "$root/$id"
        [ ! -e "$root.hook" ] || echo "{\\"id\\": \\"$id\\"}" | "$root.hook" hook cleanup ;;
    delete*) rmdir "$root/$id" ;;
esac
"""


def test_checkpoint_keeps_what_restore_needs(
    make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    """With a runtime that plays CRIU: it only keeps its state directory as runc does."""
    fake = tmp_path / "fake-runtime"
    fake.write_text(FAKE_RUNTIME)
    fake.chmod(0o755)
    node = make_node(runtimes=[str(fake)])
    path = bundle(LOOP)
    with Runtime.clipshim(tmp_path / "root", node) as runtime:
        key = state.container_key("box", str(runtime.root))
        upper = node.state_dir / "upper" / key
        runtime("create", "-b", path, "box")
        (upper / "written").write_text("x")
        runtime("checkpoint", "--leave-running", "box")
        assert node.container_mounts() != []
        runtime("checkpoint", "box")
        assert node.container_mounts() == []
        assert (upper / "written").exists()
        runtime("restore", "-b", path, "box")
        assert (node.run_dir / key / "rootfs" / "written").read_text() == "x"
        assert (node.run_dir / key / "rootfs" / "bin/busybox").exists()
        runtime("delete", "box")
        assert_clean(node)
        runtime("create", "-b", path, "box")
        runtime("checkpoint", "box")
        runtime("delete", "--force", "box", check=False)
        assert_clean(node)


def test_a_checkpoint_outlives_hooks_and_the_run_in_the_foreground(
    make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    """runc runs the poststop hooks before its checkpoint returns."""
    fake = tmp_path / "fake-runtime"
    fake.write_text(FAKE_RUNTIME)
    fake.chmod(0o755)
    node = make_node(runtimes=[str(fake)])
    path = bundle(LOOP)
    with Runtime.clipshim(tmp_path / "root", node) as runtime, ThreadPoolExecutor() as pool:
        (tmp_path / "root.hook").symlink_to(CLIPSHIM)
        key = state.container_key("box", str(runtime.root))
        written = node.state_dir / "upper" / key / "written"
        runtime("create", "-b", path, "box")
        written.write_text("x")
        runtime("checkpoint", "box")
        assert node.container_mounts() == []
        assert written.exists()
        runtime("delete", "--force", "box", check=False)
        assert_clean(node)
        (tmp_path / "root.hook").unlink()
        running = pool.submit(runtime, "run", "-b", path, "box")
        wait_for("it runs", (runtime.root / "box").exists)
        written.write_text("x")
        runtime("checkpoint", "box")
        running.result(120)
        assert node.container_mounts() == []
        assert written.exists()
        runtime("delete", "--force", "box", check=False)
        assert_clean(node)

"""What cannot be started is one clear error and leaves nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.node import Node, wait_for
from tests.support.runtimes import Runtime, write_bundle
from tests.system.shim.containers import INDEX, LOOP, assert_clean, error_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_a_failed_create_leaves_nothing(
    node: Node, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    path = bundle(["/nowhere"])
    before = (path / "config.json").read_text()
    log = path / "log.json"
    done = runtime(
        "--log", log, "--log-format", "json", "create", "-b", path, "box", check=False
    )  # fmt: skip
    assert done.returncode == 1
    assert "/nowhere" in error_of(log)
    assert done.stdout == ""
    assert_clean(node)
    assert (path / "config.json").read_text() == before


REFUSING_RUNTIME = """#!/bin/sh
while [ "$1" != create ]; do
    [ "$1" = --log ] && log=$2
    shift
done
echo "$SAID" >>"$log"
echo "$SAID" >&2
exit 1
"""


def test_deleted_directories_are_counted(
    make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    """With a runtime that says what runc says of a mount target without links."""
    fake = tmp_path / "fake-runtime"
    fake.write_text(REFUSING_RUNTIME)
    fake.chmod(0o755)
    node = make_node(runtimes=[str(fake)])
    log = tmp_path / "log"
    with Runtime.clipshim(tmp_path / "root", node) as runtime:
        for said in ("/proc wandered into deleted directory", "something else"):
            runtime.env = {**node.env, "SAID": said}
            done = runtime("--log", log, "create", "-b", bundle(LOOP), "box", check=False)
            assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{said}\n")
        assert log.read_text().count("deleted directory") == 1

        def counted() -> bool:  # the shim does not wait for the daemon to count
            text = str(node.call("metrics")["text"])
            return 'cause="DeletedDirectory"' in text and 'cause="RuntimeFailed"' in text

        wait_for("the failures are counted", counted)
        assert "clipshim_deleted_directory_total 1.0" in node.call("metrics")["text"]
    assert_clean(node)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("missing.clip", "no such file"),
        ("../index.clip", "expected a digest"),
        ("", "expected a digest"),
        ("/etc/passwd", "index_dirs"),
        ("sha256:" + "0" * 64, "0000"),
        ("sha256:../../etc/passwd", "sha256"),
        ("link.clip", "cannot be opened beneath"),
        ("fifo.clip", "expected a regular file"),
        ("directory.clip", "expected a regular file"),
        ("garbage.clip", "garbage.clip"),
    ],
)
def test_a_bad_index_is_one_clear_error(
    annotation: str, message: str, node: Node, runtime: Runtime, tmp_path: Path, tiny_clip: Path
) -> None:
    path = write_bundle(
        tmp_path / "bundle", ["/bin/true"], annotations={"io.clipshim.index": annotation}
    )
    (path / "link.clip").symlink_to(tiny_clip)
    os.mkfifo(path / "fifo.clip")
    (path / "directory.clip").mkdir()
    (path / "garbage.clip").write_bytes(b"garbage" * 1000)
    log = tmp_path / "log.json"
    for verb in ("create", "run"):
        log.unlink(missing_ok=True)
        done = runtime("--log", log, "--log-format", "json", verb, "-b", path, "box", check=False)
        assert done.returncode == 1
        assert done.stdout == ""
        assert message in error_of(log) or message == "garbage.clip"
        assert error_of(log) in done.stderr
    assert_clean(node)


def test_a_runtime_that_is_missing(make_node: Callable[..., Node], tmp_path: Path) -> None:
    node = make_node(runtimes=["no-such-runtime"])
    log = tmp_path / "log.json"
    for arguments in (["state", "x"], ["--version"], ["run", "x"], ["delete", "--force", "x"]):
        log.unlink(missing_ok=True)
        done = node.clipshim("--log", log, "--log-format", "json", *arguments, check=False)
        assert done.returncode == 1
        assert "no-such-runtime" in error_of(log)


def test_state_on_tmpfs_is_refused(
    make_node: Callable[..., Node], tmp_path: Path, tiny_clip: Path, run_root: Path
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", memory], check=True)
    try:
        node = make_node(state_dir=str(memory / "state"))
        path = write_bundle(tmp_path / "bundle", ["/bin/true"], annotations=INDEX)
        shutil.copy(tiny_clip, path / "index.clip")
        with Runtime.clipshim(tmp_path / "root", node) as runtime:
            done = runtime("run", "-b", path, "box", check=False)
        assert done.returncode == 1
        assert "tmpfs" in done.stderr
        node.stop()
    finally:
        subprocess.run(["umount", "-l", memory], check=True)

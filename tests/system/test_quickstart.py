"""integration/quickstart.sh in a prefix of its own, with nothing installed and nothing left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.images import debian_root
from tests.support.node import wait_for

if TYPE_CHECKING:
    from tests.support.node import Node

SCRIPT = Path(__file__).resolve().parents[2] / "integration" / "quickstart.sh"
VENV = Path(sys.executable).parents[1]


def quickstart(node: Node, *arguments: str, code: int = 0, **environment: str) -> str:
    """What the script prints."""
    done = subprocess.run(
        [SCRIPT, *arguments],
        env={
            **node.env,
            "CLIPSHIM_DEMO_PREFIX": str(node.directory / "prefix"),
            "CLIPSHIM_DEMO_VENV": str(VENV),
            "CLIPSHIM_DEMO_ROOT": str(debian_root()),
            **environment,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == code, done.stdout + node.log_tail()
    return done.stdout


def test_without_an_image_it_shows_a_lazy_start_and_can_be_repeated(node: Node) -> None:
    for _ in range(2):
        text = quickstart(node)
        assert '"python": "3.' in text
        assert "/proc and /usr are sound" in text
        assert "fetched:" in text
        assert node.container_mounts() == []
        assert not (node.directory / "prefix/var/cache/clipshim-demo/bundle").exists()
    node.clipshim("daemon", "--stop")
    wait_for("daemon and registry have ended", lambda: not node.processes())
    quickstart(node, "--clean")
    assert not (node.directory / "prefix/var/cache/clipshim-demo").exists()


def test_without_debootstrap_the_packages_of_the_machine_do(node: Node) -> None:
    text = quickstart(node, CLIPSHIM_DEMO_ROOT="", CLIPSHIM_DEMO_MIRROR="none")
    assert "taking the packages of this machine" in text
    assert '"python": "3.' in text


def test_with_an_image_it_runs_that(node: Node, debian_reference: str) -> None:
    text = quickstart(node, debian_reference, "--", "python3", "-c", "print(6 * 7)")
    assert "\n42\n" in text


def test_what_it_measures_is_true_with_another_coreutils(
    node: Node, debian_reference: str, tmp_path: Path
) -> None:
    """Ubuntu 26.04's `date` prints all of the nanoseconds, however many digits one asks for."""
    (tmp_path / "date").write_text('#!/bin/bash\nexec /usr/bin/date "${@//%3N/%N}"\n')
    (tmp_path / "date").chmod(0o755)
    begin = time.monotonic()
    text = quickstart(node, debian_reference, PATH=f"{tmp_path}:{os.environ['PATH']}")
    elapsed_ms = (time.monotonic() - begin) * 1000
    shown = re.findall(r"^(?:index|bundle|run|run again) +(-?\d+) ms", text, re.MULTILINE)
    assert len(shown) == 4
    assert all(int(ms) >= 0 for ms in shown)
    assert sum(map(int, shown)) <= elapsed_ms + 10


def test_a_missing_image_is_an_error_that_leaves_nothing_running(node: Node) -> None:
    text = quickstart(node, "127.0.0.1:1/no/such:1", code=1)
    assert "clipshim: error: " in text
    assert node.container_mounts() == []


def test_an_unknown_option_is_refused(node: Node) -> None:
    assert "--help" in quickstart(node, "--no-such", code=2)
    assert "sudo ./integration/quickstart.sh" in quickstart(node, "--help")

"""The guard that system tests run the server under: it must see what it is there to see."""

from __future__ import annotations

import subprocess
import sys

import pytest

from clipshim.node.self_access import MARK, is_own
from clipshim.settings import Settings

SETTINGS = Settings({"run_dir": "/r", "state_dir": "/s"})


@pytest.mark.parametrize(
    ("path", "own"),
    [
        ("/r/layers", True),
        (b"/r/layers/abc", True),
        ("/r/./layers/", True),
        ("/s/mnts/i/ro", True),
        ("/s/mnts/i/ro/etc", True),
        ("/r/layers2", False),
        ("/r/c1/state.json", False),
        ("/s/mnts", False),
        ("/s/mnts/i", False),
        ("/s/layers/k/data", False),
        (7, False),
        (None, False),
    ],
)
def test_what_counts_as_the_servers_own_mounts(path: object, own: bool) -> None:
    assert is_own(path, SETTINGS) is own


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("os.stat('/r/layers')", True),
        ("os.path.exists('/r/layers/x')", True),
        ("os.path.lexists('/r/layers/x')", True),
        ("os.path.isdir('/s/mnts/i/ro')", True),
        ("pathlib.Path('/r/layers').exists()", True),
        ("os.statvfs('/r/layers')", True),
        ("os.listdir('/r/layers')", True),
        ("os.scandir('/s/mnts/i/ro')", True),
        ("open('/r/layers/x')", True),
        ("os.open('/r/layers/x', 0)", True),
        ("os.path.exists('/r/other'); os.listdir('/'); os.stat(0)", False),
    ],
)
def test_accesses_are_refused(code: str, refused: bool) -> None:
    program = (
        "import os, pathlib\n"
        "from clipshim.node.self_access import forbid\n"
        "from clipshim.settings import Settings\n"
        "forbid(Settings({'run_dir': '/r', 'state_dir': '/s'}))\n"
        f"{code}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) is refused, done.stderr
    assert (MARK in done.stderr) is refused

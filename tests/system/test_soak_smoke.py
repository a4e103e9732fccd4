"""A few seconds of the long test, so that it is known to work when it is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def test_a_short_soak_finds_nothing(checkout: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-B", checkout / "tests/support/soak.py"),
            *("--minutes", "0.15", "--seed", "7", "--readers", "20", "--containers", "3"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout
    assert re.search(r"^0 failures", done.stdout, re.MULTILINE), done.stdout
    compared = re.search(r"^files compared: (\d+)", done.stdout, re.MULTILINE)
    assert compared, done.stdout
    assert int(compared[1]) > 0, done.stdout

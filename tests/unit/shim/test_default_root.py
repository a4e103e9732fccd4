"""Where low-level runtimes keep their state if nobody says so, as they themselves see it."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from clipshim.shim import state
from tests.support.programs import program

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_crun_heeds_the_sessions_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crun = program("/usr/bin/crun")
    env = {"PATH": "/usr/bin", "XDG_RUNTIME_DIR": str(tmp_path)}
    subprocess.run([crun, "list"], env=env, stdout=subprocess.DEVNULL, check=True)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert state.default_root(str(crun)) == str(next(tmp_path.iterdir()))
    assert state.default_root("/usr/sbin/runc") == "/run/runc"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert state.default_root(str(crun)) == "/run/crun"

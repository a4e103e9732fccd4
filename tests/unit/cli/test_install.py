"""`clipshim install` and `uninstall` on files: back-up, dry run, the way back to the byte."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from clipshim.cli.app import main
from clipshim.cli.engine_files import FACTS, Engine
from tests.unit.cli.test_engine_config import CONTAINERD_V2, CONTAINERD_V3, DOCKER, PODMAN

if TYPE_CHECKING:
    from pathlib import Path

RUNTIME = "/opt/clipshim/bin/clipshim"
SAMPLES = [
    (Engine.DOCKER, DOCKER),
    (Engine.CONTAINERD, CONTAINERD_V2),
    (Engine.CONTAINERD, CONTAINERD_V3),
    (Engine.PODMAN, PODMAN),
    (Engine.DOCKER, None),
    (Engine.CONTAINERD, None),
    (Engine.PODMAN, None),
    (Engine.CRIO, None),
]


def run(verb: str, engine: Engine, root: Path, *more: str) -> int:
    runtime = ["--runtime", RUNTIME] if verb == "install" else []
    return main([verb, engine.value, "--root", str(root), *runtime, *more])


def config_of(engine: Engine, root: Path) -> Path:
    return root / FACTS[engine].path.lstrip("/")


@pytest.mark.parametrize(("engine", "before"), SAMPLES)
def test_uninstall_restores_the_file_to_the_byte(
    engine: Engine, before: str | None, tmp_path: Path
) -> None:
    path = config_of(engine, tmp_path)
    if before is not None:
        path.parent.mkdir(parents=True)
        path.write_text(before)
        path.chmod(0o640)
    assert run("install", engine, tmp_path) == 0
    assert RUNTIME in path.read_text()
    if before is not None:
        assert path.stat().st_mode & 0o777 == 0o640
    installed = path.read_text()
    assert run("install", engine, tmp_path) == 0
    assert path.read_text() == installed
    assert run("uninstall", engine, tmp_path) == 0
    if before is None:
        assert not path.exists()
    else:
        assert path.read_text() == before
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p != path] == []
    assert run("uninstall", engine, tmp_path) == 0


def test_what_changed_since_is_kept_by_uninstall(tmp_path: Path) -> None:
    path = config_of(Engine.DOCKER, tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(DOCKER)
    assert run("install", Engine.DOCKER, tmp_path) == 0
    document = json.loads(path.read_text())
    document["live-restore"] = True
    path.write_text(json.dumps(document))
    assert run("uninstall", Engine.DOCKER, tmp_path) == 0
    after = json.loads(path.read_text())
    assert after["live-restore"] is True
    assert list(after["runtimes"]) == ["nvidia"]


def test_a_dry_run_shows_the_difference_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("install", Engine.DOCKER, tmp_path, "--dry-run") == 0
    assert f'+            "path": "{RUNTIME}"' in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_install_says_what_to_restart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("install", Engine.CONTAINERD, tmp_path) == 0
    assert "systemctl restart containerd" in capsys.readouterr().err


def test_a_file_that_cannot_be_understood_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_of(Engine.DOCKER, tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text("{ not json")
    assert run("install", Engine.DOCKER, tmp_path) == 1
    assert str(path) in capsys.readouterr().err
    assert path.read_text() == "{ not json"
    assert os.listdir(path.parent) == [path.name]


def test_a_relative_runtime_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["install", "docker", "--root", str(tmp_path), "--runtime", "clipshim"]
    assert main(arguments) == 1
    assert "absolute path" in capsys.readouterr().err

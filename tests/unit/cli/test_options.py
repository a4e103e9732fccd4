"""From options to values: sizes, registry access, what the doctor and status print."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from clipshim.cli import doctor_checks
from clipshim.cli.access import registry_access
from clipshim.cli.doctor_checks import Level
from clipshim.cli.index_command import parse_size
from clipshim.cli.status_command import show
from clipshim.errors import BadReferenceError, UsageError
from clipshim.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "size"),
    [("512k", 512 << 10), ("1M", 1 << 20), ("1MiB", 1 << 20), ("2GB", 2 << 30), ("65536", 65536)],
)
def test_sizes_are_written_in_the_usual_ways(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "-1k", "1.5M", "1kk", "1 T"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="512k"):
        parse_size(text)


def test_access_takes_what_the_command_line_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("secret\n"))
    access = registry_access(
        Settings({"plain_http": ["a.example"]}), "b.example/app:1",
        plain_http=True, insecure=True, username="me", password_stdin=True,
    )  # fmt: skip
    assert access.plain_http == {"a.example", "b.example"}
    assert (access.username, access.password, access.insecure) == ("me", "secret", True)


def test_plain_http_for_a_command_is_not_plain_http_for_the_daemon(
    capsys: pytest.CaptureFixture[str],
) -> None:
    registry_access(Settings(), "b.example/app:1", plain_http=True)
    assert "add b.example to plain_http" in capsys.readouterr().err
    registry_access(Settings(), "localhost:5000/app:1", plain_http=True)
    assert capsys.readouterr().err == ""


def test_wrong_registry_options_are_usage_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings()
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(UsageError, match="together"):
        registry_access(settings, "a.example/app", password_stdin=True)
    with pytest.raises(UsageError, match="password on stdin"):
        registry_access(settings, "a.example/app", username="me", password_stdin=True)
    with pytest.raises(UsageError, match="no such file"):
        registry_access(settings, "a.example/app", ca_file=tmp_path / "no.pem")
    with pytest.raises(BadReferenceError):
        registry_access(settings, str(tmp_path))


def test_a_missing_fuse_device_is_found(tmp_path: Path) -> None:
    (finding,) = doctor_checks.check_fuse(str(tmp_path / "fuse"))
    assert finding.level is Level.BROKEN
    assert "modprobe" in (finding.remedy or "")


def test_orphaned_directories_are_found(tmp_path: Path) -> None:
    settings = Settings({"state_dir": str(tmp_path / "s"), "run_dir": str(tmp_path / "r")})
    (tmp_path / "s/upper/gone").mkdir(parents=True)
    (finding,) = doctor_checks.check_orphans(settings)
    assert (finding.level, finding.remedy) == (Level.NOTE, "clipshim gc")
    (tmp_path / "r/gone").mkdir(parents=True)
    (tmp_path / "r/gone/state.json").write_text("{}")
    (finding,) = doctor_checks.check_orphans(settings)
    assert finding.level is Level.OK


def test_directories_that_others_can_write_to_are_found(tmp_path: Path) -> None:
    settings = Settings({"state_dir": str(tmp_path / "s"), "run_dir": str(tmp_path / "r")})
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(0o777)
    broken = [f for f in doctor_checks.check_directories(settings) if f.level is Level.BROKEN]
    assert len(broken) == 1
    assert "others could write" in broken[0].message


def test_status_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    show(
        {
            "pid": 7,
            "start_time": 1_700_000_000,
            "cache": {"used_bytes": 83_100_000, "full": False},
            "images": [{"image_id": "0123456789abcdef", "size": 1000, "containers": 2}],
            "containers": [],
        }
    )
    text = capsys.readouterr().out
    assert "2023-11-14 22:13:20Z" in text
    assert "cache used: 83.1 MB" in text
    assert "cache full: no" in text
    assert "0123456789ab  1 kB" in text
    assert "containers: none" in text

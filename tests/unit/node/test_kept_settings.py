"""The configuration of a running daemon, whatever becomes of the file."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from clipshim.errors import ConfigError
from clipshim.node import kept_settings
from clipshim.node.kept_settings import KEPT_ENV, keep, settings_of_daemon
from clipshim.settings import CONFIG_ENV

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(f'run_dir = "{tmp_path}/run"\nstate_dir = "{tmp_path}/state"\n')
    monkeypatch.setenv(CONFIG_ENV, str(path))
    monkeypatch.setenv(KEPT_ENV, "")
    monkeypatch.setattr(kept_settings, "configure", lambda *_: None)
    return path


def test_a_file_that_became_bad_is_as_if_it_had_not_changed(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep(settings_of_daemon(fresh=True))
    config.write_text("linger_s = ")
    with caplog.at_level(logging.ERROR):
        assert settings_of_daemon().run_dir == f"{tmp_path}/run"
    assert "going on with what was read before" in caplog.text
    config.unlink()
    assert settings_of_daemon().state_dir == f"{tmp_path}/state"


def test_what_may_change_changes_and_where_state_lies_does_not(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep(settings_of_daemon(fresh=True))
    config.write_text('run_dir = "/a"\nstate_dir = "/b"\nlinger_s = 7\n')
    with caplog.at_level(logging.ERROR):
        settings = settings_of_daemon()
    assert (settings.run_dir, settings.state_dir) == (f"{tmp_path}/run", f"{tmp_path}/state")
    assert settings.linger_s == 7.0
    assert caplog.text.count("cannot be changed") == 2


def test_a_new_daemon_inherits_nothing(config: Path) -> None:
    keep(settings_of_daemon(fresh=True))
    config.write_text("linger_s = ")
    with pytest.raises(ConfigError):
        settings_of_daemon(fresh=True)
    with pytest.raises(ConfigError):
        settings_of_daemon()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"path": "/x"}', '{"path": "/x", "values": {"run_dir": 5}}'],
)
def test_what_was_handed_down_damaged_counts_as_nothing(
    config: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(KEPT_ENV, text)
    config.write_text("linger_s = ")
    with pytest.raises(ConfigError):
        settings_of_daemon()


def test_another_version_may_know_other_keys(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        KEPT_ENV, f'{{"path": "/x", "values": {{"run_dir": "{tmp_path}", "new_key": 5}}}}'
    )
    config.write_text("linger_s = ")
    assert settings_of_daemon().run_dir == str(tmp_path)

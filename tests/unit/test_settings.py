"""The configuration file: defaults, every check, and errors that name file and key."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipshim import settings as settings_module
from clipshim.errors import ConfigError
from clipshim.settings import CHOICES, DEFAULTS, Settings, load_settings

if TYPE_CHECKING:
    from pathlib import Path


def test_defaults_pass_their_own_checks() -> None:
    values = {key: default for key, (default, _) in DEFAULTS.items()}

    settings = Settings(values)

    assert {key: getattr(settings, key) for key in DEFAULTS} == values


def test_every_choice_has_its_default_among_it() -> None:
    assert all(DEFAULTS[key][0] in choices for key, choices in CHOICES.items())


def test_a_changed_list_does_not_change_the_default() -> None:
    Settings().runtimes.append("other")

    assert Settings().runtimes == ["runc", "crun"]


def test_paths_follow_from_the_directories() -> None:
    settings = Settings({"state_dir": "/s/", "run_dir": "/r"})

    assert settings.daemon_socket == "/r/daemon.sock"
    assert settings.layers_mount == "/r/layers"
    assert settings.upper_dir("c") == "/s/upper/c"
    assert settings.work_dir("c") == "/s/work/c"
    assert settings.container_dir("c") == "/r/c"
    assert settings.tree_mount("i") == "/s/mnts/i/ro"
    assert settings.index_store == "/s/indexes"
    assert settings.layer_store == "/s/layers"


def test_a_file_overrides_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('mode = "fuse"\ncache_bytes = 10\nlinger_s = 3\n')

    settings = load_settings(str(file))

    assert (settings.mode, settings.cache_bytes, settings.linger_s) == ("fuse", 10, 3.0)
    assert isinstance(settings.linger_s, float)
    assert settings.overlay == "kernel"
    assert settings.path == str(file)


def test_the_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.toml"
    file.write_text('mode = "erofs"\n')
    monkeypatch.setenv("CLIPSHIM_CONFIG", str(file))

    assert load_settings().mode == "erofs"


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_settings(str(tmp_path / "missing.toml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mood = 1", "unknown key 'mood'"),
        ("mode = 1", "mode: expected a string, got 1"),
        ('mode = "ext4"', "mode: expected one of auto, erofs, fuse, got 'ext4'"),
        ("cache_bytes = -1", "cache_bytes: expected a number of 0 or more"),
        ("cache_bytes = true", "cache_bytes: expected a number of 0 or more"),
        ("cache_bytes = 1.5", "cache_bytes: expected a whole number"),
        ('runtimes = "runc"', "runtimes: expected a list of strings"),
        ("runtimes = [1]", "runtimes: expected a list of strings"),
        ('index_on_demand = "yes"', "index_on_demand: expected true or false"),
        ('state_dir = "clip"', "state_dir: expected an absolute path"),
        (f'run_dir = "/{"x" * 90}"', "run_dir: expected at most 90 bytes"),
        ("mode = ", "Invalid value"),
    ],
)
def test_a_wrong_file_is_an_error_with_file_and_key(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)

    with pytest.raises(ConfigError) as caught:
        load_settings(str(file))

    assert str(file) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        'run_dir = "/a"\nlinger_s = 5 \n# note\n\nindex_on_demand = true\n',
        'runtimes = ["runc", "/usr/bin/crun"]\r\nplain_http=[]\nindex_dirs = ["/a",]\n',
        'runtimes = [\n  "runc",\n]\nmode = "fuse" # note\n',
        'run_dir = "/a\\u0041"\nlinger_s = 1.5\ncache_bytes = 1_000\n',
        "mode = 'fuse'\n",
        'runtimes = ["a,b"]\nindex_dirs = ["/x", "/y"]\n',
        'metrics_address = ""\n',
    ],
)
def test_the_quick_reader_agrees_with_a_toml_parser(text: str) -> None:
    quick = settings_module._read_flat(text)
    assert quick is None or quick == tomllib.loads(text)


@given(st.text(alphabet="mode=\"[]#, \n\\'0a1", max_size=24))
def test_the_quick_reader_accepts_nothing_that_is_not_toml(text: str) -> None:
    quick = settings_module._read_flat(f"mode = {text}")
    if quick is not None:
        assert quick == tomllib.loads(f"mode = {text}")

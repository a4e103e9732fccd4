"""The command line as a whole: help, errors, exit codes, what is imported."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from clipshim.cli import app, terminal
from clipshim.errors import NotFoundError

if TYPE_CHECKING:
    from pathlib import Path


def test_every_command_has_a_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name in app.COMMANDS:
        assert app.main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"clipshim {name}" in text.split("Options:")[0].replace("Usage: ", "", 1), name
        assert "--debug" in text


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"]])
def test_help_lists_all_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(arguments) == 0
    text = capsys.readouterr().out
    for name in app.COMMANDS:
        assert f"  {name} " in text


def test_help_of_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["help", "bundle"]) == 0
    assert "IMAGE|INDEX" in capsys.readouterr().out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("clipshim ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["instal", "docker"], "did you mean `clipshim install`?"),
        (["install"], "clipshim install --help"),
        (["install", "rkt"], "clipshim install --help"),
        (["index", "x", "--no-such-option"], "clipshim index --help"),
        (["install", "docker", "--log-level", "loud"], "expected one of debug"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("clipshim: error: ")
    assert message in captured.err


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipshim.cli import engine_files

    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(engine_files, "plan_install", broken)
    from clipshim.cli import install_command

    monkeypatch.setattr(install_command, "plan_install", broken)


def test_an_error_is_two_lines_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(NotFoundError("image a: no index", hint="make one"), monkeypatch)
    assert app.main(["install", "docker"]) == 1
    assert capsys.readouterr().err == "clipshim: error: image a: no index\nhint: make one\n"


def test_an_unexpected_error_shows_no_traceback_unless_asked_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(ZeroDivisionError("division by zero"), monkeypatch)
    assert app.main(["install", "docker"]) == 1
    text = capsys.readouterr().err
    assert "internal error: ZeroDivisionError" in text
    assert "Traceback" not in text
    assert app.main(["install", "docker", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert app.main(["install", "docker"]) == 130


def test_a_command_loads_only_its_own_module() -> None:
    code = (
        "import sys; from clipshim.cli.app import main; main(['install', '--help']);"
        "print('\\n'.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(done.stdout.split())
    assert "clipshim.cli.install_command" in loaded
    assert not loaded & {"clipshim.cli.index_command", "clipshim.cli.doctor_checks", "trio", "oras"}


def test_names_from_images_cannot_steer_the_terminal() -> None:
    assert terminal.printable("\x1b[31mred\r\n") == "\\x1b[31mred\\r\\n"
    assert terminal.printable(b"\xff\x07") == "\\xff\\x07"
    assert terminal.printable("größe") == "größe"


def test_tables_align_and_do_not_wrap(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table(("name", "size"), [("a" * 200, 1), ("b", 1000)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "NAME" + " " * 198 + "SIZE"
    assert lines[2].endswith("1000")
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (83_100_000, "83.1 MB")]
)
def test_sizes_are_for_people(size: int, text: str) -> None:
    assert terminal.human_size(size) == text


def test_commands_run_as_a_module_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clipshim.cli", "--version"],
        capture_output=True, text=True, check=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.startswith("clipshim ")

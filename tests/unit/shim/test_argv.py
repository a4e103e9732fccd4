"""The command line parser, by examples and against the launcher's own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipshim.shim import argv

CHECKOUT = Path(__file__).resolve().parents[3]
WORDS = [
    *(f"--{name}" for name in sorted(argv.GLOBAL_VALUES | argv.GLOBAL_SWITCHES)),
    *(f"-{name}=x" for name in sorted(argv.GLOBAL_VALUES)),
    "--debug=true",
    "--",
    "-",
    "---x",
    "-=",
    "--bogus",
    "-b",
    "create",
    "run",
    "state",
    "delete",
    "box",
    "",
]


@pytest.mark.parametrize(
    ("words", "verb", "container", "options", "switches"),
    [
        (["create", "box"], "create", "box", {}, set()),
        (
            ["--root", "/r", "--log=/l", "create", "--bundle", "/b", "box"],
            "create",
            "box",
            {"root": "/r", "log": "/l", "bundle": "/b"},
            set(),
        ),
        (["-log-format", "json", "delete", "-f", "box"], "delete", "box", {"log-format": "json"},
         {"force"}),
        (["run", "box", "-b", "/b", "--detach"], "run", "box", {"bundle": "/b"}, {"detach"}),
        (["run", "--keep=false", "-d=1", "--", "-box"], "run", "-box", {}, {"detach"}),
        (["create", "--bundle=/a", "--bundle=/b", "box"], "create", "box", {"bundle": "/b"}, set()),
        (["create", "--root", "/late", "box"], "create", "box", {"root": "/late"}, set()),
        (["--systemd-cgroup", "restore", "--image-path=-x", "box"], "restore", "box",
         {"image-path": "-x"}, {"systemd-cgroup"}),
    ],
)  # fmt: skip
def test_words_are_understood(
    words: list[str], verb: str, container: str, options: dict[str, str], switches: set[str]
) -> None:
    line = argv.parse(words)
    assert line.understood
    assert (line.verb, line.container_id) == (verb, container)
    assert (line.options, line.switches) == (options, switches)


@pytest.mark.parametrize(
    "words",
    [
        ["create"],
        ["create", "a", "b"],
        ["create", "--bogus", "a"],
        ["create", "--bundle"],
        ["delete", "--force=perhaps", "a"],
        ["--bogus", "create", "a"],
        ["--root"],
        ["run", "-d", "a", "--bundle", "b"],  # runc 1.1 takes --bundle for a second container
        ["run", "---x", "a"],
    ],
)
def test_what_runc_refuses_is_not_understood(words: list[str]) -> None:
    assert not argv.parse(words).understood


def test_verbs_of_runc_are_found_but_not_parsed() -> None:
    line = argv.parse(["--debug", "exec", "--bogus", "a", "ls", "-l"])
    assert (line.verb, line.verb_index, line.container_id) == ("exec", 1, "")
    assert line.understood


@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=4)), max_size=8))
def test_no_line_makes_the_parser_fail(words: list[str]) -> None:
    line = argv.parse(words)
    assert line.verb_index < len(words)
    if line.verb:
        assert words[line.verb_index] == line.verb


@given(st.lists(st.sampled_from(WORDS), max_size=8))
def test_reordering_keeps_every_word(words: list[str]) -> None:
    flags = argv.OUR_VERBS["run"][0] | argv.OUR_VERBS["run"][1]
    assert sorted(argv.reordered(words, flags)) == sorted(words)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "the tests need a C compiler, as the installation does"
    program = tmp_path_factory.mktemp("launcher") / "launcher"
    source = CHECKOUT / "clipshim/shim/launcher.c"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-DCLIPSHIM_LAUNCHER_TEST"]
    subprocess.run([compiler, *flags, "-o", program, source], check=True)
    return program


def _expected(words: list[str]) -> str:
    line = argv.parse(words)
    asked = line.switches & {"help", "version"}
    if line.verb_index >= 0 and not asked:
        return f"{line.verb} {line.verb_index}"
    if not line.understood or line.verb_index >= 0:
        return "-unknown"
    return "-help" if "help" in asked else "-version" if asked else "-nothing"


def test_the_launcher_finds_the_same_verb(launcher: Path) -> None:
    lines: list[list[str]] = [[]]
    lines += [[word] for word in WORDS]
    lines += [[first, second] for first in WORDS for second in ("state", "--", "box", "--root")]
    lines += [["--root", word, "create", "x"] for word in WORDS]
    for words in lines:
        done = subprocess.run([launcher, *words], capture_output=True, text=True, check=True)
        assert done.stdout.rstrip("\n") == _expected(words), words

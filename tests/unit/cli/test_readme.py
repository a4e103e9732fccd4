"""README.md tells the truth about commands, keys and files."""

from __future__ import annotations

import json
import re
from pathlib import Path

from clipshim.cli.app import COMMANDS
from clipshim.settings import DEFAULTS

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_configuration_table_is_the_configuration() -> None:
    expected = [
        f"| `{key}` | `{json.dumps(default)}` | {text} |"
        for key, (default, text) in DEFAULTS.items()
    ]
    assert [line for line in README.splitlines() if line in expected] == expected
    table = README.partition("<!-- settings")[2].partition("\n## ")[0]
    assert len(re.findall(r"^\| `", table, re.MULTILINE)) == len(DEFAULTS)


def test_every_command_is_listed() -> None:
    listed = re.findall(r"^\| `clipshim ([a-z]+)", README, re.MULTILINE)
    assert [name for name in listed if name != "run"] == list(COMMANDS)


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "integration").glob("*/README.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"

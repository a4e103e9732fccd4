"""What the fast path loads: engines wait for every module of it, at every container."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import clipshim

PACKAGE = Path(clipshim.__file__).resolve().parent
# beyond what the interpreter itself loads with -I -S
ORDINARY_CREATE = {
    "_json",
    "clipshim",
    "clipshim.errors",
    "clipshim.shim",
    "clipshim.shim.argv",
    "clipshim.shim.bundle",
    "clipshim.shim.child",
    "clipshim.shim.json_text",
    "clipshim.shim.reporting",
    "clipshim.shim.runtimes",
    "clipshim.shim.source",
    "clipshim.shim.state",
    "clipshim.shim.trace",
    "clipshim.shim.verbs",
    "fcntl",
    # os and what it needs; the rest of what it imports is there already, or most of it
    "_abc",
    "_collections_abc",
    "_stat",
    "abc",
    "errno",
    "genericpath",
    "os",
    "posixpath",
    "stat",
}
TOO_SLOW = {
    "argparse", "asyncio", "collections", "contextlib", "dataclasses", "enum", "functools",
    "hashlib", "inspect", "json", "logging", "pathlib", "re", "selectors", "shutil", "signal",
    "socket", "subprocess", "tempfile", "tomllib", "typing", "trio",
}  # fmt: skip


def _loaded(*arguments: str, config: Path) -> set[str]:
    """The modules that one call of the shim imports; the runtime is /bin/true."""
    done = subprocess.run(
        [
            sys.executable, "-X", "importtime", "-I", "-S",
            PACKAGE / "shim/main.py", "/bin/true", "/nonexistent", *arguments,
        ],
        env={"CLIPSHIM_CONFIG": str(config), "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    names = [
        line.rpartition("|")[2].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    ]
    bare = subprocess.run(
        [sys.executable, "-X", "importtime", "-I", "-S", "-c", "pass"],
        capture_output=True,
        text=True,
        check=True,
    )
    own = {line.rpartition("|")[2].strip() for line in bare.stderr.splitlines()}
    return set(names) - own


def _config(directory: Path) -> Path:
    path = directory / "config.toml"
    path.write_text(f'run_dir = "{directory}/run"\nstate_dir = "{directory}/state"\n')
    return path


def test_an_ordinary_create_loads_a_literal_list(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"root": {"path": "rootfs"}}))
    found = _loaded("create", "--bundle", str(tmp_path), "box", config=_config(tmp_path))
    assert found <= ORDINARY_CREATE, sorted(found - ORDINARY_CREATE)


def test_a_delete_loads_nothing_slow(tmp_path: Path) -> None:
    found = _loaded(
        "--root", str(tmp_path), "delete", "--force", "box", config=_config(tmp_path)
    )  # fmt: skip
    assert not found & TOO_SLOW


def test_the_modules_of_an_index_are_not_slow_either() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import clipshim.shim.create, clipshim.shim.child, clipshim.settings\n"
        "print('\\n'.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, os.path.dirname(PACKAGE)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not set(done.stdout.split()) & TOO_SLOW

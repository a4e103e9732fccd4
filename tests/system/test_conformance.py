"""clipshim against runc: for what names no index, the two cannot be told apart.

Each case is a list of command lines. It runs once with runc and once with clipshim, each in a
directory of its own with the same bundles and a private --root; then exit codes, stdout, stderr,
the log file and all files left are compared, with times, process ids and the directory normalised.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from clipshim.shim import argv
from tests.support.node import CLIPSHIM, wait_for
from tests.support.runtimes import RUNC, write_bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.node import Node

VERBS = (
    "checkpoint",
    "create",
    "delete",
    "events",
    "exec",
    "kill",
    "list",
    "pause",
    "ps",
    "restore",
    "resume",
    "run",
    "spec",
    "start",
    "state",
    "update",
    "features",
)
WITH_ID = tuple(verb for verb in VERBS if verb not in ("list", "spec", "features"))
LOOP = ["/bin/sleep", "100000"]  # one process, so that lists of processes are the same

# words: {c} the container, {b} a bundle that exits with 3, {loop} one that runs until killed,
# {out} a directory for what a verb writes. "!stopped" waits until the container has stopped.
LIFE_CYCLES: dict[str, list[str]] = {
    "run in the foreground": ["run -b {b} {c}", "state {c}", "delete {c}"],
    "run keeps": ["run --keep -b {b} {c}", "state {c}", "delete {c}", "delete {c}"],
    "run detached": [
        "run -d -b {loop} {c}",
        "state {c}",
        "delete {c}",
        "delete -f {c}",
        "state {c}",
    ],
    "run detached with words in another order": [
        "run {c} --detach --bundle={loop}",
        "exec {c} /bin/sh -c 'exit 4'",
        "delete --force {c}",
    ],
    "a word behind a flag without value": ["run -d {c} --bundle {b}", "delete --force {c}"],
    "create to delete": [
        "create --bundle {loop} --pid-file {out}/pid {c}",
        "state {c}",
        "start {c}",
        "start {c}",
        "exec {c} /bin/sh -c 'echo $PPID; id; exit 5'",
        "exec -e A=b --cwd /bin -u 1:2 {c} /bin/sh -c 'echo $A; pwd; id'",
        "exec {c} /nowhere",
        "#ps {c}",
        "ps -f json {c}",
        "list",
        "list -q",
        "list --format json",
        "pause {c}",
        "state {c}",
        "resume {c}",
        "kill {c} TERM",
        "kill {c} KILL",
        "!stopped",
        "state {c}",
        "delete {c}",
        "delete {c}",
        "delete --force {c}",
    ],
    "an ID that exists": [
        "create -b {loop} {c}",
        "create -b {loop} {c}",
        "run -b {b} {c}",
        "restore -b {b} --image-path {out} {c}",
        "kill --all {c} KILL",
        "!stopped",
        "delete {c}",
    ],
    "start of a stopped one": [
        "run --keep -b {b} {c}",
        "start {c}",
        "exec {c} /bin/true",
        "delete {c}",
    ],
    "events and update": [
        "run -d -b {loop} {c}",
        "#events --stats {c}",
        "update --cpu-share 512 {c}",
        "update --bogus {c}",
        "delete -f {c}",
    ],
    "debug": ["#--debug run -b {b} {c}"],
    "checkpoint without criu": [
        "--criu /nonexistent run -d -b {loop} {c}",
        "--criu /nonexistent checkpoint --image-path {out} {c}",
        "state {c}",
        "delete -f {c}",
    ],
    "spec": ["spec -b {out}", "spec -b {out}", "spec --rootless"],
    "switches as words": ["run --detach=false --keep=true -b {b} {c}", "delete --force=1 {c}"],
    "end of flags": ["run -b {b} -- {c}", "-- state {c}"],
    "two bundles": ["run --bundle /nonexistent --bundle {b} {c}"],
}
ERRORS: dict[str, list[str]] = {
    **{f"help of {verb}": [f"{verb} --help", f"{verb} -h"] for verb in VERBS},
    **{f"{verb} of nothing": [verb] for verb in WITH_ID},
    **{f"{verb} of an unknown": [f"{verb} nosuch"] for verb in WITH_ID},
    **{f"{verb} of two": [f"{verb} nosuch other"] for verb in WITH_ID if verb != "exec"},
    **{f"{verb} with an unknown flag": [f"{verb} --frobnicate nosuch"] for verb in VERBS},
    **{
        f"log of {verb}": [
            f"--log {{out}}/log.json --log-format json {verb} nosuch",
            f"--log {{out}}/log.json --log-format json {verb} --frobnicate",
            f"--log={{out}}/log.txt {verb} nosuch",
            f"--log-format=json {verb} nosuch",
        ]
        for verb in WITH_ID
    },
    "versions": ["--version", "-v", "-version", "--version=true", "--debug --version"],
    "unknown verb": ["frobnicate", "frobnicate --help", "--log {out}/log frobnicate"],
    "unknown global flag": ["--frobnicate state x", "-x"],
    "flags without value": ["--root", "--log", "state --", "--log-format"],
    "log format": ["--log-format xml state x"],
    "log that cannot be opened": ["--log /nonexistent/log state x", "--log /nonexistent/l run x"],
    "bad IDs": [
        "create -b {b} a/b",
        "create -b {b} ..",
        "create -b {b} ''",
        "run -b {b} 'a b'",
        "delete a/b",
        "delete ..",
        "delete --force ''",
        "delete --force ../../etc",
    ],
    "missing bundle": ["create -b /nonexistent {c}", "run --bundle= {c}", "run -b {out} {c}"],
    "bad bundles": [
        "run -b {badjson} {c}",
        "run -b {noroot} {c}",
        "run -b {noprocess} {c}",
        "run -b {badroot} {c}",
        "create -b {list} {c}",
        "create -b {noprogram} {c}",
        "--log {out}/l --log-format json create -b {badmount} {c}",
        "state {c}",
    ],
    "an empty annotation map": ["run -b {annotated} {c}"],
    "an escape in config.json": [
        "run -b {escaped} {c}",
        "run -b {escaped} --keep {c}",
        "delete {c}",
    ],
    "a directory that looks like a stub's": ["run -b {nearstub} {c}"],
    "a pause sandbox": ["run -b {sandbox} {c}"],
    "a CRI image that nobody indexed": ["run -b {cri} {c}"],
    "no terminal": ["run -b {tty} {c}", "create -b {tty} {c}"],
    "console socket": ["create -b {tty} --console-socket /nonexistent {c}"],
    "relative log": ["--log log.txt state nosuch"],
    "bundle from the working directory": ["create {c}", "run"],
    "root in a file": ["--root {b}/config.json run -b {b} {c}"],
}


class Side:
    """One of the two: its program and its copy of everything."""

    def __init__(self, program: Path, directory: Path, env: dict[str, str]) -> None:
        self.program, self.directory, self.env = program, directory, env
        self.root = directory / "root"
        self.words: dict[str, str] = {"c": "box", "out": str(directory / "out")}
        (directory / "out").mkdir(parents=True)
        (directory / "cwd").mkdir()
        self._rootfs(directory / "rootfs")
        rootfs = directory / "rootfs"
        self._bundle("b", ["/bin/sh", "-c", "echo out; echo err >&2; exit 3"])
        self._bundle("loop", LOOP)
        self._bundle("noroot", ["/bin/true"], lambda config: config.pop("root"))
        self._bundle("noprocess", ["/bin/true"], lambda config: config.pop("process"))
        self._bundle(
            "badroot", ["/bin/true"], lambda config: config["root"].update(path="/nonexistent")
        )
        self._bundle("noprogram", ["/nonexistent"])
        self._bundle(
            "badmount",
            ["/bin/true"],
            lambda config: config["mounts"].append(
                {"destination": "/x", "type": "bind", "source": "/nonexistent", "options": ["bind"]}
            ),
        )
        self._bundle("tty", ["/bin/true"], lambda config: config["process"].update(terminal=True))
        self._annotated("annotated", {})
        self._annotated("escaped", {"org.example": "\\u0041"})
        self._annotated("sandbox", {"io.kubernetes.cri.container-type": "sandbox"})
        self._annotated("cri", {"io.kubernetes.cri.image-name": "registry.invalid/nothing:1"})
        near = directory / "nearstub"
        shutil.copytree(rootfs, near / "rootfs", symlinks=True)
        (near / "rootfs/.clip/index.clip").mkdir(parents=True)
        self._bundle(
            "nearstub",
            ["/bin/sh", "-c", "ls -a /.clip"],
            lambda config: config["root"].update(path="rootfs"),
        )
        for name, text in (("badjson", "{"), ("list", "[]")):
            (directory / name).mkdir()
            (directory / name / "config.json").write_text(text)
            self.words[name] = str(directory / name)

    def _rootfs(self, rootfs: Path) -> None:
        for name in ("bin", "proc", "dev", "sys", "tmp", "etc"):
            (rootfs / name).mkdir(parents=True)
        shutil.copy("/usr/bin/busybox", rootfs / "bin/busybox")
        for name in ("sh", "true", "sleep", "echo", "id", "pwd", "ls", "cat"):
            (rootfs / "bin" / name).symlink_to("busybox")

    def _bundle(
        self, name: str, arguments: list[str], change: Callable[[dict[str, Any]], Any] | None = None
    ) -> None:
        bundle = write_bundle(self.directory / name, arguments, rootfs=self.directory / "rootfs")
        config = json.loads((bundle / "config.json").read_text())
        run_root = Path(os.environ["CLIPSHIM_TEST_ROOT"]).name
        config["linux"]["cgroupsPath"] = f"/{run_root}/{self.directory.name}-{name}"
        if change:
            change(config)
        (bundle / "config.json").write_text(json.dumps(config))
        self.words[name] = str(bundle)

    def _annotated(self, name: str, annotations: dict[str, str]) -> None:
        self._bundle(
            name, ["/bin/echo", "annotated"], lambda config: config.update(annotations=annotations)
        )
        path = self.directory / name / "config.json"
        path.write_text(path.read_text().replace("\\\\u", "\\u"))

    def run(self, line: str, number: int) -> dict[str, Any]:
        """Carries out one command line; everything that a caller could see of it."""
        import shlex

        line = line.removeprefix("#")
        words = [word.format_map(self.words) for word in shlex.split(line)]
        output, errors = self.directory / f"stdout{number}", self.directory / f"stderr{number}"
        with open(output, "wb") as stdout, open(errors, "wb") as stderr:
            done = subprocess.run(
                [self.program, *(() if "--root" in words else ("--root", self.root)), *words],
                env=self.env,
                cwd=self.directory / "cwd",
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                timeout=120,
                check=False,
            )
        result = {
            "exit": done.returncode,
            "stdout": self._normal(output.read_text(errors="replace")),
            "stderr": self._normal(errors.read_text(errors="replace")),
        }
        output.unlink()
        errors.unlink()
        return result

    def wait_stopped(self) -> None:
        """Until the container is no longer running."""

        def stopped() -> bool:
            text = subprocess.run(
                [RUNC, "--root", self.root, "state", self.words["c"]],
                capture_output=True,
                text=True,
                check=False,
            ).stdout
            return not text or json.loads(text)["status"] == "stopped"

        wait_for("the container stops", stopped)

    def files(self) -> dict[str, str]:
        """Everything left in the directory: kind, mode, and content of what is small text."""
        found = {}
        for path in sorted(self.directory.rglob("*")):
            name = str(path.relative_to(self.directory))
            if name.startswith(("rootfs/", "nearstub/rootfs/")):
                continue
            facts = path.lstat()
            content = ""
            if path.is_file() and facts.st_size < 100_000 and "root/" not in name:
                content = self._normal(path.read_text(errors="replace"))
            found[name] = f"{facts.st_mode:o} {content}"
        return found

    def _normal(self, text: str) -> str:
        text = text.replace(str(self.directory), "DIRECTORY").replace(self.directory.name, "NAME")
        text = re.sub(r'time(=|":)"[^"]*"', r"time\1TIME", text)
        text = re.sub(r"\d{4}-\d\d-\d\dT[0-9:.]+(Z|[+-]\d\d:\d\d)", "TIME", text)
        text = re.sub(r'"pid": ?\d+', '"pid": PID', text)
        text = re.sub(r"\b(\d{2,}|[0-9a-f]{12})\b", "NUMBER", text)  # process ids, addresses
        return re.sub(r" +", " ", text)

    def close(self) -> None:
        """Deletes what a failed case left."""
        for name in os.listdir(self.root) if self.root.is_dir() else ():
            subprocess.run(
                [RUNC, "--root", self.root, "delete", "--force", name],
                check=False,
                capture_output=True,
            )


@pytest.fixture(scope="module")
def conformance_node(run_root: Path) -> Iterator[Node]:
    from tests.support.node import Node

    with Node(run_root / "conformance") as node:
        yield node


@pytest.fixture
def sides(tmp_path: Path, conformance_node: Node) -> Iterator[tuple[Side, Side]]:
    plain = Side(RUNC, tmp_path / "plainrunc", dict(os.environ))
    with contextlib.closing(plain):
        ours = Side(CLIPSHIM, tmp_path / "clipshims", conformance_node.env)
        with contextlib.closing(ours):
            yield plain, ours


def flags_of(*verb: str) -> tuple[set[str], set[str]]:
    """What runc's help names: flags with a value, and those without."""
    command = [str(RUNC), *verb, "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    values: set[str] = set()
    switches: set[str] = set()
    for line in text.partition("OPTIONS:")[2].splitlines():
        if not line.startswith("   -"):
            continue
        for word in re.split(r"\s{2,}", line.strip(), maxsplit=1)[0].split(", "):
            name, _, value = word.lstrip("-").partition(" ")
            (values if value else switches).add(name)
    return values, switches


def test_every_flag_that_runc_names_is_known() -> None:
    """A flag that is not known could hide the verb or the container's ID."""
    values, switches = flags_of()
    assert values
    assert values <= argv.GLOBAL_VALUES
    assert switches <= argv.GLOBAL_SWITCHES
    for verb, (known_values, known_switches) in argv.OUR_VERBS.items():
        values, switches = flags_of(verb)
        assert values <= known_values, verb
        assert switches <= known_switches, verb
        assert values or switches, verb


@pytest.mark.parametrize("name", [*LIFE_CYCLES, *ERRORS])
def test_nobody_can_tell_it_from_runc(name: str, sides: tuple[Side, Side]) -> None:
    lines = LIFE_CYCLES.get(name) or ERRORS[name]
    for number, line in enumerate(lines):
        if line == "!stopped":
            for side in sides:
                side.wait_stopped()
            continue
        plain, ours = (side.run(line, number) for side in sides)
        if line.startswith("#"):  # its numbers, and how many lines there are, differ by chance
            plain, ours = ({"exit": result["exit"]} for result in (plain, ours))
        assert ours == plain, line
    expected, found = sides[0].files(), sides[1].files()
    assert found == expected


def test_an_ordinary_container_leaves_the_node_alone(
    sides: tuple[Side, Side], conformance_node: Node
) -> None:
    for number, line in enumerate(LIFE_CYCLES["create to delete"]):
        if line == "!stopped":
            sides[1].wait_stopped()
        else:
            sides[1].run(line, number)
    assert not conformance_node.run_dir.exists()
    assert not conformance_node.state_dir.exists()
    assert conformance_node.ping() is None

"""A low-level runtime with a private root, plain runc or clipshim, and bundles for it.

The same test code drives both: that is how a test proves itself on runc first.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.support.node import CLIPSHIM
from tests.support.programs import program

if TYPE_CHECKING:
    from tests.support.node import Node

RUNC = program("/usr/sbin/runc")


class Runtime:
    """One runtime program with its own --root; deletes its containers on close."""

    def __init__(self, program: Path, directory: Path, env: dict[str, str] | None = None) -> None:
        self.program = program
        self.root = directory
        self.env = env or dict(os.environ)
        directory.mkdir(parents=True, exist_ok=True)

    @classmethod
    def runc(cls, directory: Path) -> Self:
        """Plain runc."""
        return cls(RUNC, directory)

    @classmethod
    def clipshim(cls, directory: Path, node: Node) -> Self:
        """clipshim of a private node."""
        return cls(CLIPSHIM, directory, node.env)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def command(self, *arguments: str | Path) -> list[str | Path]:
        """The full command line."""
        return [self.program, "--root", self.root, *arguments]

    def __call__(
        self, *arguments: str | Path, check: bool = True, timeout_s: float = 300, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs one verb. Output goes to files, not pipes: containers may keep them open."""
        result = subprocess.run(
            self.command(*arguments),
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            **options,
        )
        if check:
            assert result.returncode == 0, (
                f"{self.program.name} {' '.join(str(word) for word in arguments)}: "
                f"exit {result.returncode}\n{result.stdout}{result.stderr}"
            )
        return result

    def quietly(
        self, *arguments: str | Path, check: bool = True, timeout_s: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Runs a verb whose container keeps stdout open, as `create` and `run --detach` do."""
        log = self.root / "output.log"
        with open(log, "w+b") as output:
            done = subprocess.run(
                self.command(*arguments),
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=timeout_s,
                check=False,
            )
            output.seek(0)
            text = output.read().decode(errors="replace")
        if check:
            words = " ".join(str(word) for word in arguments)
            assert done.returncode == 0, (
                f"{self.program.name} {words}: exit {done.returncode}\n{text}"
            )
        return subprocess.CompletedProcess(done.args, done.returncode, text, "")

    def containers(self) -> list[str]:
        """The ids that the runtime knows."""
        return self("list", "-q").stdout.split()

    def status(self, container: str) -> str:
        """`created`, `running`, `stopped`, or `` if the runtime does not know it."""
        result = self("state", container, check=False)
        return str(json.loads(result.stdout)["status"]) if result.returncode == 0 else ""

    def close(self) -> None:
        """Deletes what is left."""
        for name in [path.name for path in self.root.iterdir() if path.is_dir()]:
            self("delete", "--force", name, check=False)


def write_bundle(
    directory: Path,
    arguments: list[str],
    *,
    rootfs: Path | None = None,
    annotations: dict[str, str] | None = None,
    env: dict[str, str] | None = None,
    cwd: str = "/",
    readonly: bool = False,
    mounts: list[dict[str, Any]] | None = None,
) -> Path:
    """Writes config.json as `runc spec` would, for a container without a network of its own.

    Without `rootfs` root.path is `rootfs`, an empty directory: the runtime brings the files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    subprocess.run([RUNC, "spec"], cwd=directory, check=True, stdin=subprocess.DEVNULL)
    config = json.loads((directory / "config.json").read_text())
    process = config["process"]
    process["terminal"] = False
    process["args"] = arguments
    process["cwd"] = cwd
    marks = {"CLIPSHIM_TEST_RUN": os.environ.get("CLIPSHIM_TEST_RUN", ""), **(env or {})}
    process["env"] += [f"{key}={value}" for key, value in marks.items()]
    if rootfs is None:
        (directory / "rootfs").mkdir(exist_ok=True)
    config["root"] = {"path": str(rootfs or "rootfs"), "readonly": readonly}
    config["mounts"] += mounts or []
    if annotations:
        config["annotations"] = annotations
    linux = config["linux"]
    linux["namespaces"] = [space for space in linux["namespaces"] if space["type"] != "network"]
    run_root = Path(os.environ["CLIPSHIM_TEST_ROOT"]).name
    linux["cgroupsPath"] = f"/{run_root}/{directory.name}-{os.urandom(3).hex()}"
    # not as clipshim itself writes it, so that what is put back can be told from what is rewritten
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return directory

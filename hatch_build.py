"""Build hook: compiles the launcher, the small program that engines call as `clipshim`.

The wheel carries it as a script, and is therefore of one platform. An editable installation has the
path of the checkout compiled in, because only `import` could find it otherwise.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "clipshim/shim/launcher.c"
FLAGS = ("-O2", "-Wall", "-Wextra", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong", "-fPIE")


class LauncherBuildHook(BuildHookInterface[Any]):
    """Adds the compiled launcher to the wheel's scripts."""

    _directory: str | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles before a wheel is put together; `version` is "standard" or "editable"."""
        if self.target_name != "wheel":
            return
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if not compiler:
            raise RuntimeError("clipshim's launcher needs a C compiler: apt install gcc libc6-dev")
        self._directory = tempfile.mkdtemp(prefix="clipshim-build-")
        program = os.path.join(self._directory, "clipshim")
        command = [
            *compiler.split(),
            *FLAGS,
            "-o",
            program,
            os.path.join(self.root, SOURCE),
            "-pie",
        ]
        if version == "editable":
            command.append(f'-DCLIPSHIM_ROOT="{self.root}"')
        subprocess.run(command, check=True)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["shared_scripts"][program] = "clipshim"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes what was compiled."""
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)

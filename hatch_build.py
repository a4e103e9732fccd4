"""Build hook: compiles the launcher, the small program that engines call as `clipshim`."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class LauncherBuildHook(BuildHookInterface[Any]):
    """Adds the compiled launcher to the wheel's scripts."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Nothing to compile yet."""

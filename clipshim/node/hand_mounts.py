"""Holds of trees that no container has: mounts by hand, kept in <run_dir>/hand-mounts.json."""

import json
import os


class HandMounts:
    """Hold -> image ID. Survives the daemon, not the host. Blocking, but tiny."""

    def __init__(self, run_dir: str) -> None:
        self._path = f"{run_dir}/hand-mounts.json"

    def all(self) -> dict[str, str]:
        """Every hold."""
        try:
            with open(self._path, encoding="utf-8") as file:
                raw = json.load(file)
        except (OSError, ValueError):
            return {}
        return {str(k): str(v) for k, v in raw.items()} if isinstance(raw, dict) else {}

    def add(self, hold: str, image_id: str) -> None:
        """Remembers a hold."""
        self._write(self.all() | {hold: image_id})

    def remove(self, hold: str) -> None:
        """Forgets a hold; unknown ones are fine."""
        holds = self.all()
        if holds.pop(hold, None) is not None:
            self._write(holds)

    def _write(self, holds: dict[str, str]) -> None:
        temporary = f"{self._path}.new"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(holds, file)
        os.rename(temporary, self._path)

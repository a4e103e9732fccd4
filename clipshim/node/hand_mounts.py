"""Holds of trees that no container has: mounts by hand, kept in <run_dir>/hand-mounts.json."""

import contextlib
import errno
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
        self._write(self.all() | {hold: image_id}, adds=True)

    def remove(self, hold: str) -> None:
        """Forgets a hold; unknown ones are fine."""
        holds = self.all()
        if holds.pop(hold, None) is not None:
            self._write(holds, adds=False)

    def _write(self, holds: dict[str, str], *, adds: bool) -> None:
        text = json.dumps(holds)
        temporary = f"{self._path}.new"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
            os.rename(temporary, self._path)
        except OSError as exc:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT) or adds:
                raise
            # what is taken away must go, or its tree would stay: it fits where the longer text is
            with open(self._path, "r+", encoding="utf-8") as file:
                file.write(text)
                file.truncate()

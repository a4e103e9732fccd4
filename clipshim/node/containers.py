"""The containers of this node as the shim recorded them: <run_dir>/CID/state.json.

Read-only and forgiving: a damaged file is a container that nothing is known of. Blocking.
"""

import json
import os
from dataclasses import dataclass
from typing import Any

STATE_FILE = "state.json"
LAYERS = "layers"  # settings.layers_mount


@dataclass(frozen=True)
class Container:
    """One container's record."""

    cid: str
    id: str
    root: str
    image_id: str
    raw: dict[str, Any]

    def text(self, key: str) -> str:
        """A field of the record, empty if it is no text."""
        value = self.raw.get(key)
        return value if isinstance(value, str) else ""


def read_container(run_dir: str, cid: str) -> Container | None:
    """The record of one container directory; None if there is no usable one."""
    if cid == LAYERS:
        return None
    path = f"{run_dir}/{cid}/{STATE_FILE}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with open(fd, encoding="utf-8") as file:
            raw = json.load(file)
    except (OSError, ValueError):
        return None
    if not isinstance(raw, dict):
        return None

    def text(key: str) -> str:
        value = raw.get(key)
        return value if isinstance(value, str) else ""

    return Container(cid, text("id"), text("root"), text("image_id"), raw)


def container_directories(run_dir: str) -> list[str]:
    """Names below run_dir that hold a state file, readable or not.

    Never looks into the layers mount: it is the server's own, and the server calls this.
    """
    try:
        names = os.listdir(run_dir)
    except FileNotFoundError:
        return []
    return sorted(
        name
        for name in names
        if name != LAYERS and os.path.lexists(f"{run_dir}/{name}/{STATE_FILE}")
    )


def read_containers(run_dir: str) -> list[Container]:
    """Every container with a usable record."""
    found = (read_container(run_dir, cid) for cid in container_directories(run_dir))
    return [container for container in found if container is not None]

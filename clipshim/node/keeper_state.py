"""<run_dir>/keeper.json: which processes make up the daemon, for its successor and for people.

    {"version": 1, "generation": HEX, "keeper": [PID, TICKS], "server": [PID, TICKS] | null,
     "trees": {IMAGE_ID: {"process": [PID, TICKS] | null, "target": PATH, "config": {…}}}}

The generation names one FUSE connection of layers: it changes exactly when that one is made anew.
Written by the keeper only, replaced atomically. Standard library only.
"""

import contextlib
import json
import os
from typing import Any

from clipshim.node.processes import ProcessId

STATE_NAME = "keeper.json"


class TreeState:
    """One tree shown in mode fuse."""

    def __init__(
        self, target: str, config: dict[str, Any], process: ProcessId | None = None
    ) -> None:
        self.target, self.config, self.process = target, config, process


class KeeperState:
    """The content of keeper.json. No dataclass: its modules take 5 ms of the keeper's start."""

    def __init__(
        self,
        generation: str,
        keeper: ProcessId | None = None,
        server: ProcessId | None = None,
        trees: dict[str, TreeState] | None = None,
    ) -> None:
        self.generation, self.keeper, self.server = generation, keeper, server
        self.trees = {} if trees is None else trees


def new_generation() -> str:
    """A name that no connection had before."""
    return os.urandom(8).hex()


def read_state(run_dir: str) -> KeeperState | None:
    """What the last keeper wrote; None if there is nothing usable."""
    try:
        with open(f"{run_dir}/{STATE_NAME}", encoding="utf-8") as file:
            raw = json.load(file)
        if raw["version"] != 1:
            return None
        trees = {
            image_id: TreeState(tree["target"], tree["config"], _process(tree["process"]))
            for image_id, tree in raw["trees"].items()
        }
        return KeeperState(
            raw["generation"], _process(raw["keeper"]), _process(raw["server"]), trees
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_state(run_dir: str, state: KeeperState) -> None:
    """Replaces the file. Not synced: after a host reset nothing in it is true any more."""
    document = {
        "version": 1,
        "generation": state.generation,
        "keeper": state.keeper,
        "server": state.server,
        "trees": {
            image_id: {"process": tree.process, "target": tree.target, "config": tree.config}
            for image_id, tree in state.trees.items()
        },
    }
    temporary = f"{run_dir}/.{STATE_NAME}.{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(document, file)
        os.replace(temporary, f"{run_dir}/{STATE_NAME}")
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _process(raw: Any) -> ProcessId | None:
    return ProcessId(int(raw[0]), int(raw[1])) if raw else None

"""What is mounted, on disk: <state_dir>/trees/IMAGE_ID.json beside the tree, IMAGE_ID.erofs.

A record is written before its mount and removed after it, so a server that takes over knows the
layers that the kernel may ask for before it has opened any index.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields

RECORD_VERSION = 1


@dataclass(frozen=True)
class LayerName:
    """A layer as the layers mount shows it."""

    key: str
    size: int


@dataclass(frozen=True)
class TreeRecord:
    """One tree that is mounted or about to be."""

    image_id: str
    digest: str
    reference: str
    mode: str  # erofs, fuse or unpacked
    layers: tuple[LayerName, ...]
    generation: str  # of the layers connection that it was mounted on
    pinned: tuple[str, ...] = ()  # keys of layers whose store file is itself the device
    kept: tuple[str, ...] = ()  # keys of layers that were fetched whole and must not be evicted
    fuse_name: str = ""  # what the keeper calls it, in mode fuse
    trusted: bool = False

    @property
    def independent(self) -> bool:
        """Whether the mount needs nothing of the daemon."""
        if self.mode == "unpacked":
            return True
        return self.mode == "erofs" and len(self.pinned) == len({la.key for la in self.layers})


class TreeRecords:
    """The directory of records and trees. Blocking."""

    def __init__(self, state_dir: str) -> None:
        self.directory = f"{state_dir}/trees"
        os.makedirs(self.directory, mode=0o700, exist_ok=True)

    def tree_path(self, image_id: str) -> str:
        """The file of the tree, an EROFS image."""
        return f"{self.directory}/{image_id}.erofs"

    def read_all(self) -> list[TreeRecord]:
        """Every usable record."""
        names = [name for name in sorted(os.listdir(self.directory)) if name.endswith(".json")]
        return [record for name in names if (record := self.read(name[:-5]))]

    def read(self, image_id: str) -> TreeRecord | None:
        """One record, None if there is none or it is damaged."""
        try:
            with open(f"{self.directory}/{image_id}.json", encoding="utf-8") as file:
                raw = json.load(file)
            if raw["version"] != RECORD_VERSION or raw["image_id"] != image_id:
                return None
            raw["layers"] = [LayerName(layer["key"], layer["size"]) for layer in raw["layers"]]
            # another version of clipshim may have written it: the tree is in use all the same
            known = {
                field.name: raw[field.name] for field in fields(TreeRecord) if field.name in raw
            }
            lists = {key: tuple(value) for key, value in known.items() if isinstance(value, list)}
            return TreeRecord(**(known | lists))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def write(self, record: TreeRecord) -> None:
        """Replaces a record. Not synced: after a host reset nothing is mounted."""
        document = json.dumps({"version": RECORD_VERSION} | asdict(record))
        self._replace(f"{self.directory}/{record.image_id}.json", [document.encode()])

    def write_tree(self, image_id: str, pieces: Callable[[], Iterable[bytes]]) -> str:
        """Writes the tree that `pieces` gives unless it is here; returns its path."""
        path = self.tree_path(image_id)
        # Not synced: a host reset may leave other bytes, which are found here before they are used.
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            if all(file.read(len(piece)) == piece for piece in pieces()) and not file.read(1):
                return path
        self._replace(path, pieces())
        return path

    def remove(self, image_id: str) -> None:
        """Removes record and tree."""
        for path in (f"{self.directory}/{image_id}.json", self.tree_path(image_id)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def image_ids(self) -> set[str]:
        """The images that have a file here."""
        names = os.listdir(self.directory)
        return {name.rsplit(".", 1)[0] for name in names if not name.startswith(".")}

    def _replace(self, path: str, pieces: Iterable[bytes]) -> None:
        temporary = f"{self.directory}/.new-{secrets.token_hex(8)}"
        try:
            with open(temporary, "wb") as file:
                file.writelines(pieces)
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

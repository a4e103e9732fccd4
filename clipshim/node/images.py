"""The local store of indexes: files by digest, and the images that they are indexes of.

    <state_dir>/indexes/    0700
        sha256-HEX.clip     an index, read-only, named by the digest of its bytes
        sha256-HEX.facts    JSON: what the check of its tree found
        names.json          {canonical reference: digest}
        .lock               held while names.json is replaced

The command line and the daemon both write here. Files come in by rename after fsync, so whatever
has a name is whole. Not for opening indexes: index/model.py does that.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from clipshim.errors import BadReferenceError, NotFoundError, StoreError, remedy
from clipshim.registry.references import canonical_image
from clipshim.settings import Settings

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
FACTS_VERSION = 2  # 1 counted links that dangle among the top ones
COPY_BYTES = 1 << 20
MAX_INDEX_BYTES = 1 << 40  # a self-contained index is as large as its image


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an index after its tree was checked once."""

    image_id: str
    digest: str
    reference: str
    has_proc: bool
    has_usr: bool
    top_symlinks: dict[str, str] = field(default_factory=dict)


class ImageNames:
    """The store's directory. Blocking; every method may be called in a thread."""

    def __init__(self, settings: Settings) -> None:
        self.directory = settings.index_store
        self._names = f"{self.directory}/names.json"
        self._min_free_bytes = settings.min_free_bytes

    # Files

    def path(self, digest: str) -> str:
        """Where the index of this digest lies, or would."""
        if not DIGEST.fullmatch(digest):
            raise BadReferenceError(f"index digest: expected sha256:HEX, got {digest!r}")
        return f"{self.directory}/sha256-{digest.removeprefix('sha256:')}.clip"

    def has(self, digest: str) -> bool:
        """Whether the index is here."""
        return os.path.exists(self.path(digest))

    def existing_path(self, digest: str) -> str:
        """As path(). Raises NotFoundError if it is not here."""
        if not self.has(digest):
            raise NotFoundError(
                f"index {digest}: not in {self.directory}", hint="clipshim pull IMAGE fetches it"
            )
        return self.path(digest)

    def add(self, fd: int) -> str:
        """Copies the file behind `fd` in, unless it is here already; returns its digest."""
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise StoreError("index: expected a regular file")
        if status.st_size > MAX_INDEX_BYTES:
            raise StoreError(f"index: expected at most {MAX_INDEX_BYTES} bytes")
        if status.st_size <= 64 * COPY_BYTES:  # usual: known already, and then only hashed
            digest = _digest_of(fd)
            if self.has(digest):
                return digest
        self._make()
        self._check_room(status.st_size)
        temporary = f"{self.directory}/.new-{secrets.token_hex(8)}"
        try:
            out = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
            try:
                hasher = hashlib.sha256()
                for piece in _pieces(fd, MAX_INDEX_BYTES):
                    hasher.update(piece)
                    view = memoryview(piece)
                    while view:
                        view = view[os.write(out, view) :]
                os.fsync(out)
            finally:
                os.close(out)
            digest = f"sha256:{hasher.hexdigest()}"
            os.rename(temporary, self.path(digest))
        except BaseException as exc:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            if isinstance(exc, OSError):
                raise StoreError(
                    f"local store {self.directory}: {exc.strerror}", hint=remedy(exc)
                ) from exc
            raise
        _sync_directory(self.directory)
        return digest

    def adopt(self, path: str, reference: str) -> str:
        """Moves a new index file in and names it; returns its path. For the node's owner."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            digest = _digest_of(fd)
            os.fsync(fd)
            os.fchmod(fd, 0o400)
        finally:
            os.close(fd)
        self._make()
        target = self.path(digest)
        try:
            os.rename(path, target)
        except OSError:  # another file system
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self.add(fd)
            finally:
                os.close(fd)
        _sync_directory(self.directory)
        self.name(reference, digest)
        return target

    def remove(self, digest: str) -> None:
        """Removes an index, what is known of it, and its names."""
        with self._locked() as names:
            for name in [name for name, value in names.items() if value == digest]:
                del names[name]
            self._write_names(names)
        for path in (self._facts_path(digest), self.path(digest)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def digests(self) -> list[str]:
        """All indexes here."""
        with contextlib.suppress(FileNotFoundError):
            names = sorted(os.listdir(self.directory))
            return [
                f"sha256:{name[7:-5]}"
                for name in names
                if name.startswith("sha256-") and name.endswith(".clip")
            ]
        return []

    # Names

    def names(self) -> dict[str, str]:
        """Digest by canonical reference."""
        try:
            with open(self._names, encoding="utf-8") as file:
                raw = json.load(file)
        except FileNotFoundError:
            return {}
        except PermissionError as exc:
            raise StoreError(
                f"{self._names}: {exc.strerror}", hint="run it as root, or name an index file"
            ) from exc
        except (OSError, ValueError) as exc:
            raise StoreError(
                f"{self._names}: {exc}", hint="remove it and name the images again"
            ) from exc
        return {str(k): str(v) for k, v in raw.items()} if isinstance(raw, dict) else {}

    def name(self, reference: str, digest: str) -> None:
        """Makes `digest` the index of an image, and one that the node's owner brought."""
        with self._locked() as names:
            names[canonical_image(reference)] = digest
            self._write_names(names)

    def find(self, image: str) -> str | None:
        """The digest of an image's index: by reference, digest, or image ID (its beginning)."""
        if DIGEST.fullmatch(image):
            return image if self.has(image) else None
        with contextlib.suppress(BadReferenceError):
            found = self.names().get(canonical_image(image))
            if found is not None and self.has(found):
                return found
        if re.fullmatch(r"[0-9a-f]{12,64}", image):
            found_ids = [d for d in self.digests() if d[7:].startswith(image)]
            if len(found_ids) == 1:
                return found_ids[0]
        return None

    def is_named(self, digest: str) -> bool:
        """Whether the node's owner brought this index."""
        return digest in self.names().values()

    # Facts

    def facts(self, digest: str) -> ImageFacts | None:
        """What was found at the last check of this index by this version."""
        try:
            with open(self._facts_path(digest), encoding="utf-8") as file:
                raw = json.load(file)
            if raw.pop("version") != FACTS_VERSION:
                return None
            return ImageFacts(**raw)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def keep_facts(self, facts: ImageFacts) -> None:
        """Remembers a check. Not synced: what a host reset damages is checked again."""
        self._make()
        document: dict[str, Any] = {"version": FACTS_VERSION} | asdict(facts)
        self._replace(self._facts_path(facts.digest), document, sync=False)

    def _facts_path(self, digest: str) -> str:
        return self.path(digest).removesuffix(".clip") + ".facts"

    # Writing

    def _make(self) -> None:
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
        except OSError as exc:
            raise StoreError(
                f"local store {self.directory}: {exc.strerror}", hint=remedy(exc)
            ) from exc

    def _check_room(self, size: int) -> None:
        """Raises StoreError rather than fill the disk: a container's index may be any size."""
        state = os.statvfs(self.directory)
        if size + self._min_free_bytes > state.f_bavail * state.f_frsize:
            raise StoreError(
                f"local store {self.directory}: no room for an index of {size} bytes",
                hint="make room on its file system, or change min_free_bytes",
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[dict[str, str]]:
        self._make()
        fd = os.open(f"{self.directory}/.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield self.names()
        finally:
            os.close(fd)

    def _write_names(self, names: dict[str, str]) -> None:
        self._replace(self._names, names)

    def _replace(self, path: str, document: dict[str, Any], *, sync: bool = True) -> None:
        temporary = f"{self.directory}/.new-{secrets.token_hex(8)}"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(document, file, sort_keys=True)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.rename(temporary, path)
        except OSError as exc:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise StoreError(f"{path}: {exc.strerror}", hint=remedy(exc)) from exc
        if sync:
            _sync_directory(self.directory)


def _pieces(fd: int, limit: int) -> Iterator[bytes]:
    offset = 0
    while piece := os.pread(fd, COPY_BYTES, offset):
        offset += len(piece)
        if offset > limit:  # it grew while it was read
            raise StoreError(f"index: expected at most {limit} bytes")
        yield piece


def _digest_of(fd: int) -> str:
    hasher = hashlib.sha256()
    for piece in _pieces(fd, MAX_INDEX_BYTES):
        hasher.update(piece)
    return f"sha256:{hasher.hexdigest()}"


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

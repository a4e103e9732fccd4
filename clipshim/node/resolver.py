"""From what a container or a user names to an index in the local store, within the policy.

A container's annotation, stub or environment is hostile: what it may name, and whether the node's
credentials may be used for it, is decided here. Blocking work runs in threads.
"""

import contextlib
import fnmatch
import logging
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import trio

from clipshim.errors import (
    BadReferenceError,
    ClipError,
    IndexFormatError,
    NotFoundError,
    PolicyError,
    RegistryError,
    UsageError,
)
from clipshim.index.clip_format import ClipFile
from clipshim.index.erofs_read import ErofsImage
from clipshim.index.model import Index, open_index
from clipshim.index.tree_check import check_tree
from clipshim.node.images import ImageFacts, ImageNames
from clipshim.registry.access import RegistryAccess
from clipshim.registry.references import Reference, canonical_image, parse_image
from clipshim.registry.urls import parse_url
from clipshim.settings import Settings

log = logging.getLogger(__name__)

# a path: of an index in index_dirs, in a bundle or on the command line, which the node's owner
# vouches for; a stub's origin is no path
OWNER_ORIGINS = ("/", "file:")
FRESH_S = 300.0  # that a found index of a tag is used without asking the registry again
INDEXING_TIMEOUT_S = 3600.0
# An image that only the engine names is looked up in its registry on the way to its container's
# start, which must not wait for what may not be there.
LOOK_UP_S = 3.0
MISSING_S = 300.0  # that "no index" and failures are remembered for such images
MAX_REMEMBERED = 10_000
LARGE_INDEX_BYTES = 32 << 20  # unpacked: about 200,000 files
CHECK_TIMEOUT_S = 600.0

Progress = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Resolved:
    """An index in the local store, checked."""

    facts: ImageFacts
    path: str
    trusted: bool


class Resolver:
    """Finds, fetches, makes and checks indexes; one piece of work for all who ask at once."""

    def __init__(self, settings: Settings, images: ImageNames) -> None:
        self._settings = settings
        self._images = images
        self._found: dict[tuple[str, bool], tuple[str, float]] = {}  # digest, when
        self._missing: dict[str, float] = {}  # images and registries of engines; until when
        # gone with the last who asks: containers name what they like
        self._locks: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()
        self._large = threading.Lock()  # one check of a large index at a time
        self.indexing_s: Callable[[float], None] = lambda _seconds: None

    async def resolve(self, source: Any, fds: list[int], progress: Progress) -> Resolved:
        """Raises NotFoundError, PolicyError, IndexFormatError, RegistryError, UsageError."""
        if not isinstance(source, dict):
            raise UsageError("mount: source: expected an object")
        if source.get("fd"):
            origin = source.get("origin")
            if len(fds) != 1 or not isinstance(origin, str):
                raise UsageError("mount: source fd: expected one descriptor and its origin")
            digest = await trio.to_thread.run_sync(self._add, fds[0])
            return await self._checked(digest, trusted=origin.startswith(OWNER_ORIGINS))
        if isinstance(source.get("digest"), str):
            digest = source["digest"]
            self._images.existing_path(digest)
            # asked for by digest: whoever knows it may have it, as with a registry's blobs
            return await self._checked(digest, trusted=self._images.is_named(digest))
        if isinstance(source.get("image"), str):
            return await self._by_image(source["image"], bool(source.get("engine_named")), progress)
        raise UsageError("mount: source: expected fd, digest or image")

    def _add(self, fd: int) -> str:
        with ClipFile.open(fd):
            pass  # its header and sizes are right: only then may a large file be copied
        return self._images.add(fd)

    async def _by_image(self, image: str, engine_named: bool, progress: Progress) -> Resolved:
        reference = parse_image(image)
        if not isinstance(reference, Reference):
            raise PolicyError(
                f"image {image}: containers may name registries only",
                hint="index it into the local store and name it by digest, or use index_dirs",
            )
        if not engine_named:  # the engine has pulled what it names, or would have
            self._check_registry(reference)
        name = canonical_image(image)
        local = await trio.to_thread.run_sync(self._images.find, name)
        if local is not None:
            return await self._checked(local, trusted=True)
        with_credentials = engine_named or self._settings.node_credentials
        key = (name, with_credentials)
        async with self._locks.setdefault(name, trio.Lock()):
            found = self._found.get(key)
            if found and trio.current_time() - found[1] < FRESH_S and self._images.has(found[0]):
                return await self._checked(found[0], trusted=with_credentials)
            try:
                if engine_named:
                    await self._look_up(name, reference)
                digest = await self._from_registry(name, with_credentials, engine_named, progress)
            except (RegistryError, NotFoundError) as exc:
                may = engine_named or isinstance(exc, RegistryError)
                if may and found and self._images.has(found[0]):  # an older answer beats none
                    log.warning("registry does not answer, using the last index of %s", name)
                    return await self._checked(found[0], trusted=with_credentials)
                raise
            if len(self._found) >= MAX_REMEMBERED:
                self._found.clear()
            self._found[key] = (digest, trio.current_time())
            return await self._checked(digest, trusted=with_credentials)

    async def _look_up(self, name: str, reference: Reference) -> None:
        """Raises NotFoundError unless the registry is known to have an index of the image."""
        no_index = NotFoundError(f"image {name}: no index of it in the local store")
        if not self._registry_allowed(reference):
            raise no_index
        now = trio.current_time()
        if max(self._missing.get(name, now), self._missing.get(reference.registry, now)) > now:
            raise no_index
        access = RegistryAccess.from_settings(self._settings)
        quick = replace(
            access,
            connect_timeout_s=min(access.connect_timeout_s, LOOK_UP_S),
            read_timeout_s=min(access.read_timeout_s, LOOK_UP_S),
            deadline_s=min(access.deadline_s, LOOK_UP_S),
        )
        missing = name
        try:
            with trio.fail_after(LOOK_UP_S):
                # abandoned: it ends by the deadlines above
                if await trio.to_thread.run_sync(_has_index, name, quick, abandon_on_cancel=True):
                    return
        except trio.TooSlowError:
            log.info("registry %s is slow: images are not looked up there", reference.registry)
            missing = reference.registry
        except ClipError as exc:
            log.info("image %s: not looked up: %s", name, exc)
        if len(self._missing) >= MAX_REMEMBERED:
            self._missing.clear()
        self._missing[missing] = trio.current_time() + MISSING_S
        raise no_index

    async def _from_registry(
        self, name: str, with_credentials: bool, engine_named: bool, progress: Progress
    ) -> str:
        access = RegistryAccess.from_settings(self._settings, anonymous=not with_credentials)
        await progress({"message": f"looking for an index of {name}"})
        try:
            return await trio.to_thread.run_sync(self._pull, name, access)
        except NotFoundError:
            on_demand = self._settings.index_on_demand or self._settings.fallback == "unpack"
            if engine_named or not on_demand:
                raise NotFoundError(
                    f"image {name}: no index of it in the local store or its registry",
                    hint=f"make one: clipshim index {name}; or set index_on_demand = true",
                ) from None
        await progress({"message": f"indexing {name}"})
        return await self._index(name, with_credentials)

    def _pull(self, name: str, access: RegistryAccess) -> str:
        from clipshim.registry.artifacts import pull_index  # oras only when it is needed

        os.makedirs(self._images.directory, mode=0o700, exist_ok=True)
        path = f"{self._images.directory}/.new-{secrets.token_hex(8)}"
        try:
            pull_index(name, path, platform=None, access=access)
            return self._take_in(path, name)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _take_in(self, path: str, name: str) -> str:
        """Adds a file whose image must be the one asked for: the artifact is hostile too."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with open_index(fd) as index:
                if _repository(index.reference) != _repository(name):
                    raise PolicyError(
                        f"image {name}: its index is of {index.reference}",
                        hint="push an index made of this repository",
                    )
            return self._images.add(fd)
        finally:
            os.close(fd)

    async def _index(self, name: str, with_credentials: bool) -> str:
        """Indexes in a process of its own: decoding is the most exposed code, and it is hungry."""
        os.makedirs(self._images.directory, mode=0o700, exist_ok=True)
        path = f"{self._images.directory}/.new-{secrets.token_hex(8)}"
        started = time.monotonic()
        command = [sys.executable, "-I", "-m", "clipshim.node.index_worker", name, path]
        if not with_credentials:
            command.append("--anonymous")
        try:
            with trio.fail_after(INDEXING_TIMEOUT_S):
                done = await trio.run_process(
                    command, capture_stderr=True, capture_stdout=True, check=False
                )
            if done.returncode:
                lines = done.stderr.decode(errors="replace").strip().splitlines()
                raise RegistryError(
                    f"image {name}: indexing failed: {lines[-1] if lines else done.returncode}"
                )
            self.indexing_s(time.monotonic() - started)
            return await trio.to_thread.run_sync(self._take_in, path, name)
        except (trio.TooSlowError, subprocess.SubprocessError, OSError) as exc:
            raise RegistryError(f"image {name}: indexing failed: {str(exc) or 'too slow'}") from exc
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    # Policy

    def _registry_allowed(self, image: object) -> bool:
        return isinstance(image, Reference) and self._host_allowed(image.registry)

    def _host_allowed(self, host: str) -> bool:
        patterns = self._settings.allowed_registries
        return any(fnmatch.fnmatchcase(host, pattern) for pattern in patterns)

    def _check_registry(self, reference: Reference) -> None:
        if not self._registry_allowed(reference):
            raise PolicyError(
                f"image {reference}: registry {reference.registry} is not allowed",
                hint="allowed_registries in the configuration",
            )

    def allowed_urls(self, urls: tuple[str, ...]) -> tuple[str, ...]:
        """Those of an untrusted index's URLs of foreign layers that lead to allowed registries."""
        parsed = [(url, parse_url(url)) for url in urls]
        return tuple(
            url
            for url, parts in parsed
            if parts is not None and self._host_allowed(parts.netloc.rpartition("@")[2])
        )

    def check_source(self, index: Index) -> None:
        """Whether an untrusted index may have its bytes fetched. Raises PolicyError."""
        if index.has_blobs:
            return
        with contextlib.suppress(BadReferenceError):
            reference = parse_image(index.reference)
            if isinstance(reference, Reference):
                self._check_registry(reference)
                return
        raise PolicyError(f"index of {index.reference}: containers may name registries only")

    # Check

    async def _checked(self, digest: str, *, trusted: bool) -> Resolved:
        facts = await trio.to_thread.run_sync(self._images.facts, digest)
        path = self._images.path(digest)
        if facts is None:
            facts = await trio.to_thread.run_sync(self.check, digest)
        if not trusted and not _is_registry(facts.reference):
            await trio.to_thread.run_sync(self._check_untrusted, path)
        elif not trusted:
            reference = parse_image(facts.reference)
            assert isinstance(reference, Reference)
            self._check_registry(reference)
        return Resolved(facts, path, trusted)

    def _check_untrusted(self, path: str) -> None:
        with open_index(path) as index:
            self.check_source(index)

    def check(self, digest: str) -> ImageFacts:
        """Checks an index in full and keeps the verdict. Blocking."""
        with ClipFile.open(self._images.existing_path(digest)) as clip:
            large = clip.unpacked_bytes > LARGE_INDEX_BYTES
        return self._check_elsewhere(digest) if large else check_index(self._images, digest)

    def _check_elsewhere(self, digest: str) -> ImageFacts:
        """In a process of its own, one at a time: it takes memory and time."""
        with self._large:
            facts = self._images.facts(digest)
            if facts is not None:  # whoever was here before us was asked for the same
                return facts
            command = [sys.executable, "-I", "-m", "clipshim.node.check_worker", digest]
            try:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=CHECK_TIMEOUT_S,
                    check=False,
                )
            except (OSError, subprocess.SubprocessError) as exc:
                raise IndexFormatError(f"index {digest}: cannot be checked: {exc}") from exc
            facts = self._images.facts(digest)
            if done.returncode or facts is None:
                lines = done.stderr.decode(errors="replace").strip().splitlines()
                said = lines[-1] if lines else f"its check ended with {done.returncode}"
                raise IndexFormatError(said)
            return facts


def check_index(images: ImageNames, digest: str) -> ImageFacts:
    """Checks an index of the store in full, here, and keeps the verdict. Raises ClipError."""
    with open_index(images.existing_path(digest)) as index:
        if index.digest != digest:
            raise NotFoundError(f"index {digest}: the file holds {index.digest}")
        tree = check_tree(ErofsImage(index.tree()), [layer.size for layer in index.layers])
        facts = ImageFacts(
            image_id=index.image_id,
            digest=digest,
            reference=index.reference,
            has_proc=tree.has_proc,
            has_usr=tree.has_usr,
            top_symlinks={
                os.fsdecode(name): os.fsdecode(target) for name, target in tree.top_symlinks.items()
            },
        )
    images.keep_facts(facts)
    return facts


def _has_index(name: str, access: RegistryAccess) -> bool:
    from clipshim.registry.artifacts import find_index

    try:
        return find_index(name, platform=None, access=access) is not None
    finally:
        access.transport.close()


def _repository(name: str) -> str:
    with contextlib.suppress(ClipError):
        reference = parse_image(name)
        if isinstance(reference, Reference):
            return reference.name
    return name


def _is_registry(name: str) -> bool:
    with contextlib.suppress(BadReferenceError):
        return isinstance(parse_image(name), Reference)
    return False

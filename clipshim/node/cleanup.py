"""Garbage collection of a node: at the server's start and by `clipshim gc`.

Containers are container_cleanup.py's, in a process of its own. Here: holds of containers that
are gone, trees that nobody uses, mounts and files of trees that no record describes, indexes that
nobody named and nobody used for a week, profiles of images whose index is gone as long, and the
oldest ones beyond a bound. Cached spans are the layer store's own business.
"""

import contextlib
import json
import logging
import os
import sys
import time
from dataclasses import dataclass

import trio

from clipshim.errors import ClipError
from clipshim.lazy.profile import DRAFT as PROFILE_DRAFT
from clipshim.lazy.profile import profile_files, remove_profile
from clipshim.mounts import mountinfo
from clipshim.node.containers import read_containers
from clipshim.node.node import Node
from clipshim.node.unpacked import remove_quietly

log = logging.getLogger(__name__)

INDEX_AGE_S = 7 * 86400.0
PROFILE_AGE_S = 7 * 86400.0  # without its index; one that comes again finds what was learned
MAX_PROFILES = 4096
MAX_PROFILE_BYTES = 64 << 20  # of all; one of a large image has 50 kB
DRAFT_AGE_S = 86400.0
HOLD_AGE_S = 600.0
DRAFTS = (".new-", ".clip-", ".pull-")  # images.py, tree_records.py; clip_format.py; artifacts.py
PAUSE_S = 900.0  # containers of engines that crashed are found without anybody asking
CONTAINERS_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class IndexFile:
    """An index in the local store, as the choice sees it."""

    digest: str
    age_s: float  # since it was last used or added
    named: bool
    in_use: bool


def choose_indexes(files: list[IndexFile], age_s: float = INDEX_AGE_S) -> list[str]:
    """The digests of indexes to remove: neither named nor in use, and old."""
    return [f.digest for f in files if not f.named and not f.in_use and f.age_s > age_s]


@dataclass(frozen=True)
class ProfileFile:
    """What is known of an image's starts, as the choice sees it."""

    image_id: str
    age_s: float  # since a container last started
    size: int
    has_index: bool


def choose_profiles(
    files: list[ProfileFile],
    *,
    age_s: float = PROFILE_AGE_S,
    max_files: int = MAX_PROFILES,
    max_bytes: int = MAX_PROFILE_BYTES,
) -> list[str]:
    """The image IDs whose profiles go: old and without an index, then the oldest of too many."""
    victims = []
    count = size = 0
    for file in sorted(files, key=lambda file: file.age_s):
        count, size = count + 1, size + file.size
        orphan = not file.has_index and file.age_s > age_s
        if orphan or count > max_files or size > max_bytes:
            victims.append(file.image_id)
            count, size = count - 1, size - file.size
    return victims


def choose_holds(
    holds: list[str], known: set[str], seen: dict[str, float], now: float
) -> list[str]:
    """The holds of containers that have had no directory for long; `seen` says since when.

    A create makes the directory before it asks, a delete takes the hold back before it removes it:
    without one, whoever held the tree was killed, or could not tell.
    """
    lost = {hold for hold in holds if hold not in known}
    for hold in set(seen) - lost:
        del seen[hold]
    return sorted(hold for hold in lost if now - seen.setdefault(hold, now) > HOLD_AGE_S)


def choose_trees(found: set[str], known: set[str]) -> list[str]:
    """The image IDs that have files or mounts but no tree."""
    return sorted(found - known)


async def collect(node: Node, *, dry_run: bool, unused_trees: bool) -> list[str]:
    """Removes garbage, or only says what it would remove; one text for each thing."""
    async with node.collecting:
        return await _collect(node, dry_run=dry_run, unused_trees=unused_trees)


async def _collect(node: Node, *, dry_run: bool, unused_trees: bool) -> list[str]:
    removed = await clean_containers(dry_run=dry_run)
    trees = node.trees
    known = await trio.to_thread.run_sync(_known_holds, node)
    for hold in choose_holds(trees.in_use(), known, node.lost_holds, trio.current_time()):
        removed.append(f"hold of a container that is gone: {hold}")
        if not dry_run:
            trees.release(hold)
    if unused_trees:
        removed += [f"unused tree {tree.image_id}" for tree in trees.idle(0.0)]
        if not dry_run:
            await trees.unmount_idle(0.0)
    # a tree whose record this version cannot read may still be read by those who hold it
    held = await trio.to_thread.run_sync(_held_images, node)
    for image_id in choose_trees(await _tree_ids(node), set(trees.trees) | held):
        removed.append(f"stale tree {image_id}")
        if not dry_run:
            await trees.remove_stale(image_id)
    for image_id in choose_trees(unpacked_ids(node.unpacker.directory), set(trees.trees) | held):
        removed.append(f"unpacked image {image_id}")
        if not dry_run:
            path = node.unpacker.path(image_id)
            await trio.to_thread.run_sync(remove_quietly, path)
    files = await trio.to_thread.run_sync(_index_files, node, set(trees.trees))
    for digest in choose_indexes(files):
        removed.append(f"index {digest}")
        if not dry_run:
            await trio.to_thread.run_sync(node.images.remove, digest)
    profiles = await trio.to_thread.run_sync(_profile_files, node)
    for image_id in choose_profiles(profiles):
        removed.append(f"profile {image_id}")
        if not dry_run:
            await trio.to_thread.run_sync(remove_profile, node.prefetching.profiles, image_id)
    for directory in (node.images.directory, node.records.directory, node.prefetching.profiles):
        removed += await trio.to_thread.run_sync(remove_drafts, directory, dry_run)
    for text in removed:
        log.info("%s %s", "would remove" if dry_run else "removed", text)
    return removed


async def clean_containers(*, dry_run: bool) -> list[str]:
    """Runs container_cleanup.py. What fails is logged, not raised."""
    command = [sys.executable, "-I", "-m", "clipshim.node.container_cleanup"]
    if dry_run:
        command.append("--dry-run")
    removed = []
    with trio.move_on_after(CONTAINERS_TIMEOUT_S):
        done = await trio.run_process(
            command, capture_stdout=True, capture_stderr=True, check=False
        )
        if done.returncode:
            log.error("clean-up of containers: %s", done.stderr.decode(errors="replace").strip())
        for line in done.stdout.splitlines():
            report = json.loads(line)
            if report["kind"] == "error":
                log.error("container %s: %s", report["key"], report["detail"])
            else:
                removed.append(f"{report['kind']} {report['key']} ({report['detail']})")
        return removed
    log.error("clean-up of containers took too long")
    return removed


async def keep_clean(node: Node) -> None:
    """In the background of a server: at its start, and now and then."""
    while True:
        try:
            await collect(node, dry_run=False, unused_trees=False)
        except (ClipError, OSError, ValueError) as exc:
            log.error("clean-up: %s", exc)
        await trio.sleep(PAUSE_S)


async def _tree_ids(node: Node) -> set[str]:
    found = await trio.to_thread.run_sync(node.records.image_ids)
    parent = f"{node.settings.state_dir}/mnts"
    with contextlib.suppress(FileNotFoundError):
        found |= set(os.listdir(parent))
    for mount in mountinfo.mounts_beneath(parent):
        found.add(mount.mount_point.removeprefix(f"{parent}/").split("/")[0])
    return found


def _held_images(node: Node) -> set[str]:
    """What containers and mounts by hand are recorded with."""
    containers = read_containers(node.settings.run_dir)
    return {container.image_id for container in containers} | set(node.hand_mounts.all().values())


def _known_holds(node: Node) -> set[str]:
    """Containers that have a directory, whatever is in it, and mounts by hand."""
    return {*os.listdir(node.settings.run_dir), *node.hand_mounts.all()}


def unpacked_ids(directory: str) -> set[str]:
    """Images that were unpacked, and old drafts of some; a young draft is being written."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(directory):
            # not mtime: at its end a draft gets that of the image's own root
            age_s = time.time() - entry.stat(follow_symlinks=False).st_ctime
            if not entry.name.startswith(".") or age_s > DRAFT_AGE_S:
                found.add(entry.name)
    return found


def _index_files(node: Node, mounted: set[str]) -> list[IndexFile]:
    images = node.images
    named = set(images.names().values())
    in_use = {
        container.text("index_digest") for container in read_containers(node.settings.run_dir)
    }
    files = []
    now = time.time()
    for digest in images.digests():
        with contextlib.suppress(OSError):
            status = os.stat(images.path(digest))
            age_s = now - max(status.st_mtime, status.st_atime)
            used = digest in in_use or digest[7:39] in mounted
            files.append(IndexFile(digest, age_s, digest in named, used))
    return files


def _profile_files(node: Node) -> list[ProfileFile]:
    with_index = {digest[7:39] for digest in node.images.digests()}
    now = time.time()
    return [
        ProfileFile(image_id, now - status.st_mtime, status.st_size, image_id in with_index)
        for image_id, status in profile_files(node.prefetching.profiles)
    ]


def remove_drafts(directory: str, dry_run: bool) -> list[str]:
    """Half-written files of processes that died."""
    removed = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(directory):
            is_draft = entry.name.startswith(DRAFTS) or entry.name.endswith(PROFILE_DRAFT)
            if not is_draft or entry.is_dir(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > DRAFT_AGE_S:
                    removed.append(f"draft {entry.path}")
                    if not dry_run:
                        os.unlink(entry.path)
    return removed

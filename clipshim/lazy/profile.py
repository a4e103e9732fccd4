"""Profiles: which spans an image's containers touched while they started, in order.

    <state_dir>/profiles/<image ID>.json    {"version": 1, "starts": N, "spans": [[layer, span], …]}

The next start fetches them ahead, in that order. Not for watching starts (the node does).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

log = logging.getLogger(__name__)

VERSION = 1
MAX_ENTRIES = 20_000
MAX_FILE = 1 << 20
DRAFT = ".json.new"
# A span that so many starts in a row did not touch is no longer part of the start.
FORGET_AFTER = 5


class Profile(NamedTuple):
    """Touches in order; `missed` says how many starts in a row did without each."""

    spans: list[tuple[int, int]]
    missed: list[int]
    starts: int


EMPTY = Profile([], [], 0)


def merge(old: Profile, touches: Sequence[tuple[int, int]]) -> Profile:
    """The profile after one more start: its order first, then what earlier ones needed too."""
    fresh = list(dict.fromkeys(touches))[:MAX_ENTRIES]
    seen = set(fresh)
    spans, missed = list(fresh), [0] * len(fresh)
    for span, count in zip(old.spans, old.missed, strict=True):
        if span not in seen and count + 1 < FORGET_AFTER and len(spans) < MAX_ENTRIES:
            spans.append(span)
            missed.append(count + 1)
    return Profile(spans, missed, old.starts + 1)


def load_profile(directory: str, image_id: str) -> Profile:
    """What is known of an image; EMPTY if that is nothing or cannot be read."""
    path = _path(directory, image_id)
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(MAX_FILE + 1))
        if content["version"] != VERSION:
            return EMPTY
        spans = parse_entries(content["spans"])
        missed = [int(count) for count in content["missed"]]
        if len(missed) != len(spans):
            return EMPTY
        return Profile(spans, missed, int(content["starts"]))
    except FileNotFoundError:
        return EMPTY
    except (OSError, ValueError, KeyError, TypeError) as exc:
        log.warning("profile of %s: %s: it is made anew", image_id, exc)
        return EMPTY


def save_profile(directory: str, image_id: str, profile: Profile) -> None:
    """Replaces the profile. Raises OSError."""
    os.makedirs(directory, 0o700, exist_ok=True)
    path = _path(directory, image_id)
    content = {
        "version": VERSION,
        "starts": profile.starts,
        "spans": profile.spans,
        "missed": profile.missed,
    }
    temporary = f"{directory}/{image_id}{DRAFT}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "w") as file:
        json.dump(content, file, separators=(",", ":"))
    os.rename(temporary, path)


def record_start(directory: str, image_id: str, touches: Sequence[tuple[int, int]]) -> Profile:
    """Adds one container's start to the image's profile on disk. Raises OSError."""
    profile = merge(load_profile(directory, image_id), touches)
    save_profile(directory, image_id, profile)
    return profile


def profile_files(directory: str) -> list[tuple[str, os.stat_result]]:
    """The image IDs that have a profile, and what is known of its file."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(directory):
            image_id = entry.name.removesuffix(".json")
            if image_id != entry.name and _is_image_id(image_id):
                with contextlib.suppress(FileNotFoundError):
                    found.append((image_id, entry.stat(follow_symlinks=False)))
    return found


def remove_profile(directory: str, image_id: str) -> None:
    """Forgets what was learned of an image. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_path(directory, image_id))


def parse_entries(raw: object) -> list[tuple[int, int]]:
    """[[layer, span], …] from JSON, as in an index's profile section too. Raises ValueError."""
    if not isinstance(raw, list) or len(raw) > MAX_ENTRIES:
        raise ValueError("expected a list of at most that many spans as a profile may have")
    entries = []
    for item in raw:
        if not isinstance(item, (list, tuple)) or len(item) != 2:
            raise ValueError(f"expected [layer, span], got {item!r}")
        layer, span = item
        if type(layer) is not int or type(span) is not int or layer < 0 or span < 0:
            raise ValueError(f"expected [layer, span], got {item!r}")
        entries.append((layer, span))
    return entries


def within(entries: Iterable[tuple[int, int]], span_counts: Sequence[int]) -> list[tuple[int, int]]:
    """The entries that name a layer and a span that exist."""
    return [
        (layer, span)
        for layer, span in entries
        if layer < len(span_counts) and span < span_counts[layer]
    ]


def _path(directory: str, image_id: str) -> str:
    if not _is_image_id(image_id):
        raise ValueError(f"image ID {image_id!r}: not an image ID")
    return f"{directory}/{image_id}.json"


def _is_image_id(name: str) -> bool:
    return bool(name) and not set(name) - set("0123456789abcdef")

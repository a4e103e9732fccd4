"""What a program reads first, guessed from an image nobody has started yet.

The program that the image's configuration names, the dynamic loader and its cache, the C library
beside it, and the users and groups that the runtime looks up. All that is guessed is a place to
begin: the wait for the registry starts while the runtime still makes the container. Opens no file
of the container and reads no data: the tree tells where files lie. Not for what starts have
taught (profile.py).
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Any, NamedTuple

from clipshim.index.tree_path import walk_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from clipshim.index.erofs_read import ErofsImage
    from clipshim.index.span_table import SpanTable

USERS = (b"/etc/passwd", b"/etc/group")
LOADERS = (
    b"/lib64/ld-linux-x86-64.so.2",
    b"/lib/ld-linux-aarch64.so.1",
    b"/lib/ld-linux-armhf.so.3",
    b"/lib64/ld64.so.2",
    b"/lib/ld64.so.1",
    b"/lib/ld-linux-riscv64-lp64d.so.1",
    b"/lib/ld-musl-x86_64.so.1",
    b"/lib/ld-musl-aarch64.so.1",
)
CACHE = b"/etc/ld.so.cache"
LIBRARY = b"libc.so.6"  # musl is loader and library in one
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WHOLE_FILE = 8 << 20  # of a larger one only the headers, at its start, and the data, at its end
PART = 64 << 10
MAX_DEPTH = 1000


class Found(NamedTuple):
    """A file of the tree."""

    nid: int
    directory: list[bytes]  # its own, without links


def first_spans(
    tree: ErofsImage, config: dict[str, Any], tables: Sequence[SpanTable]
) -> list[tuple[int, int]]:
    """(layer number, span) in the order in which they are probably needed.

    Raises IndexFormatError if the tree contradicts itself.
    """
    spans: dict[tuple[int, int], None] = {}
    for nid in _files(tree, config):
        size = tree.stat(nid).size
        ranges = [(0, size)] if size <= WHOLE_FILE else [(0, PART), (size - PART, PART)]
        for offset, length in ranges:
            for device, start, extent in tree.extents(nid, offset, length):
                if not 0 < device <= len(tables) or start + extent > tables[device - 1].size:
                    continue
                table = tables[device - 1]
                touched = range(table.find(start), table.find(start + extent - 1) + 1)
                spans |= dict.fromkeys((device - 1, span) for span in touched)
    return list(spans)


def _files(tree: ErofsImage, config: dict[str, Any]) -> Iterator[int]:
    for path in USERS:
        if found := _resolve(tree, path):
            yield found.nid
    if program := _program(tree, config):
        yield program.nid
    for path in LOADERS:
        if loader := _resolve(tree, path):
            yield loader.nid
            if cache := _resolve(tree, CACHE):
                yield cache.nid
            if library := _resolve(tree, b"/" + b"/".join([*loader.directory, LIBRARY])):
                yield library.nid


def _program(tree: ErofsImage, config: dict[str, Any]) -> Found | None:
    """The file that a container runs if nobody says otherwise."""
    wishes = config.get("config")
    if not isinstance(wishes, dict):
        return None
    words = _texts(wishes.get("Entrypoint")) + _texts(wishes.get("Cmd"))
    if not words:
        return None
    if "/" in words[0]:
        places = [words[0]]
    else:
        search = DEFAULT_PATH
        for text in _texts(wishes.get("Env")):
            if text.startswith("PATH="):
                search = text.removeprefix("PATH=")
        places = [f"{directory}/{words[0]}" for directory in search.split(":") if directory]
    for place in places:
        if found := _resolve(tree, place.encode(errors="replace")):
            return found
    return None


def _texts(value: object) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _resolve(tree: ErofsImage, path: bytes) -> Found | None:
    """The regular file at a path."""
    trail = walk_path(tree, path)
    if not trail or len(trail) > MAX_DEPTH or not stat.S_ISREG(tree.stat(trail[-1][1]).mode):
        return None
    return Found(trail[-1][1], [name for name, _ in trail[:-1]])

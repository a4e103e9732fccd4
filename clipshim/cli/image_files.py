"""Reads single files of an image through its index, without the node daemon.

For /etc/passwd and /etc/group and what volumes begin with, when a bundle or a stub is made: a few
spans are fetched, verified and thrown away. Not for bulk reading: nothing is cached.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from clipshim.errors import DigestError, UsageError
from clipshim.index.span_decode import decode_group
from clipshim.index.tree_check import sound_tree
from clipshim.registry.blobs import BlobReader, locate_blob

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clipshim.index.model import Index
    from clipshim.registry.access import RegistryAccess

MAX_FILE_BYTES = 4 << 20  # a passwd file of 40,000 accounts; more is no passwd file
MAX_ENTRIES = 200
MAX_LINKS = 40  # what the kernel follows
DEADLINE_S = 120.0  # of one piece
PIECE_BYTES = 4 << 20


class FileEntry(NamedTuple):
    """A regular file, directory or symbolic link (its content is the target) of an image."""

    content: bytes
    mode: int  # with the type's bits
    uid: int
    gid: int
    mtime_ns: int


class ImageFiles:
    """Files of one image. Use as a context manager. Raises IndexFormatError for a bad tree."""

    def __init__(self, index: Index, access: RegistryAccess) -> None:
        self._index = index
        self._access = access
        self._image = sound_tree(index)
        self._tree = self._image.buffer
        self._reader: BlobReader | None = None
        self._spans: dict[tuple[int, int], bytes] = {}

    def __enter__(self) -> ImageFiles:
        return self

    def __exit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.close()

    def entry(self, path: str) -> FileEntry | None:
        """A regular file or directory with its attributes, None when there is none at `path`."""
        nid = self._walk(path)
        if nid is None:
            return None
        facts = self._image.stat(nid)
        if stat.S_ISDIR(facts.mode):
            content: bytes | None = b""
        else:
            content = self.read(path)
        if content is None:
            return None
        return FileEntry(content, facts.mode, facts.uid, facts.gid, facts.mtime_ns)

    def way(self, path: str) -> dict[str, FileEntry]:
        """The directories and links that an absolute `path` leads through, as far as it leads.

        By their own names, in the order of the way; the last may be `path` itself.
        """
        found: dict[str, FileEntry] = {}
        pending = [part for part in os.fsencode(path).split(b"/") if part]
        trail: list[tuple[bytes, int]] = []
        links = 0
        while pending:
            name = pending.pop(0)
            if name in (b".", b".."):
                del trail[len(trail) - (name == b"..") :]
                continue
            here = trail[-1][1] if trail else self._image.root_nid
            nid = self._image.lookup(here, name)
            if nid is None:
                break
            mode = self._image.stat(nid).mode
            if not (stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
                break
            entry = self._entry(nid)
            full = b"/".join((b"", *(part for part, _ in trail), name))
            found[os.fsdecode(full)] = entry
            if stat.S_ISDIR(entry.mode):
                trail.append((name, nid))
                continue
            links += 1
            if links > MAX_LINKS:
                break
            if entry.content.startswith(b"/"):
                trail = []
            pending = [part for part in entry.content.split(b"/") if part] + pending
        return found

    def below(self, path: str, *, limit: int) -> dict[str, FileEntry] | None:
        """All directories, files and links below the directory `path`, which has no link in it.

        None when they are more than `limit` bytes or MAX_ENTRIES, or not all can be had like this.
        """
        top = self._walk(path)
        if top is None or not stat.S_ISDIR(self._image.stat(top).mode):
            return {}
        found: dict[str, int] = {}
        directories = [(path.rstrip("/"), top)]
        while directories:
            base, parent = directories.pop()
            for name, nid, _ in self._image.readdir(parent):
                facts = self._image.stat(nid)
                full = f"{base}/{os.fsdecode(name)}"
                found[full] = nid
                if stat.S_ISDIR(facts.mode):
                    directories.append((full, nid))
                elif stat.S_ISREG(facts.mode):
                    limit -= facts.size
                elif not stat.S_ISLNK(facts.mode):
                    return None
                if limit < 0 or len(found) > MAX_ENTRIES or self._image.xattrs(nid):
                    return None
        return {name: self._entry(nid) for name, nid in found.items()}

    def _entry(self, nid: int) -> FileEntry:
        facts = self._image.stat(nid)
        if stat.S_ISLNK(facts.mode):
            content = self._image.readlink(nid)
        else:
            content = self._content(nid, facts.size) if stat.S_ISREG(facts.mode) else b""
        return FileEntry(content, facts.mode, facts.uid, facts.gid, facts.mtime_ns)

    def is_directory(self, path: str) -> bool:
        """Whether `path` leads to a directory."""
        nid = self._walk(path)
        return nid is not None and stat.S_ISDIR(self._image.stat(nid).mode)

    def read(self, path: str, *, limit: int = MAX_FILE_BYTES) -> bytes | None:
        """The content of a regular file, None when there is none at `path`.

        Raises UsageError when it is larger than `limit`, DigestError when a span does not match.
        """
        nid = self._walk(path)
        if nid is None:
            return None
        facts = self._image.stat(nid)
        if not stat.S_ISREG(facts.mode):
            return None
        if facts.size > limit:
            raise UsageError(f"{path} of {self._index.reference}: larger than {limit} bytes")
        return self._content(nid, facts.size)

    def _content(self, nid: int, size: int) -> bytes:
        content = bytearray()
        for device, offset, length in self._image.extents(nid, 0, size):
            if device < 0:
                content += bytes(length)
            elif device == 0:
                content += self._tree[offset : offset + length]
            else:
                content += self._layer_bytes(device - 1, offset, length)
        return bytes(content[:size])

    def _walk(self, path: str | bytes) -> int | None:
        """The nid that an absolute `path` leads to; links lead nowhere outside of the image."""
        image = self._image
        pending = [part for part in os.fsencode(path).split(b"/") if part]
        trail = [image.root_nid]
        links = 0
        while pending:
            name = pending.pop(0)
            if name == b".":
                continue
            if name == b"..":
                if len(trail) > 1:
                    trail.pop()
                continue
            if not stat.S_ISDIR(image.stat(trail[-1]).mode):
                return None
            nid = image.lookup(trail[-1], name)
            if nid is None:
                return None
            if stat.S_ISLNK(image.stat(nid).mode):
                links += 1
                if links > MAX_LINKS:
                    return None
                target = image.readlink(nid)
                if target.startswith(b"/"):
                    trail = [image.root_nid]
                pending = [part for part in target.split(b"/") if part] + pending
                continue
            trail.append(nid)
        return trail[-1]

    def _layer_bytes(self, layer: int, offset: int, length: int) -> bytes:
        table = self._index.span_table(layer)
        content = bytearray()
        end = offset + length
        while offset < end:
            number = table.find(offset)
            span = table[number]
            data = self._span(layer, number)
            begin = offset - span.uncompressed_offset
            part = data[begin : begin + end - offset]
            content += part
            offset += len(part)
        return bytes(content)

    def _span(self, layer: int, number: int) -> bytes:
        known = self._spans.get((layer, number))
        if known is not None:
            return known
        table = self._index.span_table(layer)
        span = table[number]
        window = self._index.window(layer, span) if span.window is not None else None
        # of a range that many spans share, as one large zstd frame, no more than leads to this one
        sizes = [table[i].uncompressed_size for i in range(table.group(number).start, number + 1)]
        pieces = self._pieces(layer, span.compressed_offset, span.compressed_size)
        decoded = decode_group(span.kind, span.bits, window, pieces, sizes)
        (data,) = deque(decoded, maxlen=1)  # the last one, without keeping the others
        found = hashlib.sha256(data).digest()
        if found != span.digest:
            raise DigestError(
                f"layer {self._index.layers[layer].diff_id}: span {number}: "
                f"expected digest {span.digest.hex()}, got {found.hex()}",
                hint="the registry returned other bytes than were indexed: index the image again",
            )
        self._spans[(layer, number)] = data
        return data

    def _pieces(self, layer: int, start: int, length: int) -> Iterator[bytes]:
        for done in range(0, length, PIECE_BYTES):
            yield self._fetch(layer, start + done, min(PIECE_BYTES, length - done))

    def _fetch(self, layer: int, start: int, length: int) -> bytes:
        if self._index.has_blobs:
            fd, offset, _size = self._index.blob(layer)
            return os.pread(fd, length, offset + start)
        if self._reader is None:
            self._reader = BlobReader(self._access)
        info = self._index.layers[layer]
        blob = locate_blob(self._index.reference, info.blob_digest, info.blob_size, info.urls)
        return self._reader.read_range(blob, start, length, deadline=time.monotonic() + DEADLINE_S)

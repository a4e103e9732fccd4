"""One layer in the layer store: which of its spans are on disk, and reading and writing them.

Not for deciding what to keep (layer_store.py) nor for checking digests of what is put; it only
checks again what a host reset may have torn.

    <layer_store>/<layer key>/    0700, made when the first span is put
        data        sparse file of the layer's uncompressed size
        spans       header, then one bit a span: present
        boot        JSON: boot ID, and whether everything marked is known to be on the disk
        complete    exists when the whole layer was hashed and matched its diff ID

Crashes
- Data is written before its bit, both through the page cache, so a process that dies leaves
  nothing marked that is not there.
- After a host reset (another boot ID) marks and data may have reached the disk in any order: if
  the layer was not clean, every marked span is a suspect, checked against its digest before use.
  `clean` is written after fdatasync, and taken back, with fsync, before the next change.
- `complete` is written after fdatasync and removed, with fsync, before the first eviction, so it
  is trusted after a reset.

Eviction against reads: eviction clears the bit, then raises `_generation`, then punches the hole.
A read notes the generation, checks the bits, reads, and starts over if the generation has moved:
no lock on the way of a read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import threading
import time
from array import array
from typing import TYPE_CHECKING, Protocol

from clipshim.errors import StoreError, remedy
from clipshim.lazy.layer_files import FULL, DamageError, LayerFiles

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from clipshim.lazy.open_files import OpenFiles

log = logging.getLogger(__name__)

HASH_PIECE = 1 << 20


class StoreFullError(StoreError):
    """There is no room for a span: it must be served from memory."""

    errno = errno.ENOSPC


class SpanLike(Protocol):
    """What the store needs of a span; index.model.Span has it."""

    @property
    def uncompressed_offset(self) -> int: ...

    @property
    def uncompressed_size(self) -> int: ...

    @property
    def digest(self) -> bytes: ...


class Spans(Protocol):
    """The spans of a layer in order; index.span_table.SpanTable has it."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> SpanLike: ...


class Room(Protocol):
    """What a layer needs of its store."""

    files: OpenFiles
    boot_id: str

    def reserve(self, size: int) -> None:
        """Accounts for bytes about to be written. Raises StoreFullError."""
        ...

    def unreserve(self, size: int) -> None:
        """Takes back a reservation or accounts for an eviction."""
        ...

    def refused(self, size: int) -> None:
        """The disk did not take so many bytes that were reserved: a quota, or others' files."""
        ...

    def count(self, event: str, number: int = 1) -> None:
        """Counts an event for the statistics."""
        ...


class StoredLayer:
    """Spans of one layer on disk. Thread-safe. Made by LayerStore.open."""

    def __init__(self, directory: str, key: str, size: int, spans: Spans, room: Room) -> None:
        self.directory = directory
        self.key = key
        self.size = size
        self.spans = spans
        self._files = LayerFiles(directory, size, len(spans), room.files, room.boot_id)
        self.data_path = self._files.data_path
        self.used_bytes = 0
        self.is_complete = False
        self.readers = 0  # LayerStore.open calls without a release
        self.pins = 0
        self.last_use = array("d", bytes(8 * len(spans)))  # time.monotonic() of a span's last use
        self._starts = array("Q", (spans[i].uncompressed_offset for i in range(len(spans))))
        self._room = room
        self._bits = bytearray((len(spans) + 7) // 8)
        self._suspects: set[int] = set()
        self._writing: set[int] = set()
        self._punching: set[int] = set()
        self._generation = 0
        self._changes = 0
        self._clean = False
        self._files_exist = False
        self._epoch = 0  # of the files: a write that began before a reset must not be marked
        self._closed = False
        self._nowait = hasattr(os, "RWF_NOWAIT")
        self._lock = threading.Lock()
        self._load()

    # -- looking

    def find(self, offset: int) -> int:
        """The span that holds the byte at `offset`."""
        low, high = 0, len(self._starts)
        while high - low > 1:
            middle = (low + high) // 2
            if self._starts[middle] <= offset:
                low = middle
            else:
                high = middle
        return low

    def has(self, span: int) -> bool:
        """Whether the span can be read from the disk now."""
        return bool(self._bits[span >> 3] >> (span & 7) & 1) and span not in self._suspects

    def is_suspect(self, span: int) -> bool:
        """Whether the span must be checked with verify_suspect before use."""
        return span in self._suspects

    def missing(self, offset: int, size: int) -> list[int]:
        """The spans of a range that cannot be read from the disk now."""
        if size <= 0 or offset >= self.size:
            return []
        first = self.find(offset)
        last = self.find(min(offset + size, self.size) - 1)
        return [span for span in range(first, last + 1) if not self.has(span)]

    @property
    def present_spans(self) -> int:
        """How many spans are on the disk, suspects included."""
        return int.from_bytes(self._bits, "little").bit_count()

    # -- reading

    def read(self, offset: int, size: int, *, nowait: bool = False) -> bytearray | None:
        """The bytes of a range inside the layer, or None if a span of it is missing.

        `nowait`: raise BlockingIOError rather than wait for the disk.
        """
        size = min(size, self.size - offset)
        if size <= 0:
            return bytearray()
        first, last = self.find(offset), self.find(offset + size - 1)
        now = time.monotonic()
        while True:
            generation = self._generation
            for span in range(first, last + 1):
                if not self.has(span):
                    return None
                self.last_use[span] = now
            try:
                data = self._pread(offset, size, nowait=nowait)
            except FileNotFoundError:  # removed under our feet
                self._reset("its data file has vanished")
                return None
            if generation == self._generation:
                if len(data) != size:
                    self._reset(f"data file: expected {self.size} bytes, got less")
                    return None
                return data

    def _pread(self, offset: int, size: int, *, nowait: bool) -> bytearray:
        data = bytearray(size)
        with self._room.files.using(self.data_path) as fd:
            if nowait:
                if not self._nowait:
                    raise BlockingIOError(errno.EAGAIN, "this file system knows no RWF_NOWAIT")
                try:
                    done = os.preadv(fd, [data], offset, os.RWF_NOWAIT)
                except BlockingIOError:
                    raise
                except OSError as exc:
                    if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
                    self._nowait = False
                    raise BlockingIOError(errno.EAGAIN, "no RWF_NOWAIT here") from exc
                if done != size:
                    raise BlockingIOError(errno.EAGAIN, "partly in the page cache")
                return data
            view = memoryview(data)
            done = 0
            while done < size:
                count = os.preadv(fd, [view[done:]], offset + done)
                if not count:
                    break
                done += count
        return data if done == size else data[:done]

    def iterate(self, start: int, stop: int) -> Iterator[bytearray]:
        """The bytes of a range that is present, in pieces. Raises StoreError if a span is gone."""
        while start < stop:
            piece = self.read(start, min(HASH_PIECE, stop - start))
            if not piece:
                raise StoreError(f"layer {self.key}: spans at {start} were evicted meanwhile")
            yield piece
            start += len(piece)

    def suspect(self, offset: int, size: int) -> None:
        """The disk failed to give a range: its spans are checked, or fetched, again."""
        if size > 0 and offset < self.size:
            first, last = self.find(offset), self.find(min(offset + size, self.size) - 1)
            with self._lock:
                self._suspects.update(span for span in range(first, last + 1) if self.has(span))

    def verify_suspect(self, span: int) -> bool:
        """Checks a suspect against its digest; what does not match is forgotten. Blocking."""
        entry = self.spans[span]
        with self._lock:
            if span not in self._suspects:
                return self.has(span)
        digest = hashlib.sha256()
        position, end = (
            entry.uncompressed_offset,
            entry.uncompressed_offset + entry.uncompressed_size,
        )
        with contextlib.suppress(OSError):
            while position < end:
                piece = self._pread(position, min(HASH_PIECE, end - position), nowait=False)
                if not piece:
                    break
                digest.update(piece)
                position += len(piece)
        good = position == end and digest.digest() == entry.digest
        with self._lock:
            if span in self._suspects:
                if good:
                    self._room.count("suspects_good")
                else:
                    self._room.count("suspects_bad")
                    self._clear(span)
                self._suspects.discard(span)
                if not self._suspects:  # from now on this boot's page cache is the truth
                    with contextlib.suppress(OSError):  # full: then the next server checks again
                        self._files.write_boot(clean=False, durable=False)
        return good

    # -- writing

    def put(self, span: int, data: bytes | bytearray | memoryview) -> None:
        """Stores a span whose digest the caller has checked. Raises StoreFullError."""
        if len(data) != self.spans[span].uncompressed_size:
            raise StoreError(
                f"layer {self.key}: span {span}: expected"
                f" {self.spans[span].uncompressed_size} bytes, got {len(data)}"
            )
        with self.writing(span) as writer:
            writer.write(data)
            writer.commit()

    @contextlib.contextmanager
    def writing(self, span: int) -> Iterator[SpanWriter]:
        """Writes a span in pieces; it counts only after commit(). Raises StoreFullError."""
        size = self.spans[span].uncompressed_size
        with self._lock:
            if span in self._writing or span in self._punching:
                raise StoreFullError(f"layer {self.key}: span {span} is being written or evicted")
            present = bool(self._bits[span >> 3] >> (span & 7) & 1)
            self._writing.add(span)
        writer = None
        reserved = refused = False
        try:
            if not present:
                self._room.reserve(size)
                reserved = True
            try:
                self._make_files()
                epoch = self._epoch
                with self._room.files.using(self.data_path) as fd:
                    writer = SpanWriter(self, span, fd, self._starts[span], size, epoch)
                    yield writer
            except OSError as exc:
                if exc.errno in FULL:
                    refused = exc.errno != errno.EFBIG  # which no eviction helps against
                    raise StoreFullError(f"layer {self.key}: {exc.strerror}") from exc
                raise
        finally:
            if writer is None or not writer.committed:
                if writer is not None and not present:
                    self._files.punch(self._starts[span], size)
                if reserved:
                    self._room.unreserve(size)
            with self._lock:
                self._writing.discard(span)
            if refused:
                self._room.refused(size)

    def _commit(self, span: int, epoch: int) -> None:
        with self._lock:
            if self._closed or epoch != self._epoch:
                raise StoreFullError(f"layer {self.key}: closed or reset while it was written")
            self._changes += 1
            self._unclean()
            if not self._bits[span >> 3] >> (span & 7) & 1:
                self._bits[span >> 3] |= 1 << (span & 7)
                self.used_bytes += self.spans[span].uncompressed_size
            self._suspects.discard(span)
            self._save_bits(span)
            self.last_use[span] = time.monotonic()

    def evict(self, spans: Sequence[int]) -> int:
        """Gives back the disk space of spans, but of those being written. Returns bytes freed."""
        freed = 0
        victims = []
        try:
            with self._lock:
                if self.pins or self._closed:
                    return 0
                self._unclean()
                self._incomplete()
                for span in spans:
                    if span not in self._writing and self._bits[span >> 3] >> (span & 7) & 1:
                        self._changes += 1
                        self._punching.add(span)
                        victims.append(span)
                        self._clear(span)
                        self._suspects.discard(span)
                self._generation += 1
            for span in victims:
                size = self.spans[span].uncompressed_size
                self._files.punch(self._starts[span], size)
                freed += size
        finally:  # a bitmap that cannot be written must not keep a span from being put again
            with self._lock:
                self._punching.difference_update(victims)
        return freed

    def present(self) -> list[int]:
        """The spans that an eviction could take."""
        return [span for span in range(len(self.spans)) if self._bits[span >> 3] >> (span & 7) & 1]

    def mark_complete(self) -> None:
        """The caller has hashed all of it. Makes that durable. Raises StoreError if it is not."""
        self.sync()
        with self._lock:
            if self.present_spans != len(self.spans) or self._suspects:
                raise StoreError(f"layer {self.key}: spans were evicted meanwhile")
            try:
                if not len(self.spans):
                    self._make_files()
                self._files.write_complete()
            except OSError as exc:
                raise StoreError(f"layer {self.key}: {exc.strerror}") from exc
            self.is_complete = True

    def sync(self) -> None:
        """Brings what is marked to the disk and notes it. Blocking."""
        with self._lock:
            if self._clean or not self._files_exist:
                return
            changes = self._changes
        try:
            self._files.sync()
        except FileNotFoundError:
            return  # removed meanwhile
        except OSError as exc:
            # The kernel drops dirty pages that it could not write: the page cache may be stale.
            log.error("layer %s: sync: %s: every span is checked again", self.key, exc.strerror)
            with self._lock:
                self._suspects.update(self.present())
                self._incomplete()
            return
        with self._lock:
            if changes == self._changes and not self._suspects:
                with contextlib.suppress(OSError):
                    self._files.write_boot(clean=True, durable=True)
                    self._clean = True

    def close(self) -> None:
        """Syncs; from now on nothing is present here and nothing can be put.

        Another object may own the files next, and a straggling thread must not spoil them.
        """
        self.sync()
        with self._lock:
            self._closed = True
            self._generation += 1
            self._bits[:] = bytes(len(self._bits))
            self._suspects.clear()
        self._files.forget()

    def reset(self, cause: str) -> None:
        """Throws everything away: what is there cannot be right."""
        self._reset(cause)

    # -- files

    def _load(self) -> None:
        try:
            found = self._files.load()
        except OSError as exc:
            if exc.errno != errno.EIO:  # out of descriptors, say: that is no reason to lose it
                raise StoreError(
                    f"layer {self.key}: store: {exc.strerror}", hint=remedy(exc)
                ) from exc
            self._reset(f"cannot be read: {exc.strerror}")
            return
        except DamageError as exc:
            self._reset(str(exc))
            return
        if found is None:
            return
        self._files_exist = True
        self.is_complete = found.complete
        self._bits[:] = found.bits
        if found.complete:
            for span in range(len(self.spans)):
                self._bits[span >> 3] |= 1 << (span & 7)
        present = self.present()
        self.used_bytes = sum(self.spans[span].uncompressed_size for span in present)
        if found.complete:
            return
        self._clean = found.clean
        if found.boot_id != self._room.boot_id and not found.clean:
            self._suspects = set(present)
            if present:
                log.warning(
                    "layer %s: the host went down before it was synced:"
                    " %d spans are checked again when they are needed",
                    self.key,
                    len(present),
                )

    def _make_files(self) -> None:
        if self._files_exist:
            return
        with self._lock:
            if self._closed:
                raise StoreFullError(f"layer {self.key}: closed")
            if not self._files_exist:
                self._files.create(self._bits)
                self._files_exist = True
                self._clean = False

    def _reset(self, cause: str) -> None:
        with self._lock:
            if self._closed:
                return
            log.error("layer %s: store: %s: the layer is fetched again", self.key, cause)
            self._room.count("resets")
            self._generation += 1
            self._changes += 1
            self._bits[:] = bytes(len(self._bits))
            self._suspects.clear()
            self.is_complete = False
            freed, self.used_bytes = self.used_bytes, 0
            self._remove_files()
        self._room.unreserve(freed)

    def _remove_files(self) -> None:
        self._files_exist = False
        self._epoch += 1
        self._clean = False
        self._files.remove()

    def _clear(self, span: int) -> None:
        if self._bits[span >> 3] >> (span & 7) & 1:
            self._bits[span >> 3] &= ~(1 << (span & 7))
            size = self.spans[span].uncompressed_size
            self.used_bytes -= size
            self._room.unreserve(size)
            self._save_bits(span)

    def _save_bits(self, span: int) -> None:
        byte = span >> 3
        try:
            self._files.write_bits(self._bits[byte : byte + 1], byte)
        except OSError as exc:
            # A lost set is a span fetched again; a lost clear must not happen.
            if not self._bits[byte] >> (span & 7) & 1:
                raise
            log.warning("layer %s: bitmap: %s", self.key, exc.strerror)

    def _unclean(self) -> None:
        if self._clean:
            self._files.write_unclean()
            self._clean = False

    def _incomplete(self) -> None:
        if self.is_complete:
            self._files.remove_complete(self._bits)
            self.is_complete = False
            self._clean = False


class SpanWriter:
    """Writes one span from its start, in pieces."""

    __slots__ = ("_end", "_epoch", "_fd", "_layer", "_position", "_span", "committed")

    def __init__(
        self, layer: StoredLayer, span: int, fd: int, start: int, size: int, epoch: int
    ) -> None:
        self._layer = layer
        self._span = span
        self._fd = fd
        self._position = start
        self._end = start + size
        self._epoch = epoch
        self.committed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes. OSError from the disk ends the with block as StoreFullError or itself."""
        view = memoryview(data)
        if self._position + len(view) > self._end:
            raise StoreError(f"layer {self._layer.key}: span {self._span}: too many bytes")
        while view:
            count = os.pwrite(self._fd, view, self._position)
            self._position += count
            view = view[count:]

    def commit(self) -> None:
        """Everything is written and was checked: from now on it can be read."""
        if self._position != self._end:
            raise StoreError(f"layer {self._layer.key}: span {self._span}: bytes are missing")
        self._layer._commit(self._span, self._epoch)
        self.committed = True

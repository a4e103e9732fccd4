"""One layer read once: its digests, its spans with what is needed to decode them, its entries.

Three threads a layer, connected by bounded queues: one reads and decompresses, one hashes, one
walks the tar and reduces windows. All but the tar walk works mostly outside of the interpreter's
lock. What becomes of several layers is builder.py's.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Final, Generic, TypeVar

from clipshim.errors import DigestError, LayerError, StoreError
from clipshim.index.gzip_checkpoints import Range, pack_window, scan_gzip
from clipshim.index.model import LayerInfo, is_plain
from clipshim.index.span_decode import GZIP_MAGIC
from clipshim.index.span_table import Span, SpanTable
from clipshim.index.tar_walk import TarEntry, TarWalker
from clipshim.index.zstd_frames import is_zstd, scan_zstd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from clipshim.index.span_table import LayerCompression
    from clipshim.registry.sources import ImageSource

T = TypeVar("T")

_INPUT: Final = 128 << 10
_QUEUED: Final = 8  # chunks that may wait for a consumer


@dataclass(slots=True)
class ScannedLayer:
    """What one pass over a layer gave."""

    label: str
    diff_id: str
    blob_digest: str
    media_type: str
    urls: tuple[str, ...]
    table: SpanTable
    windows: list[bytes]
    entries: list[TarEntry]
    spool: IO[bytes] | None  # the blob, if it is to be embedded

    def info(self, key: str) -> LayerInfo:
        """The layer as the index describes it."""
        return LayerInfo(
            diff_id=self.diff_id,
            blob_digest=self.blob_digest,
            media_type=self.media_type,
            blob_size=self.table.blob_size,
            size=self.table.size,
            compression=self.table.compression,
            urls=self.urls,
            key=key,
        )


def scan_layer(
    source: ImageSource,
    i: int,
    diff_id: str,
    *,
    spacing: int,
    max_size: int,
    spool: IO[bytes] | None,
    advanced: Callable[[int], None],
) -> ScannedLayer:
    """Reads layer `i` of `source` and checks it against its digest, size and diff ID.

    `advanced` is told how many bytes of the blob have been read and may raise to stop. `spool` gets
    a copy of the blob. Raises LayerError, DigestError, StoreError, and what the source raises.
    """
    descriptor = source.layers[i]
    label = f"layer {i} ({descriptor.digest})"
    walker = TarWalker(label)
    digester = _Digester(max_span=2 * spacing)
    windows: list[bytes] = []

    def walk(item: memoryview | Range) -> None:
        if isinstance(item, Range):
            windows.append(pack_window(item))
        else:
            walker.feed(item)

    with (
        _Consumer("digests", digester.feed) as digests,
        _Consumer("tar", walk) as tar,
        source.open_layer(i) as stream,
    ):
        blob = _Blob(stream, descriptor.size, label, digests.put, spool, advanced)
        compression, events = _scan(blob, spacing, label)
        made = 0
        for event in events:
            if isinstance(event, memoryview):
                made += len(event)
                if made > max_size:
                    raise LayerError(f"{label}: uncompressed it has more than {max_size} bytes")
            digests.put(event)
            tar.put(event)
        blob.finish()
        digests.finish()
        tar.finish()
    _check_digest(label, "digest", descriptor.digest, digester.blob.hexdigest())
    _check_digest(label, "diff ID", diff_id, digester.layer.hexdigest())
    return ScannedLayer(
        label=label,
        diff_id=diff_id,
        blob_digest=descriptor.digest,
        media_type=descriptor.media_type,
        urls=tuple(url for url in descriptor.urls if is_plain(url)),
        table=SpanTable(compression, made, descriptor.size, digester.spans(windows)),
        windows=windows,
        entries=walker.close(),
        spool=spool,
    )


def _scan(
    blob: _Blob, spacing: int, label: str
) -> tuple[LayerCompression, Iterator[memoryview | Range]]:
    """Scans by what the blob is, whatever its media type claims, as engines do."""
    head = blob.peek()
    if head.startswith(GZIP_MAGIC):
        return "gzip", scan_gzip(blob.read, spacing, label)
    if is_zstd(head):
        return "zstd", scan_zstd(blob.read, spacing, label)
    return "none", _scan_plain(blob.read, spacing)


def _check_digest(label: str, what: str, expected: str, got: str) -> None:
    if expected != f"sha256:{got}":
        raise DigestError(f"{label}: {what}: expected {expected}, got sha256:{got}")


def _scan_plain(read: Callable[[int], bytes], spacing: int) -> Iterator[memoryview | Range]:
    start = made = 0
    while chunk := read(min(_INPUT, spacing - made)):
        yield memoryview(chunk)
        made += len(chunk)
        if made == spacing:
            yield Range("plain", start, made, 0, None)
            start, made = start + made, 0
    if made:
        yield Range("plain", start, made, 0, None)


class _Blob:
    """A layer's blob on its way to the scanner: counted, hashed and, to be embedded, kept."""

    def __init__(
        self,
        stream: BinaryIO,
        size: int,
        label: str,
        digest: Callable[[bytes], None],
        spool: IO[bytes] | None,
        advanced: Callable[[int], None],
    ) -> None:
        self._stream, self._size, self._label = stream, size, label
        self._digest, self._spool, self._advanced = digest, spool, advanced
        self._done = 0
        self._head: bytes | None = None

    def peek(self) -> bytes:
        """The first bytes, which read() will give again."""
        head = b""
        while len(head) < 4 and (more := self.read(_INPUT)):
            head += more
        self._head = head
        return head

    def read(self, size: int) -> bytes:
        if self._head is not None:
            chunk = self._head[:size]
            self._head = self._head[size:] or None
            return chunk
        chunk = self._stream.read(size)
        if chunk:
            self._done += len(chunk)
            if self._done > self._size:
                raise DigestError(f"{self._label}: expected {self._size} bytes, got more")
            self._digest(chunk)
            if self._spool is not None:
                self._keep(chunk)
            self._advanced(self._done)
        return chunk

    def _keep(self, chunk: bytes) -> None:
        assert self._spool is not None
        try:
            self._spool.write(chunk)
        except OSError as exc:
            raise StoreError(f"{self._label}: cannot keep the blob: {exc.strerror}") from exc

    def finish(self) -> None:
        """Checks that the scanner has read everything there is."""
        while self.read(_INPUT):
            pass
        if self._done != self._size:
            raise DigestError(f"{self._label}: expected {self._size} bytes, got {self._done}")


@dataclass(slots=True)
class _Piece:
    """A range with the sizes and digests of its spans."""

    range: Range
    spans: list[tuple[int, bytes]]


@dataclass(slots=True)
class _Digester:
    """Hashes of the blob (fed as bytes), the layer and its spans (fed as the scanner's events)."""

    max_span: int
    blob: Any = field(default_factory=hashlib.sha256)
    layer: Any = field(default_factory=hashlib.sha256)
    pieces: list[_Piece] = field(default_factory=list)
    _span: Any = field(default_factory=hashlib.sha256)
    _made: int = 0
    _spans: list[tuple[int, bytes]] = field(default_factory=list)

    def feed(self, item: bytes | memoryview | Range) -> None:
        if isinstance(item, Range):
            self._cut()
            # the bytes for the window's reduction are the other consumer's: do not keep them
            lean = item._replace(window=None, head=b"")
            self.pieces.append(_Piece(lean, self._spans))
            self._spans = []
        elif isinstance(item, bytes):
            self.blob.update(item)
        else:
            self.layer.update(item)
            while item:
                part = item[: self.max_span - self._made]
                self._span.update(part)
                self._made += len(part)
                item = item[len(part) :]
                if self._made == self.max_span:
                    self._cut()

    def _cut(self) -> None:
        if self._made:
            self._spans.append((self._made, self._span.digest()))
            self._span, self._made = hashlib.sha256(), 0

    def spans(self, windows: list[bytes]) -> Iterator[Span]:
        offset = window_offset = 0
        for piece, window in zip(self.pieces, windows, strict=True):
            place = (window_offset, len(window)) if window else None
            window_offset += len(window)
            skip = 0
            for size, digest in piece.spans:
                yield Span(
                    offset,
                    size,
                    piece.range.compressed_offset,
                    piece.range.compressed_size,
                    piece.range.bits,
                    place,
                    digest,
                    piece.range.kind,
                    skip,
                )
                offset += size
                skip += size


class _Consumer(Generic[T]):
    """A thread that is fed items through a bounded queue; its error comes out of put or finish."""

    def __init__(self, name: str, feed: Callable[[T], None]) -> None:
        self._feed = feed
        self._queue: queue.Queue[T | None] = queue.Queue(_QUEUED)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> _Consumer[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._join()

    def put(self, item: T) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put(item)

    def finish(self) -> None:
        self._join()
        if self._error is not None:
            raise self._error

    def _join(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue  # only empties the queue, so that nobody waits for room in it
            try:
                self._feed(item)
            except BaseException as exc:
                self._error = exc

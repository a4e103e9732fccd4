"""Making an index: each layer is read once, and everything else follows from that.

Layers are scanned in parallel by threads. In each, libz or libzstd, the digests and the windows
work outside of the interpreter's lock, so one large layer keeps more than one core busy too.
Memory does not grow with a layer's size, only with what the index will hold. Fetching blobs is
the source's part, the tree that of tar_walk, merge and erofs_write.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import re
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Final, Generic, Protocol, TypeVar

from clipshim.errors import DigestError, LayerError, StoreError, UsageError
from clipshim.index.clip_format import write_clip
from clipshim.index.erofs_write import write_erofs
from clipshim.index.gzip_checkpoints import Range, pack_window, scan_gzip
from clipshim.index.merge import merge
from clipshim.index.model import MAX_LAYERS, LayerInfo, layer_key
from clipshim.index.span_decode import GZIP_MAGIC
from clipshim.index.span_table import MAX_LAYER_SIZE, MAX_SPAN_SIZE, Span, SpanTable
from clipshim.index.tar_walk import TarEntry, TarWalker
from clipshim.index.zstd_frames import is_zstd, scan_zstd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from clipshim.index.clip_format import BinarySource, Compression
    from clipshim.index.span_table import LayerCompression
    from clipshim.registry.sources import ImageSource

T = TypeVar("T")

DEFAULT_SPACING: Final = 512 << 10
MIN_SPACING: Final = 64 << 10
MAX_SPACING: Final = MAX_SPAN_SIZE // 2
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# OCI image-spec media-types.md and Docker's manifest v2 schema 2; +gzip and so on are suffixes
_LAYER_TYPES = re.compile(
    r"application/vnd\.oci\.image\.layer\.(nondistributable\.)?v1\.tar(\+gzip|\+zstd)?"
    r"|application/vnd\.docker\.image\.rootfs\.(diff|foreign\.diff)\.tar(\.gzip|\.zstd)?"
    r"|application/vnd\.docker\.container\.image\.rootfs\.diff\+x-gtar"
)
_INPUT = 128 << 10
_QUEUED = 8  # chunks that may wait for a consumer


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How an index is made."""

    spacing: int = DEFAULT_SPACING  # uncompressed bytes between two checkpoints, at least
    embed: bool = False  # carry the layers' data in the index
    jobs: int = 0  # layers scanned at a time; 0: as many as there are cores
    max_layer_size: int = 64 << 30  # uncompressed; a larger layer is refused


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What was made."""

    path: str
    digest: str  # of the file
    size: int  # of the file
    layers: tuple[LayerInfo, ...]
    spans: int
    tree_size: int

    @property
    def image_id(self) -> str:
        """As in Index."""
        return self.digest.removeprefix("sha256:")[:32]


class Progress(Protocol):
    """Told how far building is; called from several threads."""

    def layer_started(self, i: int, digest: str, total_bytes: int) -> None:
        """Layer `i`, a blob of `total_bytes`, is being read."""

    def layer_advanced(self, i: int, bytes_done: int) -> None:
        """`bytes_done` bytes of the blob have been read so far."""

    def layer_finished(self, i: int) -> None:
        """Layer `i` is done."""

    def message(self, text: str) -> None:
        """Something a user may want to know."""


def build_index(
    source: ImageSource,
    output: str | Path,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
) -> BuildResult:
    """Makes the index of `source` at `output`, whole or not at all.

    The same image and options give the same bytes. Raises LayerError (naming the layer) for
    layers that are damaged, hostile or of an unknown kind, DigestError for those that do not match
    their digests, UsageError for options out of range, StoreError, and what the source raises.
    """
    options = options or BuildOptions()
    if not MIN_SPACING <= options.spacing <= MAX_SPACING:
        raise UsageError(
            f"spacing: expected {MIN_SPACING} to {MAX_SPACING} bytes, got {options.spacing}"
        )
    output = os.path.abspath(os.fspath(output))
    config, diff_ids = _check_image(source)
    with contextlib.ExitStack() as stack:
        build = _Build(source, diff_ids, options, progress, os.path.dirname(output), stack)
        scanned = build.scan_layers()
        infos, tables = [], []
        for layer in scanned:
            packed = layer.table.pack()
            tables.append(packed)
            infos.append(layer.info(layer_key(layer.diff_id, packed)))
        if progress:
            progress.message("merging the layers")
        tree = merge([layer.entries for layer in scanned], [layer.label for layer in scanned])
        image = write_erofs(tree, [layer.table.size for layer in scanned])
        windows = b"".join(window for layer in scanned for window in layer.windows)
        listing = [
            _layer_row(info, len(packed), layer.table.windows_size)
            for info, packed, layer in zip(infos, tables, scanned, strict=True)
        ]
        sections: list[tuple[str, bytes | BinarySource, Compression]] = [
            ("image", _json(_image_row(source, config)), "zstd"),
            ("layers", _json(listing), "zstd"),
            ("tree", image, "zstd"),
            ("spans", b"".join(tables), "zstd"),
            ("windows", windows, "none"),
        ]
        for i, layer in enumerate(scanned):
            if layer.spool is not None:
                layer.spool.seek(0)
                sections.append((f"blob.{i}", layer.spool, "none"))
        digest = write_clip(output, sections)
    return BuildResult(
        path=output,
        digest=digest,
        size=os.stat(output).st_size,
        layers=tuple(infos),
        spans=sum(len(layer.table) for layer in scanned),
        tree_size=len(image),
    )


def _check_image(source: ImageSource) -> tuple[str, list[str]]:
    """The image's config as text and its diff IDs. Raises LayerError if it is not an image."""
    where = f"image {source.reference}"
    hint = "clipshim makes indexes of Linux container images, not of other artifacts"
    try:
        text = source.config_raw.decode()
        config = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise LayerError(f"{where}: config is not JSON: {exc}", hint=hint) from exc
    rootfs = config.get("rootfs") if isinstance(config, dict) else None
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if diff_ids is None and isinstance(rootfs, dict) and not source.layers:
        diff_ids = []
    if not isinstance(diff_ids, list):
        raise LayerError(f"{where}: config has no rootfs.diff_ids", hint=hint)
    system = config.get("os", "linux")
    if system != "linux":
        raise LayerError(f"{where}: expected an image for linux, got {system!r}", hint=hint)
    if len(diff_ids) != len(source.layers) or len(diff_ids) > MAX_LAYERS:
        raise LayerError(
            f"{where}: config names {len(diff_ids)} layers, manifest {len(source.layers)}, "
            f"at most {MAX_LAYERS} are possible"
        )
    for i, (descriptor, diff_id) in enumerate(zip(source.layers, diff_ids, strict=True)):
        if not _LAYER_TYPES.fullmatch(descriptor.media_type):
            raise LayerError(
                f"{where}: layer {i}: unknown media type {descriptor.media_type!r}", hint=hint
            )
        for digest in (diff_id, descriptor.digest):
            if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
                raise LayerError(f"{where}: layer {i}: expected a sha256 digest, got {digest!r}")
        if not 0 <= descriptor.size <= MAX_LAYER_SIZE:
            raise LayerError(f"{where}: layer {i}: size {descriptor.size} is out of range")
    return text, diff_ids


def _image_row(source: ImageSource, config: str) -> dict[str, str]:
    return {
        "reference": source.reference,
        "manifest_digest": source.manifest_digest,
        "platform": source.platform,
        "config": config,
    }


def _layer_row(info: LayerInfo, spans_size: int, windows_size: int) -> dict[str, Any]:
    return {
        "diff_id": info.diff_id,
        "blob_digest": info.blob_digest,
        "media_type": info.media_type,
        "blob_size": info.blob_size,
        "size": info.size,
        "compression": info.compression,
        "urls": list(info.urls),
        "spans_size": spans_size,
        "windows_size": windows_size,
    }


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@dataclass(slots=True)
class _Scanned:
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


class _Stopped(Exception):
    """Scanning was given up because another layer failed: no error of its own."""


class _Build:
    """Scanning all layers of an image."""

    def __init__(
        self,
        source: ImageSource,
        diff_ids: list[str],
        options: BuildOptions,
        progress: Progress | None,
        directory: str,
        stack: contextlib.ExitStack,
    ) -> None:
        self._source, self._diff_ids, self._options = source, diff_ids, options
        self._progress, self._directory, self._stack = progress, directory, stack
        self._stop = threading.Event()

    def scan_layers(self) -> list[_Scanned]:
        count = len(self._diff_ids)
        if not count:
            return []
        jobs = min(self._options.jobs or os.cpu_count() or 1, count)
        spools = [self._spool() if self._options.embed else None for _ in range(count)]
        with ThreadPoolExecutor(jobs, "layer") as pool:
            futures = [pool.submit(self._guarded, i, spools[i]) for i in range(count)]
            try:
                results, failures = [], []
                for future in futures:
                    try:
                        results.append(future.result())
                    except _Stopped:
                        continue
                    except Exception as exc:  # the first real one is raised below
                        failures.append(exc)
            except BaseException:
                self._stop.set()
                raise
        if failures:
            raise failures[0]
        return results

    def _guarded(self, i: int, spool: IO[bytes] | None) -> _Scanned:
        try:
            return self._scan(i, spool)
        except BaseException:
            self._stop.set()
            raise

    def _spool(self) -> IO[bytes]:
        try:
            file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115
        except OSError as exc:
            raise StoreError(f"{self._directory}: cannot create: {exc.strerror}") from exc
        return self._stack.enter_context(file)

    def _scan(self, i: int, spool: IO[bytes] | None) -> _Scanned:
        descriptor, diff_id = self._source.layers[i], self._diff_ids[i]
        label = f"layer {i} ({descriptor.digest})"
        if self._progress:
            self._progress.layer_started(i, descriptor.digest, descriptor.size)
        walker = TarWalker(label)
        digester = _Digester(max_span=2 * self._options.spacing)
        windows: list[bytes] = []

        def walk(item: memoryview | Range) -> None:
            if isinstance(item, Range):
                windows.append(pack_window(item))
            else:
                walker.feed(item)

        with (
            _Consumer("digests", digester.feed) as digests,
            _Consumer("tar", walk) as tar,
            self._source.open_layer(i) as stream,
        ):
            blob = _Blob(self, i, stream, descriptor.size, label, digests, spool)
            compression, events = self._events(blob, label)
            made = 0
            for event in events:
                if isinstance(event, memoryview):
                    made += len(event)
                    if made > self._options.max_layer_size:
                        raise LayerError(
                            f"{label}: uncompressed it has more than "
                            f"{self._options.max_layer_size} bytes"
                        )
                digests.put(event)
                tar.put(event)
            blob.finish()
            digests.finish()
            tar.finish()
        _check_digest(label, "digest", descriptor.digest, digester.blob.hexdigest())
        _check_digest(label, "diff ID", diff_id, digester.layer.hexdigest())
        table = SpanTable(compression, made, descriptor.size, digester.spans(windows))
        entries = walker.close()
        if self._progress:
            self._progress.layer_finished(i)
        return _Scanned(
            label,
            diff_id,
            descriptor.digest,
            descriptor.media_type,
            tuple(descriptor.urls),
            table,
            windows,
            entries,
            spool,
        )

    def _events(
        self, blob: _Blob, label: str
    ) -> tuple[LayerCompression, Iterator[memoryview | Range]]:
        """Scans by what the blob is, whatever its media type claims, as engines do."""
        head = blob.peek()
        if head.startswith(GZIP_MAGIC):
            return "gzip", scan_gzip(blob.read, self._options.spacing, label)
        if is_zstd(head):
            return "zstd", scan_zstd(blob.read, self._options.spacing, label)
        return "none", _scan_plain(blob.read, self._options.spacing)

    def advanced(self, i: int, done: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        if self._progress:
            self._progress.layer_advanced(i, done)


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
        build: _Build,
        i: int,
        stream: BinaryIO,
        size: int,
        label: str,
        digests: _Consumer[Any],
        spool: IO[bytes] | None,
    ) -> None:
        self._build, self._i, self._stream, self._size = build, i, stream, size
        self._label, self._digests, self._spool = label, digests, spool
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
            self._digests.put(chunk)
            if self._spool is not None:
                self._keep(chunk)
            self._build.advanced(self._i, self._done)
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

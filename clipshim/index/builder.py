"""Making an index: each layer is read once, and everything else follows from that.

Layers are scanned in parallel by threads (layer_scan.py); merged (merge.py) they become the tree
(erofs_write.py). Memory does not grow with a layer's size, only with what the index will hold.
Fetching blobs is the source's part.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final, Protocol

from clipshim.errors import LayerError, StoreError, UsageError
from clipshim.index.clip_format import write_clip
from clipshim.index.erofs_write import write_erofs
from clipshim.index.layer_scan import ScannedLayer, scan_layer
from clipshim.index.merge import merge
from clipshim.index.model import MAX_LAYERS, LayerInfo, image_problem, layer_key
from clipshim.index.span_table import MAX_LAYER_SIZE, MAX_SPAN_SIZE

if TYPE_CHECKING:
    from pathlib import Path

    from clipshim.index.clip_format import BinarySource, Compression
    from clipshim.registry.sources import ImageSource

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
    row = _image_row(source, config)
    problem = image_problem(row)
    if problem:
        raise LayerError(f"image {source.reference}: {problem}")
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
            ("image", _json(row), "zstd"),
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

    def scan_layers(self) -> list[ScannedLayer]:
        count = len(self._diff_ids)
        if not count:
            return []
        jobs = min(self._options.jobs or os.cpu_count() or 1, count)
        spools = [self._spool() if self._options.embed else None for _ in range(count)]
        with ThreadPoolExecutor(jobs, "layer") as pool:
            futures = [pool.submit(self._scan, i, spools[i]) for i in range(count)]
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

    def _scan(self, i: int, spool: IO[bytes] | None) -> ScannedLayer:
        try:
            descriptor = self._source.layers[i]
            if self._progress:
                self._progress.layer_started(i, descriptor.digest, descriptor.size)
            scanned = scan_layer(
                self._source,
                i,
                self._diff_ids[i],
                spacing=self._options.spacing,
                max_size=self._options.max_layer_size,
                spool=spool,
                advanced=lambda done: self._advanced(i, done),
            )
        except BaseException:
            self._stop.set()
            raise
        if self._progress:
            self._progress.layer_finished(i)
        return scanned

    def _spool(self) -> IO[bytes]:
        try:
            file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115
        except OSError as exc:
            raise StoreError(f"{self._directory}: cannot create: {exc.strerror}") from exc
        return self._stack.enter_context(file)

    def _advanced(self, i: int, done: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        if self._progress:
            self._progress.layer_advanced(i, done)

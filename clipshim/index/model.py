"""An index as its readers see it: image, layers, tree, span tables, windows.

open_index refuses every file that contradicts itself. Only what may be large is left for later:
the tree is verified when it is read, the layers of a self-contained index span by span. Building
one is builder.py's, the container format clip_format.py's, decoding span_decode.py's.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

import zstandard

from clipshim.errors import IndexFormatError, SpanDecodeError
from clipshim.index.clip_format import ClipFile
from clipshim.index.erofs_format import (
    BLOCK,
    DEVICE_SLOT,
    DEVICE_SLOT_SIZE,
    SUPER,
    SUPER_MAGIC,
    SUPER_OFFSET,
    SUPER_SIZE,
)
from clipshim.index.span_table import (
    MAX_LAYER_SIZE,
    MAX_WINDOW,
    LayerCompression,
    Span,
    SpanKind,
    SpanTable,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from types import TracebackType

__all__ = [
    "Index", "LayerCompression", "LayerInfo", "Span", "SpanKind", "SpanTable",
    "layer_key", "open_index",
]  # fmt: skip

MAX_LAYERS: Final = 1000
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_PLATFORM = re.compile(r"[a-z0-9]{1,32}(/[A-Za-z0-9_][A-Za-z0-9._-]{,31}){1,2}")
_COMPRESSIONS: Final[dict[str, LayerCompression]] = {"none": "none", "gzip": "gzip", "zstd": "zstd"}


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer of an image. Sizes in bytes."""

    diff_id: str
    blob_digest: str
    media_type: str
    blob_size: int
    size: int  # uncompressed
    compression: LayerCompression
    urls: tuple[str, ...]
    key: str  # names the layer in the layer store; see layer_key


def layer_key(diff_id: str, packed_spans: bytes) -> str:
    """The name of a layer in the layer store and below the layers mount.

    It depends on the span table too: an index with other span digests gets a file of its own and
    cannot put its bytes into the cache of another index.
    """
    return f"{diff_id.removeprefix('sha256:')}-{hashlib.sha256(packed_spans).hexdigest()[:32]}"


def image_problem(image: dict[str, Any]) -> str | None:
    """What is wrong with an image's reference, manifest digest, platform or config text."""
    for field in ("reference", "manifest_digest", "platform", "config"):
        value = image.get(field)
        if not isinstance(value, str) or not _is_unicode(value):
            return f"{field} is missing or not a string"
    if len(image["reference"]) > 4096 or not image["reference"].isprintable():
        return "unusable reference"
    if not _DIGEST.fullmatch(image["manifest_digest"]):
        return "manifest_digest is not a sha256 digest"
    if not _PLATFORM.fullmatch(image["platform"]):
        return f"platform is not os/architecture: {image['platform']!r}"
    return None


def is_plain(value: object) -> bool:
    """Whether a value is a short text without anything that could confuse a terminal or a log."""
    return isinstance(value, str) and len(value) <= 8192 and value.isascii() and value.isprintable()


class Index:
    """An open index; open_index makes it, after all checks."""

    def __init__(self, clip: ClipFile) -> None:
        """Takes over `clip`. Raises IndexFormatError."""
        self._clip = clip
        self._read_image()
        self._read_layers()
        self._check_windows()
        self._check_blobs()
        self._check_tree()
        self.profile: list[Any] | None = None
        if "profile" in clip:
            profile = _load_json(clip, "profile")
            if not isinstance(profile, list):
                raise self._bad("profile is not a list")
            self.profile = profile

    def __enter__(self) -> Index:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; a second time does nothing."""
        self._clip.close()

    def fileno(self) -> int:
        """The fd of the file, owned by this object."""
        return self._clip.fileno()

    @cached_property
    def digest(self) -> str:
        """Of the whole file, "sha256:…"; computed when first asked for: blobs may be in it."""
        return self._clip.digest()

    @property
    def image_id(self) -> str:
        """Names the mount of the tree."""
        return self.digest.removeprefix("sha256:")[:32]

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self._clip.size

    @property
    def clip(self) -> ClipFile:
        """The file's sections, for those who list or copy them."""
        return self._clip

    @property
    def has_blobs(self) -> bool:
        """Whether the index is self-contained."""
        return bool(self.layers) and "blob.0" in self._clip

    def tree(self) -> bytes:
        """The tree, an EROFS image; read at each call, so that none is kept.

        Raises IndexFormatError if it does not match its sha256. What it says is for
        tree_check.py to check.
        """
        return self._clip.section("tree")

    def tree_pieces(self) -> Iterator[bytes]:
        """The tree in pieces, verified as by tree(). Raises IndexFormatError."""
        return self._clip.pieces("tree")

    def span_table(self, i: int) -> SpanTable:
        """The spans of layer `i`."""
        return self._tables[i]

    def window(self, i: int, span: Span) -> bytes:
        """The 32 KiB before a span of layer `i`, as far as decoding it needs them, else zeros.

        Raises SpanDecodeError, and IndexFormatError if the file has become shorter.
        """
        if span.window is None:
            return bytes(MAX_WINDOW)
        offset, size = span.window
        base, total = self._window_parts[i]
        if offset < 0 or size < 0 or offset + size > total:
            raise SpanDecodeError(f"index {self._clip.label}: window out of layer {i}")
        stored = self._clip.pread(self._windows_at + base + offset, size)
        try:
            window = zstandard.ZstdDecompressor(max_window_size=1 << 20).decompress(
                stored, max_output_size=MAX_WINDOW, allow_extra_data=False
            )
        except zstandard.ZstdError as exc:
            raise SpanDecodeError(f"index {self._clip.label}: window is damaged: {exc}") from exc
        if len(window) > MAX_WINDOW:
            raise SpanDecodeError(f"index {self._clip.label}: window of {len(window)} bytes")
        return window.rjust(MAX_WINDOW, b"\0")

    def blob(self, i: int) -> tuple[int, int, int]:
        """Where the compressed layer `i` lies: (this index's fd, offset, size).

        Raises IndexFormatError if the index is not self-contained. The bytes are not verified.
        """
        entry = self._clip.entry(f"blob.{i}")
        return self._clip.fileno(), entry.offset, entry.stored_size

    def _read_image(self) -> None:
        image = _load_json(self._clip, "image")
        if not isinstance(image, dict):
            raise self._bad("image is not an object")
        problem = image_problem(image)
        if problem:
            raise self._bad(f"image: {problem}")
        self.reference: str = image["reference"]
        self.manifest_digest: str = image["manifest_digest"]
        self.platform: str = image["platform"]
        self.config_raw: bytes = image["config"].encode()
        try:
            config = json.loads(self.config_raw)
        except (ValueError, RecursionError) as exc:
            raise self._bad(f"image: config is not JSON: {exc}") from exc
        if not isinstance(config, dict):
            raise self._bad("image: config is not an object")
        self.config: dict[str, Any] = config

    def _read_layers(self) -> None:
        rows = _load_json(self._clip, "layers")
        if not isinstance(rows, list) or len(rows) > MAX_LAYERS:
            raise self._bad(f"layers: expected a list of at most {MAX_LAYERS}")
        spans = self._clip.section("spans")
        position = window_base = 0
        layers, self._tables, self._window_parts = [], [], []
        for i, row in enumerate(rows):
            if not isinstance(row, dict):
                raise self._bad(f"layer {i} is not an object")
            packed_size = self._number(i, row, "spans_size")
            windows_size = self._number(i, row, "windows_size")
            packed = spans[position : position + packed_size]
            if len(packed) != packed_size:
                raise self._bad(f"layer {i}: span table is cut off")
            layer = self._layer(i, row, packed)
            label = f"index {self._clip.label}: layer {i}"
            self._tables.append(
                SpanTable.unpack(
                    packed, layer.compression, layer.size, layer.blob_size, windows_size,
                    label=label,
                )
            )  # fmt: skip
            layers.append(layer)
            self._window_parts.append((window_base, windows_size))
            position += packed_size
            window_base += windows_size
        if position != len(spans):
            raise self._bad(f"spans: {len(spans) - position} bytes of no layer")
        self.layers: tuple[LayerInfo, ...] = tuple(layers)
        self._windows_total = window_base

    def _layer(self, i: int, row: dict[str, Any], packed: bytes) -> LayerInfo:
        for field in ("diff_id", "blob_digest"):
            if not isinstance(row.get(field), str) or not _DIGEST.fullmatch(row[field]):
                raise self._bad(f"layer {i}: {field} is not a sha256 digest")
        media_type, urls = row.get("media_type"), row.get("urls", [])
        if not isinstance(media_type, str) or not is_plain(media_type):
            raise self._bad(f"layer {i}: media_type is not a short string")
        if not isinstance(urls, list) or not all(is_plain(url) for url in urls):
            raise self._bad(f"layer {i}: urls is not a list of short strings")
        compression = _COMPRESSIONS.get(str(row.get("compression")))
        if compression is None:
            raise self._bad(f"layer {i}: unknown compression {row.get('compression')!r}")
        return LayerInfo(
            diff_id=row["diff_id"],
            blob_digest=row["blob_digest"],
            media_type=media_type,
            blob_size=self._number(i, row, "blob_size"),
            size=self._number(i, row, "size"),
            compression=compression,
            urls=tuple(urls),
            key=layer_key(row["diff_id"], packed),
        )

    def _check_windows(self) -> None:
        entry = self._clip.entry("windows")
        if entry.compression != "none" or entry.raw_size != self._windows_total:
            raise self._bad(f"windows: expected {self._windows_total} bytes, got {entry.raw_size}")
        self._clip.verify("windows")
        self._windows_at = entry.offset

    def _check_blobs(self) -> None:
        names = {name for name in self._clip.names if name.startswith("blob.")}
        expected = {f"blob.{i}" for i in range(len(self.layers))}
        if names and names != expected:
            raise self._bad("holds the data of some layers and not of others")
        for i, layer in enumerate(self.layers if names else ()):
            entry = self._clip.entry(f"blob.{i}")
            if entry.compression != "none" or entry.raw_size != layer.blob_size:
                raise self._bad(f"blob.{i}: expected {layer.blob_size} bytes of layer {i}")

    def _check_tree(self) -> None:
        """Refuses a tree of another image; the tree as such is checked by those who read it."""
        slots = SUPER_OFFSET + SUPER_SIZE
        head = self._clip.head("tree", slots + DEVICE_SLOT_SIZE * len(self.layers))
        if len(head) < slots:
            raise self._bad("tree: not an EROFS image")
        magic, devices = itemgetter(0, 16)(SUPER.unpack_from(head, SUPER_OFFSET))
        if magic != SUPER_MAGIC or devices != len(self.layers):
            raise self._bad(f"tree: expected an EROFS image of {len(self.layers)} devices")
        if len(head) < slots + DEVICE_SLOT_SIZE * devices:
            raise self._bad("tree: devices are cut off")
        blocks = [slot[1] for slot in DEVICE_SLOT.iter_unpack(head[slots:])]
        expected = [-(-layer.size // BLOCK) for layer in self.layers]
        if blocks != expected:
            raise self._bad(f"tree: expected devices of {expected} blocks, got {blocks}")

    def _number(self, i: int, row: dict[str, Any], field: str) -> int:
        value = row.get(field)
        if type(value) is not int or not 0 <= value <= MAX_LAYER_SIZE:
            raise self._bad(f"layer {i}: {field} is not a size: {value!r}")
        return value

    def _bad(self, what: str) -> IndexFormatError:
        return IndexFormatError(f"index {self._clip.label}: {what}")


def open_index(path_or_fd: str | os.PathLike[str] | int) -> Index:
    """Opens and checks an index; an fd stays the caller's. The Index is a context manager.

    Raises NotFoundError, StoreError, or IndexFormatError for a file that is damaged, of another
    version, or contradicts itself.
    """
    clip = ClipFile.open(path_or_fd)
    try:
        return Index(clip)
    except BaseException:
        clip.close()
        raise


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _load_json(clip: ClipFile, name: str) -> Any:
    try:
        return json.loads(clip.section(name))
    except (ValueError, RecursionError) as exc:
        raise IndexFormatError(f"index {clip.label}: {name}: not JSON: {exc}") from exc

"""Compares what an index promises with what a real unpacking of the image gives.

The judge is umoci, which shares no code with us. Compared are path set, types, modes, owners,
sizes, times, link targets, device numbers, extended attributes, hard link groups and contents.
Not compared are times that the unpacker makes up: of directories that no layer mentions, and of
those that it put such a directory into.
"""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import zstandard

from clipshim.errors import ClipError, DigestError, LayerError
from clipshim.index.erofs_read import HOLE, ErofsImage
from clipshim.index.model import open_index
from clipshim.index.tree_check import sound_tree

if TYPE_CHECKING:
    from clipshim.registry.sources import ImageSource

PIECE = 1 << 20
MAX_DIFFERENCES = 1000
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ZSTD_STEP = 4096  # a block of zstd gives 128 KiB at most, and takes 4 bytes at least
_RAW_LAYER = "application/vnd.oci.image.layer.v1.tar"

Reader = Callable[[int, int], bytes]  # (offset, size) of one file's contents


@dataclass(slots=True)
class FileFacts:
    """All that can be compared of one path."""

    mode: int
    nlink: int  # of a directory 0: file systems disagree
    uid: int
    gid: int
    size: int  # of a directory 0
    mtime_ns: int
    rdev: int
    target: bytes
    xattrs: dict[bytes, bytes]
    first_name: bytes  # of a group of hard links


class Described:
    """A tree by path, and how to read its files."""

    def __init__(self, files: dict[bytes, FileFacts], reader: Callable[[bytes], Reader]) -> None:
        self.files = files
        self.reader = reader


def compare_trees(
    expected_dir: str | bytes | os.PathLike[str],
    actual_dir: str | bytes | os.PathLike[str],
    *,
    unpacked_since_ns: int | None = None,
) -> list[str]:
    """How two directory trees differ, as lines that name the path; empty if they do not.

    Times of expected directories from `unpacked_since_ns` on are the unpacker's own.
    """
    with ExitStack() as stack:
        return compare(
            describe_directory(expected_dir, stack),
            describe_directory(actual_dir, stack),
            unpacked_since_ns=unpacked_since_ns,
        )


def check_against_unpack(
    index_path: str | os.PathLike[str],
    source: "ImageSource",
    *,
    work_dir: str | os.PathLike[str] | None = None,
) -> list[str]:
    """How the index's tree differs from `source` unpacked with umoci; empty if it does not.

    Needs root and, in `work_dir` (or the usual temporary directory), twice the image's
    uncompressed size. Raises ClipError.
    """
    if os.geteuid() != 0:
        raise ClipError("check against a real unpack: only root can unpack an image in full")
    with (
        tempfile.TemporaryDirectory(prefix="clipshim-check-", dir=work_dir) as directory,
        open_index(index_path) as index,
        ExitStack() as stack,
    ):
        diff_ids = _diff_ids(source.config_raw, len(source.layers))
        if [layer.diff_id for layer in index.layers] != diff_ids:
            return ["the index is of an image with other layers"]
        files = []
        for number, layer in enumerate(index.layers):
            path = os.path.join(directory, f"layer.{number}")
            with source.open_layer(number) as blob:
                _decompress(blob, path, layer.diff_id, layer.size)
            files.append(path)
        started_ns = os.stat(directory).st_ctime_ns
        unpacked = unpack_with_umoci(files, os.path.join(directory, "unpacked"))
        image = sound_tree(index)
        return compare(
            describe_directory(unpacked, stack),
            describe_image(image, files, stack),
            unpacked_since_ns=started_ns,
        )


def unpack_with_umoci(layer_files: Sequence[str], directory: str) -> str:
    """Unpacks raw tar streams, the lowest first, as root; the rootfs below `directory`."""
    umoci = shutil.which("umoci")
    if umoci is None:
        raise ClipError("umoci: not found", hint="install the package umoci")
    layout = os.path.join(directory, "layout")
    blobs = os.path.join(layout, "blobs", "sha256")
    os.makedirs(blobs)

    def put(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        with open(os.path.join(blobs, digest), "wb") as file:
            file.write(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    layers = []
    for path in layer_files:
        digest = _digest(path)
        blob = os.path.join(blobs, digest.removeprefix("sha256:"))
        if not os.path.exists(blob):
            os.symlink(os.path.abspath(path), blob)
        layers.append({"mediaType": _RAW_LAYER, "digest": digest, "size": os.path.getsize(path)})
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "config": put(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": layers,
    }
    reference = put(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    reference["annotations"] = {"org.opencontainers.image.ref.name": "image"}
    for name, content in (
        ("oci-layout", {"imageLayoutVersion": "1.0.0"}),
        ("index.json", {"schemaVersion": 2, "manifests": [reference]}),
    ):
        with open(os.path.join(layout, name), "w", encoding="utf-8") as file:
            json.dump(content, file)
    bundle = os.path.join(directory, "bundle")
    done = subprocess.run(
        [umoci, "unpack", "--image", f"{layout}:image", bundle],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise ClipError(f"umoci unpack failed: {done.stderr.decode(errors='replace').strip()}")
    return os.path.join(bundle, "rootfs")


def describe_directory(root: str | bytes | os.PathLike[str], stack: ExitStack) -> Described:
    """A directory on a file system, without following links; files are closed by `stack`."""
    top = os.fsencode(root)
    files: dict[bytes, FileFacts] = {}
    first: dict[int, bytes] = {}
    for path in _walk(top):
        full = os.path.join(top, path) if path else top
        facts = os.lstat(full)
        kind = stat.S_IFMT(facts.st_mode)
        xattrs = {
            os.fsencode(name): os.getxattr(full, name, follow_symlinks=False)
            for name in os.listxattr(full, follow_symlinks=False)
        }
        xattrs.pop(b"security.selinux", None)  # the host's, not the image's
        is_dir = kind == stat.S_IFDIR
        files[path] = FileFacts(
            mode=facts.st_mode,
            nlink=0 if is_dir else facts.st_nlink,
            uid=facts.st_uid,
            gid=facts.st_gid,
            size=0 if is_dir else facts.st_size,
            mtime_ns=facts.st_mtime_ns,
            rdev=facts.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
            target=os.readlink(full) if kind == stat.S_IFLNK else b"",
            xattrs=xattrs,
            first_name=first.setdefault(facts.st_ino, path),
        )

    def reader(path: bytes) -> Reader:
        fd = os.open(os.path.join(top, path), os.O_RDONLY | os.O_NOFOLLOW)
        return _FdReader(fd, stack)

    return Described(files, reader)


def describe_image(image: ErofsImage, layer_files: Sequence[str], stack: ExitStack) -> Described:
    """A tree over raw layer files, as the reader sees it."""
    layers = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in layer_files]
    for layer in layers:
        stack.callback(os.close, layer)
    files: dict[bytes, FileFacts] = {}
    first: dict[int, bytes] = {}
    nids: dict[bytes, int] = {}
    for name, nid in image.walk():
        facts = image.stat(nid)
        kind = stat.S_IFMT(facts.mode)
        is_dir = kind == stat.S_IFDIR
        nids[name] = nid
        files[name] = FileFacts(
            mode=facts.mode,
            nlink=0 if is_dir else facts.nlink,
            uid=facts.uid,
            gid=facts.gid,
            size=0 if is_dir else facts.size,
            mtime_ns=facts.mtime_ns,
            rdev=facts.rdev,
            target=image.readlink(nid) if kind == stat.S_IFLNK else b"",
            xattrs=image.xattrs(nid),
            first_name=first.setdefault(nid, name),
        )

    def reader(path: bytes) -> Reader:
        nid = nids[path]

        def read(offset: int, size: int) -> bytes:
            parts = []
            for device, start, length in image.extents(nid, offset, size):
                if device == HOLE:
                    parts.append(bytes(length))
                elif device == 0:
                    parts.append(bytes(image.buffer[start : start + length]))
                else:
                    parts.append(os.pread(layers[device - 1], length, start))
            return b"".join(parts)

        return read

    return Described(files, reader)


def compare(
    expected: Described, actual: Described, *, unpacked_since_ns: int | None = None
) -> list[str]:
    """How two trees differ, as compare_trees; at most MAX_DIFFERENCES lines."""
    lines: list[str] = []
    for path in sorted(expected.files.keys() | actual.files.keys()):
        if len(lines) >= MAX_DIFFERENCES:
            lines.append("and more")
            break
        shown = "/" + path.decode(errors="backslashreplace")
        left, right = expected.files.get(path), actual.files.get(path)
        if left is None or right is None:
            lines.append(f"{shown}: {'unexpected' if left is None else 'missing'}")
            continue
        made_up = unpacked_since_ns is not None and left.mtime_ns >= unpacked_since_ns
        if stat.S_ISDIR(left.mode) and stat.S_ISDIR(right.mode) and made_up:
            left.mtime_ns = right.mtime_ns
        lines += [f"{shown}: {line}" for line in _facts_differ(left, right)]
        if (
            stat.S_ISREG(left.mode)
            and stat.S_ISREG(right.mode)
            and left.size == right.size
            and left.first_name == path
        ):
            at = _content_differs(expected.reader(path), actual.reader(path), left.size)
            if at is not None:
                lines.append(f"{shown}: contents differ within 1 MiB of byte {at}")
    return lines


def _facts_differ(expected: FileFacts, actual: FileFacts) -> Iterator[str]:
    if expected.mode != actual.mode:
        yield f"mode: expected {expected.mode:o}, got {actual.mode:o}"
    for name in ("nlink", "uid", "gid", "size", "mtime_ns", "rdev", "target", "first_name"):
        left, right = getattr(expected, name), getattr(actual, name)
        if left != right:
            yield f"{name}: expected {left}, got {right}"
    for xattr in sorted(expected.xattrs.keys() | actual.xattrs.keys()):
        before, after = expected.xattrs.get(xattr), actual.xattrs.get(xattr)
        if before != after:
            yield f"extended attribute {xattr!r}: expected {before!r}, got {after!r}"


def _content_differs(expected: Reader, actual: Reader, size: int) -> int | None:
    for offset in range(0, size, PIECE):
        if expected(offset, PIECE) != actual(offset, PIECE):
            return offset
    return None


class _FdReader:
    """Reads an open file and closes it when all is read, or with the stack."""

    def __init__(self, fd: int, stack: ExitStack) -> None:
        self._file = stack.enter_context(os.fdopen(fd, "rb", buffering=0))
        self._size = os.fstat(fd).st_size

    def __call__(self, offset: int, size: int) -> bytes:
        data = os.pread(self._file.fileno(), size, offset)
        if offset + size >= self._size:
            self._file.close()
        return data


def _walk(top: bytes) -> Iterator[bytes]:
    pending = [b""]
    while pending:
        path = pending.pop()
        yield path
        full = os.path.join(top, path) if path else top
        if stat.S_ISDIR(os.lstat(full).st_mode):
            names = sorted(os.listdir(full), reverse=True)
            pending += [os.path.join(path, name) if path else name for name in names]


def _decompress(blob: IO[bytes], path: str, diff_id: str, size: int) -> None:
    """Writes a blob's tar stream to a file; DigestError unless it is the layer of that diff ID.

    Stops behind `size` bytes, what the index says of the layer.
    """
    found = hashlib.sha256()
    left = size
    with open(path, "wb") as file:
        for data in _decoded(blob):
            left -= len(data)
            if left < 0:
                raise LayerError(f"layer {diff_id}: more than the {size} bytes of the index")
            found.update(data)
            file.write(data)
    if f"sha256:{found.hexdigest()}" != diff_id:
        raise DigestError(f"layer: expected diff ID {diff_id}, got sha256:{found.hexdigest()}")


def _decoded(blob: IO[bytes]) -> Iterator[bytes]:
    data = blob.read(PIECE)
    if data.startswith(_GZIP_MAGIC):
        yield from _gunzipped(blob, data)
    elif data.startswith(_ZSTD_MAGIC):
        yield from _unpacked_zstd(blob, data)
    else:
        while data:
            yield data
            data = blob.read(PIECE)


def _unpacked_zstd(blob: IO[bytes], data: bytes) -> Iterator[bytes]:
    """Every frame. The output of a piece is bounded: the pieces that go in are small."""
    decoder = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True)
    try:
        while data:
            for at in range(0, len(data), _ZSTD_STEP):
                yield decoder.decompress(data[at : at + _ZSTD_STEP])
            data = blob.read(PIECE)
    except zstandard.ZstdError as exc:
        raise LayerError(f"layer: damaged zstd stream: {exc}") from exc


def _gunzipped(blob: IO[bytes], data: bytes) -> Iterator[bytes]:
    """Every member; what follows the last one is ignored, as gzip does."""
    decoder = zlib.decompressobj(31)
    try:
        while True:
            yield decoder.decompress(data, PIECE)
            data = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            while len(data) < 2 and (more := blob.read(PIECE)):
                data += more
            if decoder.eof:
                if not data.startswith(_GZIP_MAGIC):
                    return
                decoder = zlib.decompressobj(31)
            elif not data:
                raise LayerError("layer: truncated gzip stream")
    except zlib.error as exc:
        raise LayerError(f"layer: damaged gzip stream: {exc}") from exc


def _diff_ids(config_raw: bytes, count: int) -> list[str]:
    try:
        found = [str(diff_id) for diff_id in json.loads(config_raw)["rootfs"]["diff_ids"]]
    except (ValueError, KeyError, TypeError) as exc:
        raise LayerError(f"image config: no diff IDs: {exc!r}") from exc
    if len(found) != count:
        raise LayerError(f"image config: expected {count} diff IDs, got {len(found)}")
    return found


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"

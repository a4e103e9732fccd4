"""Stubs: tiny ordinary images, an index and two account files, that stand for big ones.

Deterministic: the same index and files give the same bytes, whatever compressed them where. The
index is taken as it is; what is in it is the caller's concern.
"""

from __future__ import annotations

import binascii
import hashlib
import io
import json
import os
import stat
import struct
import tarfile
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from clipshim.errors import RegistryError, UsageError
from clipshim.registry.manifests import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, digest_of, load_json
from clipshim.registry.references import ArchiveReference, Reference, parse_image, parse_reference

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clipshim.registry.access import RegistryAccess

INDEX_NAME = ".clip/index.clip"
MAX_STUB_INDEX_BYTES = 256 << 20
ARCHIVE_FORMATS = ("oci-archive", "docker-archive")
# Not io.clipshim.image: engines copy an image's annotations to its containers, where that one
# would name the image a second time.
LABEL_IMAGE = "io.clipshim.stub.image"
LABEL_MANIFEST = "io.clipshim.stub.manifest-digest"
LABEL_INDEX = "io.clipshim.stub.index-digest"
_STORED_BLOCK = 0xFFFF  # RFC 1951, 3.2.4: the most that one stored block holds


class StubbedIndex(Protocol):
    """What is asked of an index."""

    @property
    def reference(self) -> str: ...
    @property
    def manifest_digest(self) -> str: ...
    @property
    def platform(self) -> str: ...
    @property
    def config_raw(self) -> bytes: ...
    @property
    def digest(self) -> str: ...
    def fileno(self) -> int: ...


@dataclass(frozen=True, slots=True)
class StubFile:
    """A file, directory or link of the image that the stub has too. `mode` may hold type bits.

    The content of a symbolic link is its target.
    """

    content: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0

    @property
    def is_directory(self) -> bool:
        """By the type bits of `mode`."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_link(self) -> bool:
        """By the type bits of `mode`."""
        return stat.S_ISLNK(self.mode)


@dataclass(frozen=True, slots=True)
class StubImage:
    """A stub in memory: three blobs."""

    manifest_raw: bytes
    config_raw: bytes
    layer_raw: bytes  # gzip
    layer_tar: bytes

    @property
    def digest(self) -> str:
        """Of the manifest."""
        return digest_of(self.manifest_raw)

    @property
    def size(self) -> int:
        """Bytes that an engine pulls."""
        return len(self.manifest_raw) + len(self.config_raw) + len(self.layer_raw)

    def push(self, target: str, access: RegistryAccess) -> str:
        """Pushes it as `target`; returns the manifest digest. Raises RegistryError, AuthError."""
        from clipshim.registry.oras_client import PushClient  # oras: 120 ms

        reference = parse_image(target)
        if isinstance(reference, ArchiveReference):
            raise UsageError(
                f"stub target {target}: expected a registry", hint="write to a file with -o"
            )
        client = PushClient(access, reference)
        client.push_bytes(self.layer_raw)
        client.push_bytes(self.config_raw)
        client.push_manifest(self.manifest_raw, OCI_MANIFEST, reference.version)
        return self.digest

    def write(self, path: str | os.PathLike[str], archive_format: str, name: str) -> None:
        """Writes an archive that engines load as `name`; `archive_format`: ARCHIVE_FORMATS."""
        reference = parse_reference(name)
        if archive_format == "oci-archive":
            members = self._oci_members(reference)
        elif archive_format == "docker-archive":
            members = self._docker_members(reference)
        else:
            raise UsageError(
                f"archive format {archive_format!r}: expected one of {', '.join(ARCHIVE_FORMATS)}"
            )
        _write_whole(os.fspath(path), _tar_of(members))

    def _oci_members(self, reference: Reference) -> list[tuple[str, bytes]]:
        tag = reference.tag or "latest"
        index = {
            "schemaVersion": 2,
            "manifests": [
                {
                    "mediaType": OCI_MANIFEST,
                    "digest": self.digest,
                    "size": len(self.manifest_raw),
                    "annotations": {
                        "org.opencontainers.image.ref.name": tag,
                        "io.containerd.image.name": str(reference),
                    },
                }
            ],
        }
        blobs = (self.manifest_raw, self.config_raw, self.layer_raw)
        return [
            ("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'),
            ("index.json", _json(index)),
            *sorted((f"blobs/sha256/{_hex(raw)}", raw) for raw in blobs),
        ]

    def _docker_members(self, reference: Reference) -> list[tuple[str, bytes]]:
        config_name = f"{_hex(self.config_raw)}.json"
        layer_name = f"{_hex(self.layer_tar)}.tar"
        entry = {
            "Config": config_name,
            "RepoTags": [_familiar(reference)],
            "Layers": [layer_name],
        }
        return [
            ("manifest.json", _json([entry])),
            (config_name, self.config_raw),
            (layer_name, self.layer_tar),
        ]


def build_stub(index: StubbedIndex, files: Mapping[str, StubFile]) -> StubImage:
    """The stub of an index, with `files` (absolute path: file) beside it.

    Engines resolve `USER name` by /etc/passwd and /etc/group, and make the working directory and
    volumes of what they see, so the caller hands these in as the image has them; directories (by
    mode) keep their attributes, which a graft shows. Raises
    UsageError for a self-contained index of more than MAX_STUB_INDEX_BYTES.
    """
    raw = _index_bytes(index)
    layer_tar = _layer_tar(raw, files)
    layer_raw = _stored_gzip(layer_tar)
    labels = {
        LABEL_IMAGE: index.reference,
        LABEL_MANIFEST: index.manifest_digest,
        LABEL_INDEX: index.digest,
    }
    config_raw = _config(index, digest_of(layer_tar), labels)
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {
            "mediaType": OCI_CONFIG,
            "digest": digest_of(config_raw),
            "size": len(config_raw),
        },
        "layers": [
            {
                "mediaType": f"{OCI_LAYER}+gzip",
                "digest": digest_of(layer_raw),
                "size": len(layer_raw),
            }
        ],
        "annotations": labels,
    }
    return StubImage(_json(manifest), config_raw, layer_raw, layer_tar)


def _index_bytes(index: StubbedIndex) -> bytes:
    fd = index.fileno()
    size = os.fstat(fd).st_size
    if size > MAX_STUB_INDEX_BYTES:
        raise UsageError(
            f"index of {index.reference}: {size} bytes are too many for a stub",
            hint="make the stub from an index without embedded layers",
        )
    parts = []
    at = 0
    while at < size:
        part = os.pread(fd, size - at, at)
        if not part:
            raise RegistryError(f"index of {index.reference}: the file became shorter")
        parts.append(part)
        at += len(part)
    raw = b"".join(parts)
    found = digest_of(raw)
    if found != index.digest:
        raise RegistryError(
            f"index of {index.reference}: expected digest {index.digest}, got {found}"
        )
    return raw


def _config(index: StubbedIndex, diff_id: str, labels: Mapping[str, str]) -> bytes:
    document = load_json(index.config_raw, f"config of {index.reference}")
    document["rootfs"] = {"type": "layers", "diff_ids": [diff_id]}
    created = document.get("created")
    entry: dict[str, Any] = {"created_by": f"clipshim stub of {index.reference}"}
    if isinstance(created, str):
        entry = {"created": created, **entry}
    document["history"] = [entry]
    inner = document.get("config")
    inner = dict(inner) if isinstance(inner, dict) else {}
    own = inner.get("Labels")
    inner["Labels"] = {**(own if isinstance(own, dict) else {}), **labels}
    document["config"] = inner
    return _json(document)


def _layer_tar(index_raw: bytes, files: Mapping[str, StubFile]) -> bytes:
    entries = {
        ".clip": StubFile(mode=stat.S_IFDIR | 0o755),
        INDEX_NAME: StubFile(index_raw, 0o444),
    }
    for path, file in files.items():
        parts = [part for part in path.split("/") if part]
        if not parts or any(part in (".", "..") for part in parts) or parts[0] == ".clip":
            raise UsageError(f"stub file {path!r}: expected an absolute path inside the image")
        for count in range(1, len(parts)):
            entries.setdefault("/".join(parts[:count]), StubFile(mode=stat.S_IFDIR | 0o755))
        entries["/".join(parts)] = file
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(entries):
            file = entries[name]
            info = tarfile.TarInfo(name + ("/" if file.is_directory else ""))
            info.type = tarfile.DIRTYPE if file.is_directory else tarfile.REGTYPE
            info.mode = stat.S_IMODE(file.mode)
            info.uid, info.gid = file.uid, file.gid
            info.mtime, nanoseconds = divmod(file.mtime_ns, 1_000_000_000)
            if nanoseconds:
                info.pax_headers = {"mtime": f"{info.mtime}.{nanoseconds:09d}"}
            if file.is_link:
                info.type, info.linkname = tarfile.SYMTYPE, os.fsdecode(file.content)
            is_file = info.isreg()
            info.size = len(file.content) if is_file else 0
            archive.addfile(info, io.BytesIO(file.content) if is_file else None)
    return buffer.getvalue()


def _stored_gzip(raw: bytes) -> bytes:
    """RFC 1952 with stored blocks only: an index is compressed already, and no two versions of
    zlib give different bytes."""
    out = [b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"]
    for start in range(0, len(raw), _STORED_BLOCK):
        block = raw[start : start + _STORED_BLOCK]
        is_last = start + _STORED_BLOCK >= len(raw)
        out.append(struct.pack("<BHH", is_last, len(block), len(block) ^ 0xFFFF))
        out.append(block)
    out.append(struct.pack("<II", binascii.crc32(raw), len(raw) & 0xFFFFFFFF))
    return b"".join(out)


def _tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            info.mode = 0o644
            archive.addfile(info, io.BytesIO(raw))
    return buffer.getvalue()


def _write_whole(path: str, raw: bytes) -> None:
    directory = os.path.dirname(path) or "."
    fd, temporary = tempfile.mkstemp(prefix=".stub-", dir=directory)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(raw)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _familiar(reference: Reference) -> str:
    """NAME:TAG as docker load wants it; Docker Hub's names without their prefixes."""
    name = reference.name.removeprefix("docker.io/").removeprefix("library/")
    return f"{name}:{reference.tag or 'latest'}"


def _json(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _hex(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()

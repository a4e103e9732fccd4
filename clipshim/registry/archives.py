"""Local images: OCI layouts in directories and archives, and archives of docker save.

Each gives the raw manifest of one image and says at which offset of which file a blob lies, so
that ranged reads need no unpacking. Formats: image-spec image-layout.md; moby
image/spec/v1.2.md (manifest.json).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import posixpath
import tarfile
from typing import TYPE_CHECKING, Any, Protocol

from clipshim.errors import BadReferenceError, NotFoundError, RegistryError
from clipshim.registry.blobs import FileBlob
from clipshim.registry.manifests import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    OCI_INDEX,
    digest_of,
    load_json,
    verify_digest,
)
from clipshim.registry.references import ArchiveReference, check_digest, parse_reference

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_MEMBERS = 100_000
REF_NAME = "org.opencontainers.image.ref.name"


class LocalImage(Protocol):
    """One image in a directory or archive."""

    def manifest(self) -> tuple[bytes, str]:
        """Raw manifest or image index, and its media type."""
        ...

    def read(self, digest: str, limit: int) -> bytes:
        """A small blob, verified."""
        ...

    def locate(self, digest: str) -> FileBlob:
        """Where a blob lies, unverified. Raises NotFoundError."""
        ...


def open_archive(image: ArchiveReference) -> LocalImage:
    """Raises NotFoundError if nothing is there, RegistryError if it is something else."""
    try:
        facts = os.stat(image.path)
    except OSError as exc:
        raise NotFoundError(f"image {image}: {image.path}: {exc.strerror}") from exc
    version = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    return _open_version(
        ArchiveReference(image.scheme, os.path.abspath(image.path), image.tag), version
    )


@functools.lru_cache(maxsize=16)
def _open_version(image: ArchiveReference, version: tuple[int, ...]) -> LocalImage:
    """Archives are read through to find their members: once, as long as they do not change."""
    del version
    if image.scheme == "oci":
        if not os.path.isdir(image.path):
            raise BadReferenceError(
                f"image {image}: expected a directory", hint=f"write oci-archive:{image.path}"
            )
        return _Layout(image, _Directory(image.path))
    if os.path.isdir(image.path):
        raise BadReferenceError(
            f"image {image}: expected an archive, got a directory", hint=f"write oci:{image.path}"
        )
    members = _Tar(image.path)
    if image.scheme == "oci-archive":
        if members.find("oci-layout") is None and members.find("index.json") is None:
            hint = None
            if members.find("manifest.json") is not None:
                hint = f"write docker-archive:{image.path}"
            raise RegistryError(f"image {image}: expected an OCI layout in the archive", hint=hint)
        return _Layout(image, members)
    return _DockerArchive(image, members)


class _Files(Protocol):
    """Named files in a directory or archive."""

    path: str

    def find(self, name: str) -> FileBlob | None: ...


class _Directory:
    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)

    def find(self, name: str) -> FileBlob | None:
        path = os.path.join(self.path, name)
        try:
            return FileBlob(path, 0, os.stat(path).st_size) if os.path.isfile(path) else None
        except OSError:
            return None


class _Tar:
    """Where the members of a tar archive lie; only headers are read."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self._members: dict[str, FileBlob] = {}
        self._links: dict[str, str] = {}
        try:
            with tarfile.open(self.path, "r:") as archive:
                for number, member in enumerate(archive):
                    if number >= MAX_MEMBERS:
                        raise RegistryError(f"archive {path}: more than {MAX_MEMBERS} members")
                    name = _clean(member.name)
                    if member.isreg() and not member.issparse():
                        self._members[name] = FileBlob(self.path, member.offset_data, member.size)
                    elif member.issym():
                        target = posixpath.join(posixpath.dirname(name), member.linkname)
                        self._links[name] = _clean(target)
                    elif member.islnk():
                        self._links[name] = _clean(member.linkname)
        except OSError as exc:
            raise RegistryError(f"archive {path}: {exc.strerror or exc}") from exc
        except (tarfile.TarError, EOFError, ValueError) as exc:
            raise RegistryError(
                f"archive {path}: expected an uncompressed tar archive: {exc}",
                hint="decompress it first: layers are read in place",
            ) from exc

    def find(self, name: str) -> FileBlob | None:
        name = _clean(name)
        for _ in range(8):
            if name in self._members:
                return self._members[name]
            if name not in self._links:
                return None
            name = self._links[name]
        return None


class _Layout:
    """An OCI image layout."""

    def __init__(self, image: ArchiveReference, files: _Files) -> None:
        self._image = image
        self._files = files

    def manifest(self) -> tuple[bytes, str]:
        raw = self._read_file("index.json", MAX_MANIFEST_BYTES)
        listed = load_json(raw, f"image {self._image}: index.json").get("manifests")
        listed = listed if isinstance(listed, list) else []
        entries = [item for item in listed if isinstance(item, dict)]
        if not entries:
            raise NotFoundError(f"image {self._image}: index.json lists no image")
        tag = self._image.tag
        if tag is not None:
            named = [item for item in entries if _is_named(item, tag)]
            if not named:
                raise NotFoundError(
                    f"image {self._image}: no image is called {tag!r}: "
                    f"there is {', '.join(_names(entries)) or 'none with a name'}"
                )
            entries = named
        if len(entries) > 1 and len({item.get("digest") for item in entries}) > 1:
            names = _names(entries)
            if len(names) > 1:
                raise BadReferenceError(
                    f"image {self._image}: several images: {', '.join(names)}",
                    hint=f"write {self._image.scheme}:{self._image.path}:NAME",
                )
            # No names, or one for all: they differ in platform; they are an index themselves.
            merged = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
            return merged, OCI_INDEX
        digest = str(entries[0].get("digest", ""))
        return self.read(digest, MAX_MANIFEST_BYTES), str(entries[0].get("mediaType", ""))

    def read(self, digest: str, limit: int) -> bytes:
        raw = _read(self.locate(digest), limit)
        verify_digest(raw, digest, f"image {self._image}: blob")
        return raw

    def locate(self, digest: str) -> FileBlob:
        check_digest(digest)
        found = self._files.find(f"blobs/sha256/{digest.removeprefix('sha256:')}")
        if found is None:
            raise NotFoundError(f"image {self._image}: blob {digest} is missing")
        return found

    def _read_file(self, name: str, limit: int) -> bytes:
        found = self._files.find(name)
        if found is None:
            raise RegistryError(f"image {self._image}: expected an OCI layout, got no {name}")
        return _read(found, limit)


class _DockerArchive:
    """What docker save writes. It has no manifest of its own kind: one is made, always the same."""

    def __init__(self, image: ArchiveReference, files: _Tar) -> None:
        self._image = image
        self._files = files
        entry = self._choose()
        self._config_name = _text(entry.get("Config"), image)
        names = entry.get("Layers")
        if not isinstance(names, list):
            raise RegistryError(f"image {image}: manifest.json: expected Layers")
        self._layer_names = [_text(name, image) for name in names]
        self._layers: list[tuple[str, FileBlob]] | None = None

    def manifest(self) -> tuple[bytes, str]:
        config_raw = self._config()
        layers = []
        for digest, blob in self._located(config_raw):
            layers.append(
                {
                    "mediaType": DOCKER_LAYER + _compression(blob),
                    "size": blob.size,
                    "digest": digest,
                }
            )
        document = {
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST,
            "config": {
                "mediaType": DOCKER_CONFIG,
                "size": len(config_raw),
                "digest": digest_of(config_raw),
            },
            "layers": layers,
        }
        return json.dumps(document, separators=(",", ":")).encode(), DOCKER_MANIFEST

    def read(self, digest: str, limit: int) -> bytes:
        config_raw = self._config()
        raw = config_raw if digest_of(config_raw) == digest else _read(self.locate(digest), limit)
        verify_digest(raw, digest, f"image {self._image}: blob")
        return raw

    def locate(self, digest: str) -> FileBlob:
        found = dict(self._located(self._config())).get(digest)
        if found is None:
            raise NotFoundError(f"image {self._image}: blob {digest} is missing")
        return found

    def _choose(self) -> Mapping[str, Any]:
        found = self._files.find("manifest.json")
        if found is None:
            hint = None
            if self._files.find("index.json") is not None:
                hint = f"write oci-archive:{self._image.path}"
            raise RegistryError(
                f"image {self._image}: expected manifest.json in the archive", hint=hint
            )
        try:
            entries = json.loads(_read(found, MAX_MANIFEST_BYTES))
        except (ValueError, RecursionError) as exc:
            raise RegistryError(f"image {self._image}: manifest.json: {exc}") from exc
        if not isinstance(entries, list) or not all(isinstance(item, dict) for item in entries):
            raise RegistryError(f"image {self._image}: manifest.json: expected a list")
        tags = {tag: item for item in entries for tag in _tags(item)}
        if self._image.tag is not None:
            wanted = _docker_name(self._image.tag)
            for tag, item in tags.items():
                if tag == self._image.tag or _docker_name(tag) == wanted:
                    return dict(item)
            raise NotFoundError(
                f"image {self._image}: no image is called {self._image.tag!r}: "
                f"there is {', '.join(sorted(tags)) or 'none with a name'}"
            )
        if len(entries) != 1:
            raise BadReferenceError(
                f"image {self._image}: {len(entries)} images: {', '.join(sorted(tags))}",
                hint=f"write docker-archive:{self._image.path}:NAME:TAG",
            )
        return dict(entries[0])

    def _config(self) -> bytes:
        found = self._files.find(self._config_name)
        if found is None:
            raise RegistryError(f"image {self._image}: {self._config_name} is missing")
        return _read(found, MAX_CONFIG_BYTES)

    def _located(self, config_raw: bytes) -> list[tuple[str, FileBlob]]:
        """Digest and place of each layer. A plain tar's digest is its diff ID, which is known."""
        if self._layers is not None:
            return self._layers
        rootfs = load_json(config_raw, f"image {self._image}: config").get("rootfs")
        diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
        if not isinstance(diff_ids, list) or len(diff_ids) != len(self._layer_names):
            raise RegistryError(
                f"image {self._image}: expected {len(self._layer_names)} diff IDs in the config"
            )
        result = []
        for name, diff_id in zip(self._layer_names, diff_ids, strict=True):
            blob = self._files.find(name)
            if blob is None:
                raise RegistryError(f"image {self._image}: layer {name} is missing")
            digest = check_digest(str(diff_id))
            result.append((_hash(blob) if _compression(blob) else digest, blob))
        self._layers = result
        return result


def _is_named(item: Mapping[str, Any], tag: str) -> bool:
    annotations = item.get("annotations")
    if not isinstance(annotations, dict):
        return False
    name = annotations.get(REF_NAME)
    return (
        name == tag
        or annotations.get("io.containerd.image.name") == tag
        or (isinstance(name, str) and name.rpartition(":")[2] == tag and "/" in name)
    )


def _names(entries: list[dict[str, Any]]) -> list[str]:
    found = {
        str(item["annotations"][REF_NAME])
        for item in entries
        if isinstance(item.get("annotations"), dict) and REF_NAME in item["annotations"]
    }
    return sorted(found)


def _tags(entry: Mapping[str, Any]) -> list[str]:
    tags = entry.get("RepoTags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def _docker_name(text: str) -> str:
    try:
        return str(parse_reference(text))
    except BadReferenceError:
        return text


def _clean(name: str) -> str:
    return posixpath.normpath("/" + name).lstrip("/")


def _text(value: Any, image: ArchiveReference) -> str:
    if not isinstance(value, str) or not value:
        raise RegistryError(f"image {image}: manifest.json: expected a name, got {value!r}")
    return value


def _read(blob: FileBlob, limit: int) -> bytes:
    if blob.size > limit:
        raise RegistryError(f"{blob.path}: expected at most {limit} bytes, got {blob.size}")
    return _pread(blob, blob.size)


def _pread(blob: FileBlob, count: int) -> bytes:
    try:
        with open(blob.path, "rb") as file:
            file.seek(blob.offset)
            return file.read(min(count, blob.size))
    except OSError as exc:
        raise RegistryError(f"{blob.path}: {exc.strerror}") from exc


def _compression(blob: FileBlob) -> str:
    """The ending of the media type, by magic bytes: archives do not say it."""
    magic = _pread(blob, 4)
    if magic[:2] == b"\x1f\x8b":
        return ".gzip"
    return ".zstd" if magic == b"\x28\xb5\x2f\xfd" else ""


def _hash(blob: FileBlob) -> str:
    digest = hashlib.sha256()
    left = blob.size
    with open(blob.path, "rb") as file:
        file.seek(blob.offset)
        while left > 0:
            part = file.read(min(left, 1 << 20))
            if not part:
                break
            digest.update(part)
            left -= len(part)
    return f"sha256:{digest.hexdigest()}"

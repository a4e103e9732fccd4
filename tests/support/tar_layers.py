"""Layers made by hand, for tests of fidelity: any header, also those that no tool writes."""

from __future__ import annotations

import tarfile
from typing import TYPE_CHECKING, Literal

from clipshim.index.erofs_read import HOLE, ErofsImage
from clipshim.index.erofs_write import write_erofs
from clipshim.index.merge import merge
from clipshim.index.tar_walk import TarEntry, TarWalker
from clipshim.index.tree_check import check_tree

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PIECE = 1 << 20
Format = Literal[0, 1, 2]  # of tarfile


def member(
    name: str,
    data: bytes = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: float = 1_000_000_000,
    target: str = "",
    device: tuple[int, int] = (0, 0),
    pax: dict[str, str] | None = None,
    form: Format = tarfile.PAX_FORMAT,
) -> bytes:
    """One member: its headers, its data, its padding."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode, uid, gid, mtime
    info.linkname, info.size = target, len(data)
    info.devmajor, info.devminor = device
    info.pax_headers = pax or {}
    header = info.tobuf(form, "utf-8", "surrogateescape")
    return header + data + bytes(-len(data) % 512)


def directory(name: str, *, mode: int = 0o755, mtime: float = 1_000_000_000) -> bytes:
    """A directory's member."""
    return member(name, kind=tarfile.DIRTYPE, mode=mode, mtime=mtime)


def link(name: str, target: str, *, kind: bytes = tarfile.LNKTYPE) -> bytes:
    """A hard link's member; a symbolic link's with `kind`."""
    return member(name, kind=kind, target=target)


def raw_header(
    name: bytes,
    *,
    size: bytes = b"00000000000\0",
    flag: bytes = b"0",
    magic: bytes = b"ustar\x0000",
    mode: bytes = b"0000644\0",
    uid: bytes = b"0000000\0",
    gid: bytes = b"0000000\0",
    mtime: bytes = b"07346545000\0",
    linkname: bytes = b"",
    prefix: bytes = b"",
    signed: bool = False,
) -> bytes:
    """A header block with exactly these fields and a right checksum."""
    block = bytearray(512)
    for at, field in (
        (0, name),
        (100, mode),
        (108, uid),
        (116, gid),
        (124, size),
        (136, mtime),
        (148, b" " * 8),
        (156, flag),
        (157, linkname),
        (257, magic),
        (345, prefix),
    ):
        block[at : at + len(field)] = field
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in block)
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


def base_256(number: int, width: int) -> bytes:
    """GNU's form of numbers that octal digits cannot hold."""
    value = number & ((1 << (8 * width - 1)) - 1) | 1 << (8 * width - 1)
    if number < 0:
        value |= 1 << (8 * width - 2)
    return value.to_bytes(width, "big")


def layer(*members: bytes) -> bytes:
    """A whole tar stream."""
    return b"".join(members) + bytes(1024)


def entries(data: bytes, *, step: int = PIECE, name: str = "layer") -> list[TarEntry]:
    """What the walker finds in a stream that is fed in pieces."""
    walker = TarWalker(name)
    for offset in range(0, len(data), step):
        walker.feed(data[offset : offset + step])
    return walker.close()


def tree_of(*layers: bytes) -> ErofsImage:
    """The checked tree of layers in memory."""
    sizes = [len(data) for data in layers]
    image = ErofsImage(write_erofs(merge([entries(data) for data in layers]), sizes))
    check_tree(image, sizes)
    return image


def tree_of_files(layer_files: Sequence[Path]) -> bytes:
    """The checked tree of layers in files, however large."""
    found, sizes = [], []
    for path in layer_files:
        walker = TarWalker(path.name)
        with path.open("rb") as file:
            while data := file.read(PIECE):
                walker.feed(data)
        found.append(walker.close())
        sizes.append(walker.offset)
    tree = write_erofs(merge(found), sizes)
    check_tree(ErofsImage(tree), sizes)
    return tree


def paths(image: ErofsImage) -> set[bytes]:
    """All paths but the root's."""
    return {path for path, _ in image.walk()} - {b""}


def find(image: ErofsImage, path: bytes) -> int:
    """The nid at a path, by lookups."""
    nid = image.root_nid
    for part in path.split(b"/"):
        found = image.lookup(nid, part)
        assert found is not None, path
        nid = found
    return nid


def content(image: ErofsImage, layers: Sequence[bytes], path: bytes) -> bytes:
    """A file's bytes, through its extents."""
    nid = find(image, path)
    parts = []
    for device, offset, length in image.extents(nid, 0, image.stat(nid).size):
        source = bytes(length) if device == HOLE else bytes(image.buffer)
        if device > 0:
            source = layers[device - 1]
        parts.append(source if device == HOLE else source[offset : offset + length])
        assert len(parts[-1]) == length
    return b"".join(parts)

"""`clipshim inspect INDEX`: what an index holds, down to one file's spans."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipshim.cli.options import Format, OutputFormat
from clipshim.cli.terminal import (
    human_size,
    print_fields,
    print_json,
    print_table,
    printable,
)
from clipshim.errors import IndexFormatError, NotFoundError

if TYPE_CHECKING:
    from clipshim.index.erofs_read import ErofsImage
    from clipshim.index.model import Index

KINDS = {
    stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device", stat.S_IFBLK: "block device", stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}  # fmt: skip

MAX_LISTED_SPANS = 1_000_000


def command(
    index: Annotated[
        str, typer.Argument(metavar="INDEX", help="An index file, or an image in the local store.")
    ],
    path: Annotated[
        str | None, typer.Option("--path", metavar="PATH", help="Show one file of the image.")
    ] = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Show what an index holds.

    \b
    clipshim inspect app.clip
    clipshim inspect app.clip --path /usr/bin/python3 --format json
    """
    from clipshim.cli.images import open_named
    from clipshim.index.tree_check import sound_tree
    from clipshim.settings import load_settings

    with open_named(load_settings(), index) as opened:
        if path is None:
            facts = describe_index(opened)
            show = show_index
        else:
            facts = describe_file(opened, sound_tree(opened), path)
            show = show_file
    if output is OutputFormat.JSON:
        print_json(facts)
    else:
        show(facts)


def describe_index(index: Index) -> dict[str, Any]:
    """Everything but the tree's entries."""
    layers = []
    for number, layer in enumerate(index.layers):
        layers.append(
            {
                "number": number,
                "blob_digest": layer.blob_digest,
                "diff_id": layer.diff_id,
                "media_type": layer.media_type,
                "compression": layer.compression,
                "blob_size": layer.blob_size,
                "size": layer.size,
                "spans": len(index.span_table(number)),
            }
        )
    return {
        "digest": index.digest,
        "image_id": index.image_id,
        "reference": index.reference,
        "manifest_digest": index.manifest_digest,
        "platform": index.platform,
        "self_contained": index.has_blobs,
        "profile_spans": len(index.profile) if index.profile is not None else None,
        "tree_size": len(index.tree()),
        "config": index.config,
        "layers": layers,
    }


def describe_file(index: Index, image: ErofsImage, path: str) -> dict[str, Any]:
    """Attributes of one entry, and where its bytes come from. Raises NotFoundError."""
    nid = _find(image, path)
    if nid is None:
        raise NotFoundError(f"{path}: not in {index.reference}")
    facts = image.stat(nid)
    result: dict[str, Any] = {
        "path": path,
        "type": KINDS.get(stat.S_IFMT(facts.mode), "unknown"),
        "mode": f"{stat.S_IMODE(facts.mode):04o}",
        "uid": facts.uid,
        "gid": facts.gid,
        "size": facts.size,
        "links": facts.nlink,
        "mtime": _time(facts.mtime_ns),
        "mtime_ns": facts.mtime_ns,
        "inode": nid,
    }
    if stat.S_ISLNK(facts.mode):
        result["target"] = printable(image.readlink(nid))
    if stat.S_ISCHR(facts.mode) or stat.S_ISBLK(facts.mode):
        result["device"] = f"{os.major(facts.rdev)}:{os.minor(facts.rdev)}"
    xattrs = image.xattrs(nid)
    if xattrs:
        result["xattrs"] = {printable(name): value.hex() for name, value in xattrs.items()}
    if stat.S_ISREG(facts.mode):
        result["extents"] = _extents(index, image.extents(nid, 0, facts.size))
    if stat.S_ISDIR(facts.mode):
        entries = [bytes(entry[0]) for entry in image.readdir(nid)]
        result["entries"] = sorted(printable(n) for n in entries if n not in (b".", b".."))
    return result


def show_index(facts: dict[str, Any]) -> None:
    """`describe_index` as text."""
    config = facts["config"].get("config")
    config = config if isinstance(config, dict) else {}
    fields: list[tuple[str, object]] = [
        ("reference", facts["reference"]),
        ("platform", facts["platform"]),
        ("manifest", facts["manifest_digest"]),
        ("index", facts["digest"]),
        ("tree", human_size(facts["tree_size"])),
        ("self-contained", "yes" if facts["self_contained"] else "no"),
    ]
    if facts["profile_spans"] is not None:
        fields.append(("profile", f"{facts['profile_spans']} spans"))
    for name, key in (("entrypoint", "Entrypoint"), ("command", "Cmd"), ("user", "User")):
        if config.get(key):
            fields.append((name, config[key]))
    print_fields(fields)
    print_table(
        ("layer", "blob", "compression", "stored", "size", "spans"),
        [
            (
                layer["number"], layer["blob_digest"][7:19], layer["compression"],
                human_size(layer["blob_size"]), human_size(layer["size"]), layer["spans"],
            )
            for layer in facts["layers"]
        ],
    )  # fmt: skip


def show_file(facts: dict[str, Any]) -> None:
    """`describe_file` as text."""
    skipped = ("extents", "entries", "xattrs", "mtime_ns")
    print_fields([(name, value) for name, value in facts.items() if name not in skipped])
    for name, value in facts.get("xattrs", {}).items():
        print_fields([(f"xattr {name}", value)])
    if facts.get("extents"):
        print_table(
            ("layer", "offset", "length", "spans", "compressed"),
            [
                (
                    "hole" if extent["layer"] is None else extent["layer"],
                    extent.get("offset", "-"), extent["length"],
                    _range(extent.get("spans", [])), extent.get("compressed", "-"),
                )
                for extent in facts["extents"]
            ],
        )  # fmt: skip
    if facts.get("entries"):
        print_fields([("entries", "  ".join(facts["entries"]))])


def _find(image: ErofsImage, path: str) -> int | None:
    """The entry itself: symlinks on the way are followed nowhere, as `lstat` of a real path."""
    nid = image.root_nid
    for part in os.fsencode(path).split(b"/"):
        if part in (b"", b"."):
            continue
        if not stat.S_ISDIR(image.stat(nid).mode):
            return None
        found = image.lookup(nid, part)
        if found is None:
            return None
        nid = found
    return nid


def _extents(index: Index, extents: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = []
    listed = 0
    for device, offset, length in extents:
        if device < 1:
            result.append({"layer": None, "length": length})
            continue
        layer = device - 1
        table = index.span_table(layer)
        first = table.find(offset)
        last = table.find(max(offset, offset + length - 1))
        spans = list(range(first, last + 1))
        listed += len(spans)
        if listed > MAX_LISTED_SPANS:  # a hostile tree may name the whole layer again and again
            raise IndexFormatError(
                f"{index.reference}: a file of more than {MAX_LISTED_SPANS} spans is not listed"
            )
        result.append(
            {
                "layer": layer,
                "diff_id": index.layers[layer].diff_id,
                "offset": offset,
                "length": length,
                "spans": spans,
                "compressed": sum(table[span].compressed_size for span in spans),
            }
        )
    return result


def _range(spans: list[int]) -> str:
    if not spans:
        return "-"
    return str(spans[0]) if len(spans) == 1 else f"{spans[0]}-{spans[-1]}"


def _time(mtime_ns: int) -> str:
    try:
        seconds = datetime.fromtimestamp(mtime_ns // 10**9, UTC)
    except (ValueError, OverflowError, OSError):
        return str(mtime_ns)
    return f"{seconds:%Y-%m-%dT%H:%M:%S}.{mtime_ns % 10**9:09d}Z"

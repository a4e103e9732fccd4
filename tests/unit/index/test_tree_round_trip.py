"""From tar streams through merge and EROFS image to what the reader says."""

import io
import tarfile

from clipshim.index.erofs_read import HOLE, ErofsImage
from clipshim.index.erofs_write import write_erofs
from clipshim.index.merge import merge
from clipshim.index.tar_walk import TarWalker
from clipshim.index.tree_check import check_tree

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", **fields: object) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def layer(*members: Member) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tree_of(*layers: bytes) -> ErofsImage:
    entries = []
    for number, data in enumerate(layers):
        walker = TarWalker(str(number))
        walker.feed(data)
        entries.append(walker.close())
    sizes = [len(data) for data in layers]
    image = ErofsImage(write_erofs(merge(entries), sizes))
    check_tree(image, sizes)
    return image


def read(image: ErofsImage, layers: tuple[bytes, ...], nid: int) -> bytes:
    content = b""
    for device, offset, length in image.extents(nid, 0, image.stat(nid).size):
        if device == HOLE:
            content += bytes(length)
        else:
            source = bytes(image.buffer) if device == 0 else layers[device - 1]
            content += source[offset : offset + length]
    return content


def find(image: ErofsImage, path: str) -> int | None:
    nid: int | None = image.root_nid
    for part in path.encode().split(b"/"):
        assert nid is not None
        nid = image.lookup(nid, part)
    return nid


def paths(image: ErofsImage) -> set[str]:
    return {path.decode() for path, _ in image.walk()} - {""}


def test_file_contents_come_from_the_layer_that_holds_them() -> None:
    layers = (
        layer(member("etc/a", b"lower a"), member("etc/b", b"lower b")),
        layer(member("./etc/b", b"upper"), member("/etc/c", b"x" * 5000)),
    )
    image = tree_of(*layers)
    for path, content in (("etc/a", b"lower a"), ("etc/b", b"upper"), ("etc/c", b"x" * 5000)):
        nid = find(image, path)
        assert nid is not None
        assert read(image, layers, nid) == content


def test_whiteouts_and_opaque_markers_hide_lower_layers_only() -> None:
    lower = layer(member("d/old", b"1"), member("d/gone", b"2"), member("e/x", b"3"))
    upper = layer(
        member("d/new", b"4"), member("d/.wh..wh..opq"), member("d/late", b"5"), member(".wh.e")
    )
    assert paths(tree_of(lower, upper)) == {"d", "d/new", "d/late"}


def test_hard_links_share_an_inode_across_layers_and_before_their_target() -> None:
    link = {"type": tarfile.LNKTYPE}
    lower = layer(member("first", linkname="second", **link), member("second", b"data"))
    upper = layer(member(".wh.second"), member("third", linkname="second", **link))
    image = tree_of(lower, upper)
    assert paths(image) == {"first", "third"}
    first = find(image, "first")
    assert first is not None
    assert first == find(image, "third")
    assert image.stat(first).nlink == 2


def test_entries_below_a_symbolic_link_land_in_its_target() -> None:
    lower = layer(
        member("usr/bin/", type=tarfile.DIRTYPE),
        member("bin", type=tarfile.SYMTYPE, linkname="usr/bin"),
    )
    image = tree_of(lower, layer(member("bin/tool", b"#!")))
    assert paths(image) == {"usr", "usr/bin", "usr/bin/tool", "bin"}

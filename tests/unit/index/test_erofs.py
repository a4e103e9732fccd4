"""The EROFS writer and reader against each other; the kernel judges both in tests/system."""

import contextlib
import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipshim.errors import IndexFormatError, LayerError
from clipshim.index.erofs_format import BLOCK, SUPER_OFFSET
from clipshim.index.erofs_read import HOLE, ErofsImage
from clipshim.index.erofs_write import write_erofs
from clipshim.index.merge import merge
from clipshim.index.tar_walk import REGULAR, TarEntry
from clipshim.index.tree_check import check_tree
from tests.support.tar_layers import (
    content,
    directory,
    entries,
    find,
    layer,
    link,
    member,
    paths,
    tree_of,
)

names = st.binary(min_size=1, max_size=255).filter(
    lambda name: not {0, 0x2F} & set(name) and name not in (b".", b"..")
)


def sparse(name: str, pairs: str) -> dict[str, str]:
    """PAX records of GNU's sparse format 0.1, for a file of 9,000 bytes."""
    return {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.name": name,
        "GNU.sparse.size": "9000",
        "GNU.sparse.map": pairs,
    }


def sample() -> list[bytes]:
    """Layers with everything that a tree can hold."""
    one = layer(
        directory("etc/"),
        member("etc/file", b"x" * 3000, uid=70_000),
        member("etc/empty"),
        link("etc/second", "etc/file"),
        link("link", "etc/file", kind=tarfile.SYMTYPE),
        link("long-link", "t" * 1000, kind=tarfile.SYMTYPE),
        member("device", kind=tarfile.CHRTYPE, device=(1, 300)),
        member("fifo", kind=tarfile.FIFOTYPE),
        member("xattr", b"x", pax={"SCHILY.xattr.user.a": "b", "SCHILY.xattr.security.x": "y"}),
        directory("proc/"),
        *(member(f"many/{number:03}", b"m") for number in range(100)),
    )
    two = layer(
        member("usr/x", b"upper", mtime=5),
        member("s", b"d" * 1024, pax=sparse("sparse", "512,512,4096,512")),
        member("u", b"odd", pax=sparse("unaligned", "7,3")),
    )
    return [one, two]


SAMPLE = sample()
SIZES = [len(data) for data in SAMPLE]
IMAGE = write_erofs(merge([entries(data) for data in SAMPLE]), SIZES)


def test_everything_reads_back() -> None:
    image = ErofsImage(IMAGE)
    assert image.device_count == 2
    assert content(image, SAMPLE, b"etc/file") == b"x" * 3000
    assert content(image, SAMPLE, b"etc/empty") == b""
    assert content(image, SAMPLE, b"usr/x") == b"upper"
    assert image.readlink(find(image, b"link")) == b"etc/file"
    assert image.readlink(find(image, b"long-link")) == b"t" * 1000
    facts = image.stat(find(image, b"etc/second"))
    assert (facts.nlink, facts.uid, facts.size) == (2, 70_000, 3000)
    assert facts.ino == find(image, b"etc/file")
    assert image.stat(find(image, b"device")).rdev == 300 & 0xFF | 1 << 8 | 0x100 << 12
    assert image.xattrs(find(image, b"xattr")) == {b"user.a": b"b", b"security.x": b"y"}
    assert image.lookup(image.root_nid, b"nothing") is None
    assert image.lookup(image.root_nid, b"..") == image.root_nid
    assert [name for name, _, _ in image.readdir(find(image, b"many"))] == [
        b"%03d" % number for number in range(100)
    ]


def test_sparse_files_are_holes_and_pieces() -> None:
    image = ErofsImage(IMAGE)
    expected = bytearray(9000)
    expected[512:1024] = expected[4096:4608] = b"d" * 512
    assert content(image, SAMPLE, b"sparse") == bytes(expected)
    extents = image.extents(find(image, b"sparse"), 0, 10_000)
    assert [device for device, _, _ in extents] == [HOLE, 2, HOLE, 2, HOLE]
    expected = bytearray(9000)
    expected[7:10] = b"odd"
    assert content(image, SAMPLE, b"unaligned") == bytes(expected)


def test_the_same_layers_give_the_same_bytes() -> None:
    again = write_erofs(merge([entries(data, step=100) for data in SAMPLE]), SIZES)
    assert again == IMAGE


@pytest.mark.parametrize(
    ("target", "leads"),
    [
        ("usr/bin", True),
        ("/usr/bin/", True),
        ("../../usr/./bin/../lib", True),
        ("usr/bin/tool", True),
        ("usr/bin/tool/", False),
        ("usr/bin/tool/x", False),
        ("usr/bin/tool/..", False),
        ("boot/vmlinuz", False),
        ("usr/away", True),
        ("usr/away/lib", True),
        ("usr/nowhere/lib", False),
        ("itself", False),
        ("usr/itself/x", False),
    ],
)
def test_links_at_the_top_that_lead_to_something(target: str, leads: bool) -> None:
    symlink = tarfile.SYMTYPE
    stream = layer(
        directory("usr/bin/"),
        directory("usr/lib/"),
        member("usr/bin/tool", b"x"),
        link("usr/away", "/usr", kind=symlink),
        link("usr/nowhere", "/nowhere", kind=symlink),
        link("usr/itself", "itself", kind=symlink),
        link("itself", "itself", kind=symlink),
        link("top", target, kind=symlink),
    )
    facts = check_tree(tree_of(stream), [len(stream)])
    assert facts.top_symlinks == ({b"top": target.encode()} if leads else {})


def test_what_the_checker_says_of_a_sound_tree() -> None:
    facts = check_tree(ErofsImage(IMAGE), SIZES)
    assert facts.has_proc
    assert facts.has_usr
    assert facts.top_symlinks == {b"link": b"etc/file"}, "long-link dangles"
    assert facts.total_bytes == 3000 + 5 + 2 * 9000 + 1 + 100
    assert facts.inodes == ErofsImage(IMAGE).inode_count


@given(st.sets(names, max_size=60))
@settings(max_examples=60)
def test_any_names_are_found_again(found: set[bytes]) -> None:
    tree = merge([[TarEntry(name, REGULAR, 0o600, 0, 0, 0, 0) for name in found if
                   not name.startswith(b".wh.")]])  # fmt: skip
    image = ErofsImage(write_erofs(tree, [0]))
    check_tree(image, [0])
    assert paths(image) == set(tree.root.children or ())
    for name in tree.root.children or ():
        nid = image.lookup(image.root_nid, name)
        assert nid is not None
        assert image.stat(nid).mode == 0o100600


@given(
    st.dictionaries(
        st.sampled_from([b"user.", b"trusted.", b"security."]).flatmap(
            lambda prefix: st.binary(min_size=1, max_size=100).map(lambda name: prefix + name)
        ),
        st.binary(max_size=3000),
        max_size=5,
    ),
    st.integers(-(2**40), 2**62),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=100)
def test_any_metadata_reads_back(xattrs: dict[bytes, bytes], mtime_ns: int, owner: int) -> None:
    entry = TarEntry(b"f", REGULAR, 0o4755, owner, owner // 2, 0, mtime_ns, xattrs=xattrs)
    image = ErofsImage(write_erofs(merge([[entry]]), [0]))
    check_tree(image, [0])
    nid = find(image, b"f")
    facts = image.stat(nid)
    assert (facts.mode, facts.uid, facts.gid) == (0o104755, owner, owner // 2)
    assert facts.mtime_ns == mtime_ns
    hidden = b"trusted.overlay."
    assert image.xattrs(nid) == {n: v for n, v in xattrs.items() if not n.startswith(hidden)}


@given(st.integers(0, 20_000), st.integers(0, 20_000))
@settings(max_examples=100)
def test_extents_cover_exactly_what_was_asked(offset: int, length: int) -> None:
    image = ErofsImage(IMAGE)
    for name, size in ((b"sparse", 9000), (b"unaligned", 9000), (b"etc/file", 3000)):
        found = image.extents(find(image, name), offset, length)
        assert sum(part for _, _, part in found) == max(min(offset + length, size) - offset, 0)


def test_attributes_that_no_kernel_shows_are_left_out() -> None:
    xattrs = {b"system.nfs4_acl": b"x", b"odd": b"y", b"trusted.overlay.opaque": b"y"}
    tree = merge([[TarEntry(b"f", REGULAR, 0o600, 0, 0, 0, 0, xattrs=xattrs)]])
    image = ErofsImage(write_erofs(tree, [0]))
    assert image.xattrs(find(image, b"f")) == {}


def test_data_beyond_its_layer_is_refused() -> None:
    tree = merge([[TarEntry(b"f", REGULAR, 0o600, 0, 0, 1000, 0, data_offset=512)]])
    with pytest.raises(LayerError, match="data beyond its layer"):
        write_erofs(tree, [1024])


def test_a_tree_of_other_layers_is_refused() -> None:
    for sizes in (SIZES[:1], [*SIZES, 512], [SIZES[0] - 1024, SIZES[1]], SIZES[::-1]):
        with pytest.raises(IndexFormatError):
            check_tree(ErofsImage(IMAGE), sizes)


def test_a_layer_that_ends_within_its_last_block_is_refused() -> None:
    stream = member("f", b"x" * 600)
    tree = merge([entries(stream)])
    image = ErofsImage(write_erofs(tree, [len(stream) - 400]))
    check_tree(image, [len(stream) - 400])
    with pytest.raises(IndexFormatError, match="lies outside"):
        check_tree(image, [len(stream) - 430])


@pytest.mark.parametrize("size", [0, 100, 1024, 1151, 1200, 1536])
def test_short_images_are_refused(size: int) -> None:
    with pytest.raises(IndexFormatError):
        ErofsImage(IMAGE[:size])


def use(image: ErofsImage) -> None:
    """What a mount would do with a tree."""
    limit = 20_000
    for path, nid in image.walk():
        limit -= 1
        assert limit, "a walk without end"
        facts = image.stat(nid)
        image.xattrs(nid)
        if facts.mode >> 12 == 0o12:
            image.readlink(nid)
        elif facts.mode >> 12 == 0o10:
            for device, offset, length in image.extents(nid, 0, 1 << 20):
                limits = [len(IMAGE), *SIZES]
                assert device == HOLE or offset + length <= limits[device]
        name = path.rpartition(b"/")[2]
        assert not name or name not in (b".", b"..")


def test_every_damage_of_the_superblock_is_noticed_or_harmless() -> None:
    for at in range(SUPER_OFFSET, SUPER_OFFSET + 2 * BLOCK):
        for bit in (0x01, 0x40, 0x80):
            damaged = bytearray(IMAGE)
            damaged[at] ^= bit
            try:
                image = ErofsImage(bytes(damaged))
                check_tree(image, SIZES)
            except IndexFormatError:
                continue
            use(image)


@given(st.integers(0, 2**32), st.integers(1, 4))
@settings(max_examples=400)
def test_a_damaged_image_is_refused_or_still_sound(seed: int, flips: int) -> None:
    choose = random.Random(seed)
    damaged = bytearray(IMAGE)
    for _ in range(flips):
        at = choose.randrange(SUPER_OFFSET, len(damaged))
        bit = 1 << choose.randrange(8)
        damaged[at] = choose.choice((0, 0xFF, choose.randrange(256), damaged[at] ^ bit))
    try:
        image = ErofsImage(bytes(damaged))
        check_tree(image, SIZES)
    except IndexFormatError:
        return
    use(image)


@given(st.integers(0, 2**32))
@settings(max_examples=200)
def test_reading_a_damaged_image_without_a_check_ends_in_an_index_format_error(seed: int) -> None:
    choose = random.Random(seed)
    damaged = bytearray(IMAGE)
    for _ in range(3):
        damaged[choose.randrange(SUPER_OFFSET, len(damaged))] = choose.randrange(256)
    with contextlib.suppress(IndexFormatError):
        image = ErofsImage(bytes(damaged))
        for nid in range(len(damaged) // 32):
            for action in (image.stat, image.xattrs, image.readdir, image.readlink):
                with contextlib.suppress(IndexFormatError):
                    action(nid)
            with contextlib.suppress(IndexFormatError):
                image.lookup(nid, b"etc")
            with contextlib.suppress(IndexFormatError):
                image.extents(nid, 0, 1 << 16)


def test_a_directory_below_itself_is_refused() -> None:
    data = layer(directory("a/"), directory("a/b/"))
    image = bytearray(write_erofs(merge([entries(data)]), [len(data)]))
    reader = ErofsImage(bytes(image))
    a, b = find(reader, b"a"), find(reader, b"a/b")
    at = image.index(b.to_bytes(8, "little") + b"\x27\0\x02")
    image[at : at + 8] = a.to_bytes(8, "little")
    with pytest.raises(IndexFormatError, match=r"two names|leads to"):
        check_tree(ErofsImage(bytes(image)), [len(data)])


def test_reading_through_a_memory_map_is_the_same(tmp_path: Path) -> None:
    import mmap

    (tmp_path / "tree").write_bytes(IMAGE)
    with (tmp_path / "tree").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        image = ErofsImage(mapped)
        check_tree(image, SIZES)
        assert paths(image) == paths(tree_of(*SAMPLE))
        assert image.readlink(find(image, b"link")) == b"etc/file"
        mapped.close()


def test_sparse_files_cannot_make_an_image_grow_without_bound() -> None:
    spread = [TarEntry(b"%d" % n, REGULAR, 0o600, 0, 0, 1 << 30, 0) for n in range(20)]
    for entry in spread:
        entry.sparse = [(number << 18, 1) for number in range(1, 1000)]
        entry.stored = bytes(999)
    with pytest.raises(LayerError, match="spread too thinly"):
        write_erofs(merge([spread]), [0])
    fine = [TarEntry(b"%d" % n, REGULAR, 0o600, 0, 0, 1 << 30, 0) for n in range(5)]
    for entry in fine:
        entry.sparse = [(512, 512)]
        entry.data_offset = 512
    with pytest.raises(LayerError, match="too many sparse chunks"):
        write_erofs(merge([fine]), [1024])

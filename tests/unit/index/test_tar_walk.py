"""The tar walker against Python's tarfile, and against damage."""

import contextlib
import io
import tarfile
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipshim.errors import LayerError
from clipshim.index import tar_walk
from clipshim.index.tar_walk import DIRECTORY, HARD_LINK, REGULAR, SYMLINK, TarWalker
from tests.support.tar_layers import (
    Format,
    base_256,
    directory,
    entries,
    layer,
    link,
    member,
    raw_header,
)

names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cs"]),
    min_size=1,
    max_size=60,
).filter(lambda name: name not in (".", "..") and len(name.encode()) <= 255)
paths = st.lists(names, min_size=1, max_size=5).map("/".join)
members = st.tuples(
    paths,
    st.binary(max_size=2000),
    st.integers(0, 0o7777),
    st.integers(0, 2**32 - 2),
    st.integers(0, 2**33),
)


@given(
    st.lists(members, max_size=8),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.integers(1, 3000),
)
@settings(max_examples=60)
def test_agrees_with_tarfile_however_it_is_fed(
    files: list[tuple[str, bytes, int, int, int]], form: Format, step: int
) -> None:
    stream = layer(
        *(
            member(name, data, mode=mode, uid=uid, gid=uid, mtime=mtime, form=form)
            for name, data, mode, uid, mtime in files
        )
    )
    found = entries(stream, step=step)
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        expected = archive.getmembers()
    assert [
        (entry.name, entry.size, entry.mode, entry.uid, entry.gid, entry.data_offset)
        for entry in found
    ] == [
        (info.name.encode(), info.size, info.mode, info.uid, info.gid, info.offset_data)
        for info in expected
    ]
    for entry, (_, data, _, _, mtime) in zip(found, files, strict=True):
        assert stream[entry.data_offset : entry.data_offset + entry.size] == data
        assert entry.mtime_ns == mtime * 1_000_000_000
        assert entry.data_offset % 512 == 0


@given(st.binary(max_size=3000))
@settings(max_examples=100)
def test_any_bytes_are_entries_or_a_layer_error(data: bytes) -> None:
    with contextlib.suppress(LayerError):
        entries(data)


@given(st.data())
@settings(max_examples=150)
def test_any_damage_is_entries_or_a_layer_error(data: st.DataObject) -> None:
    stream = bytearray(
        layer(
            directory("d/"),
            member("d/" + "n" * 120, b"data", pax={"mtime": "1.5", "SCHILY.xattr.user.a": "b"}),
            member("gnu" * 70, b"x" * 600, form=tarfile.GNU_FORMAT),
            link("l", "d", kind=SYMLINK),
            member("s", b"1\n0\n4\n".ljust(512, b"\0") + b"four", pax=SPARSE_1_0),
        )
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(stream) - 1))
        stream[at] = data.draw(st.integers(0, 255))
        block = at // 512 * 512
        if data.draw(st.booleans()):  # with a right checksum damage gets further
            stream[block + 148 : block + 156] = b" " * 8
            total = sum(stream[block : block + 512])
            stream[block + 148 : block + 156] = b"%06o\0 " % total
    del stream[data.draw(st.integers(0, len(stream))) :]
    try:
        for entry in entries(bytes(stream)):
            assert not entry.name.startswith(b"/")
            assert b".." not in entry.name.split(b"/")
    except LayerError:
        pass


SPARSE_1_0 = {
    "GNU.sparse.major": "1",
    "GNU.sparse.minor": "0",
    "GNU.sparse.name": "real",
    "GNU.sparse.realsize": "10000",
}


def test_memory_does_not_grow_with_payloads() -> None:
    piece = bytes(1 << 20)
    walker = TarWalker("large")
    walker.feed(raw_header(b"large", size=base_256(1 << 40, 12)))
    tracemalloc.start()
    try:
        for _ in range(2000):
            walker.feed(piece)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        (b"./a/b", b"a/b"),
        (b"/a//b/", b"a/b"),
        (b"././a/./b/.", b"a/b"),
        (b"a/../b", b"b"),
        (b"./", b""),
        (b"/", b""),
        (b".", b""),
        (b"..a/.b", b"..a/.b"),
        (b"...", b"..."),
    ],
)
def test_names_are_normalised(name: bytes, clean: bytes) -> None:
    assert [entry.name for entry in entries(layer(raw_header(name, flag=b"5")))] == [clean]


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/..", "./../x", "a/../.."])
def test_names_that_leave_the_root_are_refused(name: str) -> None:
    with pytest.raises(LayerError, match=r"layer layer: entry .* leads out of the root"):
        entries(layer(member(name, b"x")))
    with pytest.raises(LayerError, match="leads out of the root"):
        entries(layer(link("innocent", name)))


def test_targets_of_symbolic_links_stay_as_they_are() -> None:
    (entry,) = entries(layer(link("l", "/../..//x/", kind=SYMLINK)))
    assert (entry.type, entry.linkname) == (SYMLINK, b"/../..//x/")


def test_a_name_of_256_bytes_is_refused() -> None:
    with pytest.raises(LayerError, match="component of 256"):
        entries(layer(member("d/" + "n" * 256)))


def test_v7_directories_are_known_by_their_slash() -> None:
    found = entries(layer(raw_header(b"d/", magic=b"", flag=b"\0"), raw_header(b"f", flag=b"\0")))
    assert [entry.type for entry in found] == [DIRECTORY, REGULAR]


def test_star_headers_have_a_short_prefix() -> None:
    block = bytearray(raw_header(b"name", prefix=b"prefix"))
    block[345 + 131 : 345 + 131 + 24] = b"07346545000\0" * 2
    block[508:] = b"tar\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    assert entries(layer(bytes(block)))[0].name == b"prefix/name"


def test_numbers_of_all_sorts() -> None:
    header = raw_header(
        b"n",
        size=base_256(5, 12),
        uid=base_256(-2, 8),
        gid=base_256(-1, 8),
        mtime=base_256(-5, 12),
        mode=b"   644 \0",
    )
    (entry,) = entries(layer(header + b"12345".ljust(512, b"\0")))
    assert entry.size == 5
    assert entry.mode == 0o644
    assert entry.uid == 0xFFFFFFFE
    assert entry.gid == 0  # chown(2): -1 changes nothing, and root created the file
    assert entry.mtime_ns == -5_000_000_000


@pytest.mark.parametrize(
    ("value", "nanoseconds"),
    [
        ("1", 1_000_000_000),
        ("1.5", 1_500_000_000),
        ("1.0000000019", 1_000_000_001),
        ("-1.25", -1_250_000_000),
        (".5", 500_000_000),
    ],
)
def test_pax_times(value: str, nanoseconds: int) -> None:
    (entry,) = entries(layer(member("t", pax={"mtime": value})))
    assert entry.mtime_ns == nanoseconds


def test_extended_attributes_of_star_win_over_those_of_libarchive() -> None:
    pax = {
        "LIBARCHIVE.xattr.user.both": "bGliYXJjaGl2ZQ",
        "SCHILY.xattr.user.both": "star",
        "LIBARCHIVE.xattr.user.only%3D": "AAH/",
    }
    (entry,) = entries(layer(member("x", pax=pax)))
    assert entry.xattrs == {b"user.both": b"star", b"user.only=": b"\x00\x01\xff"}


def test_global_headers_change_nothing() -> None:
    records = b"20 path=everywhere/\n"
    stream = layer(
        raw_header(b"g", flag=b"g", size=b"%011o\0" % len(records)) + records.ljust(512, b"\0"),
        member("own-name", b"x"),
    )
    assert [entry.name for entry in entries(stream)] == [b"own-name"]


def test_links_have_no_payload_whatever_their_size_says() -> None:
    stream = layer(
        raw_header(b"l", flag=b"1", linkname=b"t", size=b"00000001000\0"), member("t", b"data")
    )
    assert [(entry.name, entry.type) for entry in entries(stream)] == [
        (b"l", HARD_LINK),
        (b"t", REGULAR),
    ]


@pytest.mark.parametrize(
    ("stream", "count"),
    [
        (b"", 0),
        (bytes(512), 0),
        (bytes(1024), 0),
        (bytes(1024) + b"garbage" * 100, 0),
        (member("a", b"x") + bytes(1024) + member("b"), 1),
        (member("a", b"x"), 1),
        (member("a", b"x")[:513], 1),  # the padding may be missing
        (member("a", b"x") + bytes(512), 1),
    ],
)
def test_ends_that_real_archives_have(stream: bytes, count: int) -> None:
    for step in (1, 100, 1 << 20):
        assert len(entries(stream, step=step)) == count


@pytest.mark.parametrize(
    ("stream", "what"),
    [
        (member("a", b"x" * 600)[:700], "truncated tar stream"),
        (member("a", b"x" * 600)[:100], "truncated tar stream"),
        (member("a", pax={"comment": "c"})[:1024], "truncated tar stream"),
        (b"\x1f\x8b" + bytes(600), "not a tar header"),
        (bytes(512) + member("a"), "second zero block"),
        (raw_header(b"x", flag=b"M"), "type flag"),
        (raw_header(b"x", flag=b"x", size=b"77777777777\0"), "at most 1 MiB"),
        (raw_header(b"x", size=base_256(-1, 12)), "size -1 is out of range"),
        (raw_header(b"x", size=base_256(1 << 62, 12)), "out of range"),
        (raw_header(b"x", size=b"0000000000z\0"), "octal"),
        (member("x", pax={"size": "many"}), "damaged PAX record"),
        (member("x", pax={"mtime": "1e9"}), "damaged PAX record"),
        (member("x", pax={"LIBARCHIVE.xattr.user.a": "*"}), "damaged PAX record"),
        (member("x", kind=SYMLINK), "target of 1 to 4095"),
    ],
)
def test_damage_is_named(stream: bytes, what: str) -> None:
    with pytest.raises(LayerError, match=what) as caught:
        entries(stream, name="sha256:ab12")
    assert caught.value.message.startswith("layer sha256:ab12: ")


def sparse_map(*pairs: tuple[int, int]) -> bytes:
    lines = [str(len(pairs)), *(str(number) for pair in pairs for number in pair)]
    text = "".join(f"{line}\n" for line in lines).encode()
    return text + bytes(-len(text) % 512)


def test_sparse_maps_in_the_payload_are_not_part_of_the_file() -> None:
    pairs = [(number * 4096, 512) for number in range(200)]
    pax = SPARSE_1_0 | {"GNU.sparse.realsize": str(4096 * 300)}
    stream = layer(member("x", sparse_map(*pairs) + b"d" * 512 * 200, pax=pax))
    for step in (100, 1 << 20):
        (entry,) = entries(stream, step=step)
        assert entry.name == b"real"
        assert entry.size == 4096 * 300
        assert entry.sparse == pairs
        assert stream[entry.data_offset : entry.data_offset + 1] == b"d"
        assert entry.stored is None


def test_unaligned_pieces_are_kept() -> None:
    data = bytes(range(256)) * 2
    stream = layer(member("x", sparse_map((10, 500), (5000, 12)) + data, pax=SPARSE_1_0))
    (entry,) = entries(stream, step=77)
    assert entry.stored == data
    assert entry.sparse == [(10, 500), (5000, 12)]


@pytest.mark.parametrize(
    "data",
    [
        sparse_map((0, 10), (5, 10)) + b"x" * 20,
        sparse_map((0, 10)) + b"x" * 20,
        sparse_map((9999, 10)) + b"x" * 10,
        b"99999999\n" + bytes(503),
        b"-1\n".ljust(512, b"\0"),
        b"1\nx\n1\n".ljust(512, b"\0") + b"x",
        b"no number at all".ljust(1024, b"\n"),
    ],
)
def test_bad_sparse_maps_are_refused(data: bytes) -> None:
    with pytest.raises(LayerError, match=r"sparse map.*|.*real"):
        entries(layer(member("x", data, pax=SPARSE_1_0)))


def test_bounds_of_a_layer_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_walk, "MAX_ENTRIES", 3)
    with pytest.raises(LayerError, match="more than 3 entries"):
        entries(layer(*(member(str(number)) for number in range(4))))
    monkeypatch.setattr(tar_walk, "MAX_PIECES", 3)
    with pytest.raises(LayerError, match="more than 3 pieces"):
        entries(layer(*[member("x", sparse_map((1, 1), (2, 1)) + b"xy", pax=SPARSE_1_0)] * 2))
    monkeypatch.setattr(tar_walk, "MAX_STORED_BYTES", 5)
    with pytest.raises(LayerError, match="expected at most 5 bytes"):
        entries(layer(member("x", sparse_map((10, 6)) + b"sparse", pax=SPARSE_1_0)))
    monkeypatch.setattr(tar_walk, "MAX_EXTENSIONS_BYTES", 20)
    with pytest.raises(LayerError, match="bytes of extension headers"):
        entries(layer(member("x", pax={"comment": "twenty bytes and more"})))

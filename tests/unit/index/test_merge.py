"""Layers merged to a tree: whiteouts, replacements, hard links, symbolic links in parents.

What real unpackers do with the same is compared in tests/system/test_fidelity.py.
"""

import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipshim.errors import LayerError
from clipshim.index import merge as merge_module
from clipshim.index.merge import merge
from clipshim.index.tar_walk import DIRECTORY, HARD_LINK, REGULAR, SYMLINK, TarEntry
from tests.support.tar_layers import content, directory, find, layer, link, member, paths, tree_of

LOWER = layer(
    directory("dir/", mode=0o700),
    member("dir/a", b"a"),
    member("dir/b", b"b"),
    directory("dir/sub/"),
    member("dir/sub/c", b"c"),
    member("file", b"file"),
)


def names_after(*upper: bytes) -> set[bytes]:
    return paths(tree_of(LOWER, layer(*upper)))


def entry(name: str, kind: bytes = REGULAR, target: str = "") -> TarEntry:
    return TarEntry(name.encode(), kind, 0o644, 0, 0, 0, 0, target.encode())


def test_a_whiteout_removes_a_lower_file_or_a_whole_directory() -> None:
    assert names_after(member("dir/.wh.a"), member(".wh.file")) == {
        b"dir", b"dir/b", b"dir/sub", b"dir/sub/c",
    }  # fmt: skip
    assert names_after(member(".wh.dir")) == {b"file"}


def test_a_whiteout_of_something_never_there_does_nothing() -> None:
    everything = paths(tree_of(LOWER))
    assert names_after(member(".wh.x"), member("no/such/.wh.y"), member("file/.wh.z")) == everything


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "dir/.wh."])
def test_whiteouts_of_no_name_are_refused(name: str) -> None:
    with pytest.raises(LayerError, match=r"layer 1: entry .*: a whiteout of no name"):
        merge([[], [entry(name)]])


def test_whiteouts_spare_what_their_own_layer_brings() -> None:
    early = names_after(member("dir/.wh.a"), member("dir/a", b"new"))
    late = names_after(member("dir/a", b"new"), member("dir/.wh.a"))
    assert early == late == paths(tree_of(LOWER))


def test_what_aufs_kept_for_itself_is_no_file_of_the_image() -> None:
    """As Docker and containerd: such files exist for the hard links of their own layer only."""
    old = layer(
        directory(".wh..wh.plnk/"),
        directory(".wh..wh.orph/"),
        member(".wh..wh.aufs"),
        member(".wh..wh.plnk/1.2", b"shared"),
        link("one", ".wh..wh.plnk/1.2"),
        link("two", ".wh..wh.plnk/1.2"),
    )
    tree = tree_of(old, layer(member("three", b"3")))
    assert paths(tree) == {b"one", b"two", b"three"}
    assert content(tree, [old], b"one") == b"shared"
    assert tree.stat(find(tree, b"one")).nlink == 2
    with pytest.raises(LayerError, match="which does not exist"):
        tree_of(old, layer(link("four", ".wh..wh.plnk/1.2")))


def test_an_opaque_marker_keeps_the_directory_and_its_own_layers_files() -> None:
    for upper in (
        [member("dir/.wh..wh..opq"), member("dir/new"), member("dir/sub/new")],
        [member("dir/new"), member("dir/.wh..wh..opq"), member("dir/sub/new")],
        [member("dir/sub/new"), member("dir/new"), member("dir/.wh..wh..opq")],
    ):
        assert names_after(*upper) == {b"dir", b"dir/new", b"dir/sub", b"dir/sub/new", b"file"}


def test_a_directory_replaced_by_a_file_loses_its_children_for_good() -> None:
    assert names_after(member("dir", b"x")) == {b"dir", b"file"}
    assert names_after(member("dir", b"x"), directory("dir/"), member("dir/n")) == {
        b"dir", b"dir/n", b"file",
    }  # fmt: skip


def test_a_directory_over_a_directory_keeps_children_and_takes_metadata() -> None:
    image = tree_of(LOWER, layer(directory("dir/", mode=0o2711, mtime=5)))
    facts = image.stat(find(image, b"dir"))
    assert facts.mode == 0o42711
    assert facts.mtime_ns == 5_000_000_000
    assert facts.nlink == 3
    assert paths(image) == paths(tree_of(LOWER))


def test_implied_parents_are_ordinary_directories() -> None:
    image = tree_of(layer(member("a/b/c", b"x")))
    for path in (b"a", b"a/b"):
        facts = image.stat(find(image, path))
        assert (facts.mode, facts.uid, facts.gid, facts.mtime_ns) == (0o40755, 0, 0, 0)


def test_the_last_of_repeated_entries_wins() -> None:
    layers = [layer(member("f", b"1", mode=0o600), member("f", b"22", mode=0o640))]
    image = tree_of(*layers)
    assert content(image, layers, b"f") == b"22"
    assert image.stat(find(image, b"f")).mode == 0o100640


def test_hard_links_are_one_inode_with_the_right_count() -> None:
    layers = [
        layer(link("early", "file"), member("file", b"data"), link("./late", "/file")),
        layer(link("upper", "late")),
    ]
    image = tree_of(*layers)
    assert len({find(image, name) for name in (b"early", b"file", b"late", b"upper")}) == 1
    assert image.stat(find(image, b"file")).nlink == 4
    assert content(image, layers, b"early") == b"data"


def test_hard_links_to_hard_links_in_any_order() -> None:
    image = tree_of(layer(link("c", "b"), link("b", "a"), link("a", "file"), member("file")))
    assert image.stat(find(image, b"c")).nlink == 4


def test_a_hard_link_to_a_file_that_its_layer_removes_keeps_the_lower_inode() -> None:
    for upper in (
        [member("dir/sub/.wh.c"), link("kept", "dir/sub/c")],
        [link("kept", "dir/sub/c"), member("dir/sub/.wh.c")],
        [member(".wh.dir"), link("kept", "dir/sub/c")],
        [member("dir/.wh..wh..opq"), link("kept", "dir/sub/c")],
    ):
        layers = [LOWER, layer(*upper)]
        image = tree_of(*layers)
        assert content(image, layers, b"kept") == b"c"
        assert image.stat(find(image, b"kept")).nlink == 1


def test_a_changed_name_leaves_other_hard_links_alone() -> None:
    layers = [layer(member("a", b"old"), link("b", "a")), layer(member("a", b"new"))]
    image = tree_of(*layers)
    assert content(image, layers, b"b") == b"old"
    assert image.stat(find(image, b"b")).nlink == 1


@pytest.mark.parametrize("target", ["nothing", "dir", "", "a"])
def test_impossible_hard_links_are_refused(target: str) -> None:
    with pytest.raises(LayerError, match="layer 0: entry b'l': hard link"):
        merge(
            [[entry("dir", DIRECTORY), entry("l", HARD_LINK, target), entry("a", HARD_LINK, "b")]]
        )


def test_parents_are_resolved_through_symbolic_links_inside_the_tree() -> None:
    lower = layer(
        directory("usr/bin/"),
        link("bin", "usr/bin", kind=SYMLINK),
        link("out", "../../../usr", kind=SYMLINK),
        link("usr/back", "/bin/../..", kind=SYMLINK),
    )
    upper = layer(member("bin/a"), member("out/bin/b"), member("usr/back/usr/bin/c"))
    image = tree_of(lower, upper)
    assert {path for path in paths(image) if path.startswith(b"usr/bin/")} == {
        b"usr/bin/a", b"usr/bin/b", b"usr/bin/c",
    }  # fmt: skip


def test_symbolic_links_to_themselves_are_refused_as_parents() -> None:
    with pytest.raises(LayerError, match="too many symbolic links"):
        merge([[entry("a", SYMLINK, "b"), entry("b", SYMLINK, "a"), entry("a/x")]])


def test_bounds_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_module, "MAX_STEPS", 100)
    chain = [entry("l", SYMLINK, "d/" * 60), entry("l/x"), entry("m", SYMLINK, "d/" * 60)]
    with pytest.raises(LayerError, match="through too many others"):
        merge([[*chain, entry("m/y")]])
    monkeypatch.setattr(merge_module, "MAX_INODES", 50)
    with pytest.raises(LayerError, match="more than 50 files"):
        merge([[entry("/".join("d" * 60))]])


def test_the_root_is_a_directory_whatever_happens() -> None:
    with pytest.raises(LayerError, match="root can only be a directory"):
        merge([[entry("", SYMLINK, "x")]])
    image = tree_of(layer(directory("./", mode=0o711)))
    assert image.stat(image.root_nid).mode == 0o40711
    assert image.stat(image.root_nid).nlink == 2


def test_no_layers_are_an_empty_directory() -> None:
    assert paths(tree_of()) == set()


part = st.sampled_from(["a", "b", "c"])
path = st.lists(part, min_size=1, max_size=3).map("/".join)
plain = st.tuples(path, st.sampled_from([REGULAR, DIRECTORY]))


@given(
    st.lists(plain, max_size=8), st.lists(plain, max_size=6), st.lists(path, max_size=3), st.data()
)
@settings(max_examples=150)
def test_where_whiteouts_stand_in_their_layer_does_not_matter(
    lower: list[tuple[str, bytes]],
    upper: list[tuple[str, bytes]],
    removed: list[str],
    data: st.DataObject,
) -> None:
    def marker(name: str) -> TarEntry:
        parent, _, last = name.rpartition("/")
        return entry(f"{parent}/.wh.{last}" if parent else f".wh.{last}")

    below = [entry(name, kind) for name, kind in lower]
    above = [entry(name, kind) for name, kind in upper]
    first = [*map(marker, removed), *above]
    mixed = list(above)
    for name in removed:
        mixed.insert(data.draw(st.integers(0, len(mixed))), marker(name))
    assert [name for name, _ in merge([below, first]).walk()] == [
        name for name, _ in merge([below, mixed]).walk()
    ]


kinds = st.sampled_from(
    [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]
)
odd = st.sampled_from(["a", "b", ".wh.a", ".wh..wh..opq", "..", ".", "", "c"])
odd_path = st.lists(odd, max_size=5).map("/".join)


@given(st.lists(st.lists(st.tuples(odd_path, kinds, odd_path), max_size=8), max_size=4))
@settings(max_examples=200)
def test_any_entries_give_a_sound_tree_or_a_layer_error(
    layers: list[list[tuple[str, bytes, str]]],
) -> None:
    streams = [
        layer(*(member(name, kind=kind, target=target) for name, kind, target in content_))
        for content_ in layers
    ]
    try:
        image = tree_of(*streams)
    except LayerError:
        return
    for found in paths(image):
        assert not {b"", b".", b".."} & set(found.split(b"/"))

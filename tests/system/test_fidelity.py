"""A tree equals what a real unpack of the image gives, for every peculiarity of real layers."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

from tests.support.tar_layers import (
    base_256,
    directory,
    layer,
    link,
    member,
    raw_header,
    tree_of_files,
)
from tests.system.fidelity import differences, differences_from_umoci

if TYPE_CHECKING:
    from pathlib import Path

SYMLINK = tarfile.SYMTYPE
CAP_NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")


def xattrs(**values: bytes) -> dict[str, str]:
    """PAX records of extended attributes; tarfile writes surrogates back as bytes."""
    return {
        f"SCHILY.xattr.{name.replace('__', '.')}": value.decode("utf-8", "surrogateescape")
        for name, value in values.items()
    }


def every_kind() -> bytes:
    """Types, modes, owners, times, names and headers of all sorts."""
    deep = "/".join(["d"] * 200)
    return layer(
        directory("./", mode=0o755, mtime=1_234_567_890.5),
        directory("./tmp/", mode=0o1777),
        member("./tmp/empty"),
        member("bin/su", b"\x7fELF" * 1000, mode=0o4755),
        member("bin/wall", b"#!", mode=0o2755, gid=5),
        member("/absolute", b"leading slash"),
        member("owner", b"x", uid=3_000_000_000, gid=4_000_000_000),
        member("nanoseconds", b"x", pax={"mtime": "1700000000.123456789"}),
        member("before-1970", b"x", pax={"mtime": "-86400.5"}),
        member("far-future", b"x", pax={"mtime": "9000000000.25"}),
        member("dev/null", kind=tarfile.CHRTYPE, mode=0o666, device=(1, 3)),
        member("dev/large", kind=tarfile.CHRTYPE, device=(240, 70_000)),
        member("dev/disk", kind=tarfile.BLKTYPE, mode=0o660, device=(8, 1), gid=6),
        member("run/fifo", kind=tarfile.FIFOTYPE, mode=0o600),
        member("file-of-512", b"5" * 512),
        member("file-of-513", b"5" * 513),
        link("hard", "owner"),
        link("./harder", "./hard"),
        link("link", "../../etc/x", kind=SYMLINK),
        link("hard-link-to-link", "link"),
        link("long-link", "t/" * 1900 + "end", kind=SYMLINK),
        link("link-of-400", "t" * 200 + "/" + "u" * 199, kind=SYMLINK),
        member("n" * 255, b"longest name"),
        member("\udcff\udcfe-not-utf8", b"binary"),
        member("line\nbreak and blank", b"x"),
        member("path/" + "p" * 120 + "/" + "q" * 90, b"x", form=tarfile.USTAR_FORMAT),
        member("gnu/" + "r" * 200, b"x", form=tarfile.GNU_FORMAT),
        link("gnu-link", "s" * 300, kind=SYMLINK),
        member(deep, b"deep"),
        member("without/parents/at/all", b"x"),
        member("twice", b"first", mode=0o600),
        member("twice", b"and second", mode=0o640),
        directory("was-a-directory/"),
        member("was-a-directory/child", b"x"),
        member("was-a-directory", b"now a file"),
        member("was-a-file", b"x"),
        directory("was-a-file/"),
        member("was-a-file/child", b"x"),
        raw_header(b"v7", magic=b"", flag=b"\0", size=b"00000000003\0") + b"v7!".ljust(512, b"\0"),
        raw_header(b"v7-directory/", magic=b"", flag=b"\0", mode=b"0000750\0"),
        raw_header(b"blanks", size=b"         2 \0", mode=b"   644 \0") + b"ok".ljust(512, b"\0"),
        raw_header(
            b"base-256",
            size=base_256(4, 12),
            uid=base_256(70_000, 8),
            gid=base_256(2_500_000, 8),
            mtime=base_256(-1000, 12),
            magic=b"ustar  \0",
        )
        + b"data".ljust(512, b"\0"),
        raw_header(b"signed-\xff\xfe", signed=True),
        raw_header(b"name", prefix=b"prefix/of/ustar", size=b"00000000001\0")
        + b"1".ljust(512, b"\0"),
    )


def with_xattrs() -> bytes:
    """Attributes of all name spaces that a container can see, binary values, ACLs."""
    acl = bytes.fromhex(
        "0200000001000600ffffffff02000700e803000004000400ffffffff10000700ffffffff20000400ffffffff"
    )
    return layer(
        member("ping", b"ELF", mode=0o755, pax=xattrs(security__capability=CAP_NET_RAW)),
        member(
            "user", b"x", pax=xattrs(user__one=b"1", user__two=b"binary \x00\xff=\n", user__a=b"a")
        ),
        member("trusted", b"x", pax=xattrs(trusted__thing=b"t")),
        member("acl", b"x", mode=0o674, pax=xattrs(system__posix_acl_access=acl)),
        member("large", b"x", pax=xattrs(user__large=b"L" * 3000)),
        member("dir", kind=tarfile.DIRTYPE, mode=0o755, pax=xattrs(user__of_directory=b"d")),
        member("dir/plain", b"x"),
        member("link", kind=SYMLINK, target="user", pax=xattrs(trusted__of_link=b"l")),
    )


def test_one_layer_with_every_kind_of_entry(tmp_path: Path) -> None:
    assert differences_from_umoci([every_kind()], tmp_path) == []


def test_extended_attributes(tmp_path: Path) -> None:
    assert differences_from_umoci([with_xattrs()], tmp_path) == []


LOWER = layer(
    directory("./"),
    directory("etc/", mode=0o700),
    *(member(f"etc/{name}", name.encode()) for name in ("a", "b", "c", "same")),
    directory("opaque/"),
    *(member(f"opaque/old{number}", b"o") for number in range(50)),
    directory("opaque/sub/"),
    member("opaque/sub/old", b"o"),
    directory("gone/"),
    member("gone/deep/er/file", b"g"),
    directory("usr/bin/"),
    member("usr/bin/tool", b"tool", mode=0o755),
    link("bin", "usr/bin", kind=SYMLINK),
    link("absolute", "/usr", kind=SYMLINK),
    link("up", "../../../usr", kind=SYMLINK),
    link("loop", "loop", kind=SYMLINK),
    link("dangling", "made/by/dangling", kind=SYMLINK),
    member("linked", b"inode"),
    link("linked2", "linked"),
    link("linked3", "linked"),
    directory("replaced/"),
    member("replaced/child", b"x"),
    member("becomes-directory", b"x"),
    link("becomes-file", "etc/a", kind=SYMLINK),
)

UPPER = {
    "whiteouts before and after siblings": layer(
        member("etc/.wh.a"),
        member("etc/new", b"n"),
        member("etc/.wh.b"),
        member(".wh.gone"),
        member("etc/.wh.never-there"),
        member("nowhere/.wh.x"),
    ),
    "a name in the same layer as its whiteout": layer(
        member("etc/.wh.a"),
        member("etc/a", b"again"),
        member("etc/b", b"again"),
        member("etc/.wh.b"),
    ),
    "an opaque marker between siblings": layer(
        member("opaque/early", b"e"),
        member("opaque/sub/early", b"e"),
        member("opaque/.wh..wh..opq"),
        member("opaque/late", b"l"),
        directory("opaque/sub/", mode=0o711),
    ),
    "an opaque marker first": layer(
        directory("opaque/", mode=0o750),
        member("opaque/.wh..wh..opq"),
        member("opaque/old1", b"new"),
    ),
    "an opaque marker at the root": layer(member("new", b"n"), member(".wh..wh..opq")),
    "a whiteout of a directory with new content": layer(
        member("gone/new", b"n"), member(".wh.gone"), member("gone/newer", b"n")
    ),
    "a removed name of a hard link": layer(member(".wh.linked")),
    "a changed name of a hard link": layer(member("linked", b"another")),
    "a hard link to a lower layer": layer(link("etc/here", "linked2"), member(".wh.linked")),
    "a hard link through a symbolic link": layer(link("here", "bin/tool")),
    "a file through symbolic links": layer(
        member("bin/a", b"a"),
        member("absolute/b", b"b"),
        member("up/c", b"c"),
        member("dangling/d", b"d"),
        member("up/../bin/.wh.tool"),
    ),
    "replacements": layer(
        member("replaced", b"file"),
        directory("becomes-directory/"),
        member("becomes-directory/x", b"x"),
        member("becomes-file", b"file"),
        directory("bin/"),
        member("bin/in-own-directory", b"x"),
    ),
    "directory to file and back": layer(
        member("replaced", b"file"), directory("replaced/"), member("replaced/only", b"x")
    ),
    "new metadata of a directory": layer(directory("etc/", mode=0o2775, mtime=5)),
    "nothing": layer(),
    "no bytes at all": b"",
}


@pytest.mark.parametrize("case", UPPER)
def test_two_layers_with(case: str, tmp_path: Path) -> None:
    assert differences_from_umoci([LOWER, UPPER[case]], tmp_path) == []


def test_a_hundred_layers(tmp_path: Path) -> None:
    layers = [
        layer(
            member(f"etc/layer{number}", b"%d" % number, mtime=number),
            member("etc/same", b"%d" % number),
            member(f"etc/.wh.layer{number - 2}"),
        )
        for number in range(99)
    ]
    assert differences_from_umoci([LOWER, *layers], tmp_path) == []


def made_tree(root: Path) -> Path:
    """A directory with what archivers have to get right."""
    root.mkdir()
    (root / "sub").mkdir(mode=0o750)
    (root / "sub" / "file").write_bytes(os.urandom(70_000))
    os.chmod(root / "sub" / "file", 0o6755)
    os.link(root / "sub" / "file", root / "second-name")
    (root / ("long" * 40)).write_bytes(b"long name")
    os.symlink("t" * 150, root / "long-link")
    os.symlink("sub/file", root / "link")
    os.mknod(root / "device", 0o600 | 0o020000, os.makedev(1, 3))
    os.mkfifo(root / "fifo", 0o640)
    (root / "owned").write_bytes(b"x")
    os.chown(root / "owned", 1_000_000, 2_000_000)
    (root / "empty").touch()
    return root


def sparse_files(root: Path) -> None:
    """Holes at the start, in the middle, at the end, everywhere, and pieces of odd sizes."""
    for name, pieces, size in (
        ("middle", [(0, 4096), (1 << 20, 5000)], (1 << 20) + 5000),
        ("ends", [(65536, 65536)], 1 << 20),
        ("odd", [(10_000, 7), (123_457, 100)], 300_001),
        ("hole", [], 1 << 20),
        ("many", [(number * 16384, 4096) for number in range(40)], 40 * 16384 - 5),
    ):
        with (root / f"sparse-{name}").open("wb") as file:
            for offset, length in pieces:
                file.seek(offset)
                file.write(os.urandom(length))
            file.truncate(size)


def whole_seconds(root: Path) -> None:
    """For formats without fractions of a second."""
    for path in [*sorted(root.rglob("*"), reverse=True), root]:
        os.utime(path, (1_500_000_000, 1_500_000_000), follow_symlinks=False)


GNU_TAR = ("tar", "--numeric-owner", "--xattrs", "-C")
BSD_TAR = ("bsdtar", "--numeric-owner", "-C")
ARCHIVERS = {
    "GNU tar, PAX": (*GNU_TAR, "{root}", "--format=posix", "-cf", "{archive}", "."),
    "GNU tar, GNU": (*GNU_TAR[:2], "-C", "{root}", "--format=gnu", "-cf", "{archive}", "."),
    "GNU tar, sparse 0.0": (
        *GNU_TAR, "{root}", "--format=posix", "-S", "--sparse-version=0.0", "-cf", "{archive}", ".",
    ),
    "GNU tar, sparse 0.1": (
        *GNU_TAR, "{root}", "--format=posix", "-S", "--sparse-version=0.1", "-cf", "{archive}", ".",
    ),
    "GNU tar, sparse 1.0": (
        *GNU_TAR, "{root}", "--format=posix", "-S", "--sparse-version=1.0", "-cf", "{archive}", ".",
    ),
    "GNU tar, GNU sparse": (
        *GNU_TAR[:2], "-C", "{root}", "--format=gnu", "-S", "-cf", "{archive}", ".",
    ),
    "bsdtar, PAX": (*BSD_TAR, "{root}", "--format=pax", "-cf", "{archive}", "."),
    "bsdtar, PAX, no sparse": (
        *BSD_TAR, "{root}", "--format=pax", "--no-read-sparse", "-cf", "{archive}", ".",
    ),
    "bsdtar, GNU": (*BSD_TAR, "{root}", "--format=gnutar", "-cf", "{archive}", "."),
}  # fmt: skip


@pytest.mark.parametrize("archiver", ARCHIVERS)
def test_archives_of_tools_equal_the_directory_they_were_made_of(
    archiver: str, tmp_path: Path
) -> None:
    root = made_tree(tmp_path / "root")
    sparse_files(root)
    if "PAX" in archiver or "sparse 0" in archiver or "sparse 1" in archiver:
        os.setxattr(root / "sub" / "file", "user.note", b"binary\0\xff")
        os.setxattr(root / "sub" / "file", "security.capability", CAP_NET_RAW)
    whole_seconds(root)
    if "PAX" in archiver:
        os.utime(root / "owned", ns=(0, 1_600_000_000_123_456_789))
    archive = tmp_path / "layer.tar"
    command = [part.format(root=root, archive=archive) for part in ARCHIVERS[archiver]]
    subprocess.run(command, check=True, capture_output=True)
    assert differences(root, [archive], tmp_path) == []


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_archives_of_python_equal_the_directory_they_were_made_of(
    form: int, tmp_path: Path
) -> None:
    root = made_tree(tmp_path / "root")
    whole_seconds(root)
    archive = tmp_path / "layer.tar"
    with tarfile.open(archive, "w", format=form) as file:
        file.add(root, ".")
    assert differences(root, [archive], tmp_path) == []


def test_fsck_accepts_the_images(tmp_path: Path) -> None:
    known = subprocess.run(["fsck.erofs", "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"\b(\d+)\.(\d+)", known.stdout + known.stderr)
    if found is None or (int(found[1]), int(found[2])) < (1, 8):
        return  # older ones know blocks of 4096 bytes only; the kernel is the judge everywhere
    archives = []
    for number, data in enumerate((every_kind(), with_xattrs(), LOWER)):
        archives.append(tmp_path / f"layer.{number}")
        archives[-1].write_bytes(data)
    image = tmp_path / "tree.erofs"
    image.write_bytes(tree_of_files(archives))
    devices = [f"--device={archive}" for archive in archives]
    subprocess.run(["fsck.erofs", *devices, image], check=True, capture_output=True)

"""Mode fuse with a real kernel: the tree is what tar would have unpacked, whoever serves it."""

from __future__ import annotations

import io
import os
import random
import shutil
import stat
import struct
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

from clipshim.index.erofs_write import write_erofs
from clipshim.index.merge import merge
from clipshim.index.tar_walk import TarWalker
from tests.system.lazy_mount import PATIENCE_S, FuseMount, wait_for_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

READER = 4242  # whom only the access control list lets read
# version 2; tag, permissions, id: owner rw, READER r, group none, mask r, others none (acl(5))
ACL = struct.pack(
    "<I" + "HHI" * 5,
    2,
    *(1, 6, 0xFFFFFFFF),
    *(2, 4, READER),
    *(4, 0, 0xFFFFFFFF),
    *(16, 4, 0xFFFFFFFF),
    *(32, 0, 0xFFFFFFFF),
)
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # cap_net_raw+ep


def make_tar(path: Path) -> None:
    """A layer with everything that an image can hold, and a directory of many files."""
    chance = random.Random(3)

    def add(name: str, content: bytes = b"", **fields: object) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        info.mode = 0o644
        info.mtime = 1_700_000_000.123456789  # pax keeps the fraction
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info, io.BytesIO(content))

    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add("usr", type=tarfile.DIRTYPE, mode=0o755)
        add("usr/bin", type=tarfile.DIRTYPE, mode=0o755)
        add("tmp", type=tarfile.DIRTYPE, mode=0o1777)
        add("bin", type=tarfile.SYMTYPE, linkname="usr/bin", mode=0o777)
        add("usr/bin/su", chance.randbytes(70_001), mode=0o4755)
        add("usr/bin/ping", chance.randbytes(513), mode=0o755)
        add("usr/bin/ping6", type=tarfile.LNKTYPE, linkname="usr/bin/ping")
        add("usr/bin/empty", b"", uid=1000, gid=70_000)
        add("big", chance.randbytes(5 << 20))
        add("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
        add("pipe", type=tarfile.FIFOTYPE)
        add("caf\u00e9 \u6f22", b"utf-8\n")
        add("n" * 255, b"long\n")
        add("many", type=tarfile.DIRTYPE, mode=0o700)
        for i in range(1500):
            add(f"many/{i:05}", f"{i}\n".encode())
        add(
            "usr/bin/ping2",
            b"x" * 10,
            pax_headers={
                "SCHILY.xattr.security.capability": CAPABILITY.decode("utf-8", "surrogateescape"),
                "SCHILY.xattr.user.note": "value",
            },
        )
        add(
            "listed",
            b"for one reader\n",
            mode=0o640,
            pax_headers={
                "SCHILY.xattr.system.posix_acl_access": ACL.decode("utf-8", "surrogateescape")
            },
        )


class ServedTree:
    """The mounted tree, what it should be, and its server."""

    def __init__(self, mount: FuseMount, base: Path) -> None:
        self.mount = mount
        self.root = mount.mountpoint
        self.expected = base / "unpacked"
        self.expected.mkdir()
        layer = base / "layer.tar"
        make_tar(layer)
        subprocess.run(
            ["tar", "-xpf", layer, "-C", self.expected, "--numeric-owner"],
            check=True,
            stderr=subprocess.DEVNULL,  # unknown header keywords: the attributes
        )
        walker = TarWalker("layer")
        walker.feed(layer.read_bytes())
        image = write_erofs(merge([walker.close()]), [layer.stat().st_size])
        (base / "tree.erofs").write_bytes(image)
        self.log = base / "log"
        self._arguments = [str(base / "tree.erofs"), str(self.log), str(layer)]
        self._starts = 0

    def start(self) -> None:
        self._starts += 1
        self.mount.start("tests.system.lazy_tree_server", self._arguments)
        wait_for_line(self.log, "ready", self._starts)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[ServedTree]:
    with FuseMount(tmp_path / "mnt", posix_acl=True) as mount:
        served = ServedTree(mount, tmp_path)
        served.start()
        yield served


def paths_below(root: Path) -> list[str]:
    found = []
    for directory, names, files in os.walk(root):
        found += [os.path.relpath(os.path.join(directory, name), root) for name in names + files]
    return sorted(found)


def test_the_tree_is_what_tar_unpacks(tree: ServedTree) -> None:
    paths = paths_below(tree.expected)
    assert paths_below(tree.root) == paths
    for path in paths:
        want, got = os.lstat(tree.expected / path), os.lstat(tree.root / path)
        assert (got.st_mode, got.st_uid, got.st_gid) == (want.st_mode, want.st_uid, want.st_gid)
        assert got.st_nlink == want.st_nlink, path
        assert got.st_rdev == want.st_rdev
        if stat.S_ISREG(want.st_mode):
            assert got.st_size == want.st_size
            assert got.st_mtime_ns == want.st_mtime_ns
            assert got.st_blocks == (want.st_size + 511) // 512
            assert (tree.root / path).read_bytes() == (tree.expected / path).read_bytes(), path
        if stat.S_ISLNK(want.st_mode):
            assert os.readlink(tree.root / path) == os.readlink(tree.expected / path)


def test_root_and_dots_have_their_inodes(tree: ServedTree) -> None:
    assert os.stat(tree.root).st_ino == 1
    assert os.stat(tree.root).st_nlink >= 2
    listing = subprocess.run(
        ["ls", "-ai", str(tree.root / "usr")], capture_output=True, check=True, text=True
    ).stdout.split()
    inodes = dict(zip(listing[1::2], listing[::2], strict=True))
    assert int(inodes["."]) == os.stat(tree.root / "usr").st_ino
    assert ".." in inodes
    assert int(inodes["bin"]) == os.stat(tree.root / "usr/bin").st_ino


def test_extended_attributes_and_capabilities_are_there(tree: ServedTree) -> None:
    path = tree.root / "usr/bin/ping2"
    assert os.getxattr(path, "security.capability") == CAPABILITY
    assert os.getxattr(path, "user.note") == b"value"
    assert set(os.listxattr(path)) == {"security.capability", "user.note"}
    assert os.listxattr(tree.root / "usr/bin/su") == []
    with pytest.raises(OSError, match="No data"):
        os.getxattr(path, "user.nothing")


def test_access_control_lists_are_obeyed(tree: ServedTree) -> None:
    path = tree.root / "listed"
    assert os.getxattr(path, "system.posix_acl_access") == ACL

    def read_as(user: int) -> str:
        return subprocess.run(
            ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "cat", path.name],
            cwd=tree.root,  # the directories above are not for other users
            capture_output=True,
            text=True,
            check=False,
        ).stdout

    assert read_as(READER) == "for one reader\n"
    assert read_as(READER + 1) == ""


def test_hard_links_share_an_inode(tree: ServedTree) -> None:
    one, other = os.stat(tree.root / "usr/bin/ping"), os.stat(tree.root / "usr/bin/ping6")
    assert one.st_ino == other.st_ino
    assert one.st_nlink == 2


def test_nothing_can_be_written(tree: ServedTree) -> None:
    with pytest.raises(OSError, match="Read-only"):
        (tree.root / "usr/bin/su").open("ab")
    with pytest.raises(OSError, match="Read-only"):
        (tree.root / "new").touch()
    assert not (tree.root / "new").exists()
    assert not (tree.root / "new").exists()  # from the kernel's memory


def test_random_ranges_of_a_file_are_right(tree: ServedTree) -> None:
    chance = random.Random(8)
    want = (tree.expected / "big").read_bytes()
    with (tree.root / "big").open("rb", buffering=0) as file:
        for _ in range(60):
            offset, size = chance.randrange(len(want) + 10), chance.choice([1, 4096, 300_000])
            assert os.pread(file.fileno(), size, offset) == want[offset : offset + size]


def test_readers_survive_the_death_of_the_tree_server(tree: ServedTree) -> None:
    destination = tree.expected.parent / "copy"
    # The first close of a file asks the server: not while it is dead and we are starting another.
    (tree.root / "usr/bin/su").open().close()
    copy = subprocess.Popen(["cp", "-a", str(tree.root), str(destination)])
    for _ in range(4):
        tree.mount.kill()
        tree.start()
    assert copy.wait(PATIENCE_S) == 0
    difference = subprocess.run(
        ["diff", "-r", "--no-dereference", "-x", "pipe", "-x", "null", tree.expected, destination],
        capture_output=True,
        text=True,
        check=False,
    )
    assert difference.stdout == ""
    shutil.rmtree(destination)

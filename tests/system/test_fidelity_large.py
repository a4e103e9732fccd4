"""Trees of great size, and what containers do with attributes."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from clipshim.index.erofs_read import HOLE, ErofsImage
from tests.support.skips import kernel_cannot
from tests.support.tar_layers import base_256, find, layer, member, raw_header, tree_of_files
from tests.system.fidelity import kernel_can, mounted

GIB = 1 << 30
CAP_DAC_READ_SEARCH = bytes.fromhex("0100000204000000000000000000000000000000")


@pytest.mark.slow
def test_a_file_of_more_than_4_gib(tmp_path: Path) -> None:
    size = 5 * GIB + 700
    archive = tmp_path / "layer.tar"
    ends = {0: b"first", 4 * GIB - 3: b"border", size - 4: b"last"}
    with archive.open("wb") as file:  # the archive itself is sparse on the disk
        file.write(raw_header(b"large", size=base_256(size, 12)))
        for offset, data in ends.items():
            file.seek(512 + offset)
            file.write(data)
        file.seek(512 + size + -size % 512)
        file.write(raw_header(b"behind"))
        file.truncate(file.tell() + 1024)
    tree = tree_of_files([archive])
    image = ErofsImage(tree)
    assert len(tree) < 10_000
    nid = find(image, b"large")
    assert image.stat(nid).size == size
    assert image.extents(nid, 0, size) == [(1, 512, size)]
    assert image.stat(find(image, b"behind")).size == 0
    if kernel_can(tmp_path):
        with mounted(tree, [archive], tmp_path) as target, (target / "large").open("rb") as file:
            assert os.fstat(file.fileno()).st_size == size
            for offset, data in ends.items():
                file.seek(offset)
                assert file.read(len(data)) == data


@pytest.mark.parametrize("form", ["posix", "gnu"])
def test_a_sparse_file_of_5_gib(form: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    pieces = {offset: os.urandom(70_000) for offset in (0, GIB + 8192, 5 * GIB - 70_000)}
    with (root / "sparse").open("wb") as file:
        for offset, data in pieces.items():
            file.seek(offset)
            file.write(data)
    archive = tmp_path / "layer.tar"
    subprocess.run(
        ["tar", "-C", root, "--numeric-owner", "-S", f"--format={form}", "-cf", archive, "."],
        check=True,
    )
    assert archive.stat().st_size < 1 << 20
    tree = tree_of_files([archive])
    image = ErofsImage(tree)
    extents = image.extents(find(image, b"sparse"), 0, 6 * GIB)
    assert sum(size for device, _, size in extents if device != HOLE) < 1 << 20
    assert sum(size for _, _, size in extents) == 5 * GIB
    if not kernel_can(tmp_path):
        kernel_cannot("mount EROFS images from files")
    with mounted(tree, [archive], tmp_path) as target, (target / "sparse").open("rb") as file:
        assert os.fstat(file.fileno()).st_size == 5 * GIB
        for offset, data in pieces.items():
            start = max(offset - 5000, 0)
            expected = bytes(offset - start) + data + bytes(5000)
            file.seek(start)
            assert file.read(len(expected)) == expected[: 5 * GIB - start]


@pytest.mark.slow
def test_two_hundred_thousand_files(tmp_path: Path) -> None:
    archive = tmp_path / "layer.tar"
    with archive.open("wb") as file:
        for number in range(200_000):
            name = f"./usr/share/{number % 37}/{number // 1000}/file-{number}"
            file.write(member(name, b"%d" % number, mtime=number, form=tarfile.GNU_FORMAT))
        file.write(bytes(1024))
    tree = tree_of_files([archive])
    image = ErofsImage(tree)
    directories = 3 + 37 + 37 * 200
    assert image.inode_count == 200_000 + directories
    assert sum(1 for _ in image.walk()) == image.inode_count
    if not kernel_can(tmp_path):
        kernel_cannot("mount EROFS images from files")
    with mounted(tree, [archive], tmp_path) as target:
        found = subprocess.run(
            ["find", target, "-type", "f", "-printf", "%f %s %T@\n"],
            check=True, capture_output=True, text=True,
        ).stdout.splitlines()  # fmt: skip
        assert len(found) == 200_000
        expected = {
            f"file-{number} {len(str(number))} {number}.0000000000" for number in range(200_000)
        }
        assert set(found) == expected
        for number in range(0, 200_000, 9973):
            path = target / f"usr/share/{number % 37}/{number // 1000}/file-{number}"
            assert path.read_bytes() == b"%d" % number


def test_a_file_capability_takes_effect(tmp_path: Path) -> None:
    if not kernel_can(tmp_path):
        kernel_cannot("mount EROFS images from files")
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    if status["NoNewPrivs"].strip() != "0" or not int(status["CapBnd"], 16) & 1 << 2:
        kernel_cannot("give file capabilities here: no_new_privs or a small bounding set")
    program = shutil.which("cat")
    assert program
    with open(program, "rb") as file:
        binary = file.read()
    capability = CAP_DAC_READ_SEARCH.decode("utf-8", "surrogateescape")
    archive = tmp_path / "layer.tar"
    archive.write_bytes(
        layer(
            member("plain", binary, mode=0o755),
            member(
                "able", binary, mode=0o755, pax={"SCHILY.xattr.security.capability": capability}
            ),
        )
    )
    secret = tmp_path / "secret"
    secret.write_text("only for root")
    secret.chmod(0o600)
    with mounted(tree_of_files([archive]), [archive], tmp_path) as target, secret.open("rb"):
        # the way there is root's alone: the programs and the file are reached through open fds
        directory = os.open(target, os.O_PATH)
        place = os.open(tmp_path, os.O_PATH)
        try:
            results = [
                subprocess.run(
                    # called cat: on Ubuntu 26.04 that name chooses one of all coreutils
                    ["cat", f"/proc/self/fd/{place}/secret"],
                    executable=f"/proc/self/fd/{directory}/{name}",
                    capture_output=True, text=True, check=False,
                    pass_fds=(directory, place), user=65534, group=65534, extra_groups=[],
                )
                for name in ("plain", "able")
            ]  # fmt: skip
        finally:
            os.close(directory)
            os.close(place)
    assert results[0].returncode != 0
    assert (results[1].stdout, results[1].stderr) == ("only for root", "")

"""The FUSE mount of layers with a real kernel: bytes, attributes, death of the server."""

from __future__ import annotations

import hashlib
import os
import random
import stat
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest

from clipshim.lazy.layers_fs import layer_inode
from tests.system.lazy_mount import PATIENCE_S, FuseMount, reader_process, wait_for_line, wait_until
from tests.unit.lazy.layers import SPAN, Form, MadeLayer

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 24 << 20
READ_ALL = (
    "import hashlib,sys\n"
    "d = hashlib.sha256()\n"
    "with open(sys.argv[1], 'rb', buffering=0) as f:\n"
    "    while b := f.read(65536): d.update(b)\n"
    "print(d.hexdigest())\n"
)


class Served:
    """A mount with one layer and the means to start and kill its server."""

    def __init__(self, mount: FuseMount, base: Path, size: int, form: Form) -> None:
        self.mount = mount
        self.log = base / "log"
        self.layer = MadeLayer(size, form=form)
        self.path = mount.mountpoint / self.layer.info.key
        self._arguments = [str(base / "store"), str(size), form, str(self.log)]
        self._starts = 0

    def start(self, *gate: str) -> subprocess.Popen[bytes]:
        self._starts += 1
        server = self.mount.start("tests.system.lazy_server", [*self._arguments, *gate])
        wait_for_line(self.log, "ready", self._starts)
        return server

    def fetches(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("fetch")]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with FuseMount(tmp_path / "mnt") as mount:
        it = Served(mount, tmp_path, SIZE, "gzip")
        it.start()
        yield it


def _moved(served: Served, before: int, reader: subprocess.Popen[bytes]) -> bool:
    return len(served.fetches()) > before or reader.poll() is not None


def drop_cache(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_the_mount_shows_its_layers(served: Served) -> None:
    root = os.stat(served.mount.mountpoint)
    assert stat.S_ISDIR(root.st_mode)
    assert root.st_nlink == 2
    assert os.listdir(served.mount.mountpoint) == [served.layer.info.key]
    status = os.stat(served.path)
    assert status.st_ino == layer_inode(served.layer.info.key)
    assert (status.st_size, status.st_nlink) == (SIZE, 1)
    assert stat.S_IMODE(status.st_mode) == 0o444
    assert status.st_blocks == SIZE // 512
    assert not (served.mount.mountpoint / "nothing").exists()
    with pytest.raises(OSError, match="Read-only"):
        os.open(served.path, os.O_RDWR)
    assert os.statvfs(served.mount.mountpoint).f_bfree == 0


def test_random_ranges_are_right_and_fetch_only_what_they_touch(served: Served) -> None:
    chance = random.Random(11)
    with open(served.path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for _ in range(40):
            offset = chance.randrange(SIZE // 2)
            size = chance.choice([1, 511, 4096, 70_000])
            assert os.pread(file.fileno(), size, offset) == served.layer.data[offset:][:size]
    assert 0 < len(served.fetches()) <= 40 * 3
    assert len(served.fetches()) == len(set(served.fetches()))


def test_concurrent_readers_of_everything_fetch_everything_once(served: Served) -> None:
    expected = hashlib.sha256(served.layer.data).hexdigest()
    results: list[str] = []

    def read() -> None:
        results.append(hashlib.sha256(served.path.read_bytes()).hexdigest())

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert results == [expected] * 6
    assert len(served.fetches()) == len(set(served.fetches()))
    assert len(served.fetches()) <= len(served.layer.table)


@pytest.mark.parametrize("form", ["gzip", "one-frame"])
def test_readers_survive_the_death_of_the_server(tmp_path: Path, form: Form) -> None:
    with FuseMount(tmp_path / "mnt") as mount:
        served = Served(mount, tmp_path, SIZE, form)
        served.start()
        program = [sys.executable, "-c", READ_ALL, str(served.path)]
        with reader_process(program) as reader:
            for _ in range(4):
                before = len(served.fetches())
                wait_until(partial(_moved, served, before, reader))
                mount.kill()
                served.start()
            assert reader.stdout is not None
            digest = reader.stdout.read().decode().strip()
            assert reader.wait(PATIENCE_S) == 0
        assert digest == hashlib.sha256(served.layer.data).hexdigest()
        drop_cache(served.path)
        assert served.path.read_bytes() == served.layer.data


def test_a_server_finishes_what_no_other_could_answer(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with FuseMount(tmp_path / "mnt") as mount:
        served = Served(mount, tmp_path, SIZE, "gzip")
        server = served.start(str(gate))
        with reader_process([sys.executable, "-c", READ_ALL, str(served.path)]) as reader:
            wait_until(lambda: bool(served.fetches()))
            server.terminate()
            wait_for_line(served.log, "finishing True")
            gate.touch()
            assert server.wait(PATIENCE_S) == 0  # and what it took is answered
            served.start(str(gate))
            stdout, _ = reader.communicate(timeout=PATIENCE_S)
    assert stdout.decode().strip() == hashlib.sha256(served.layer.data).hexdigest()


def test_an_open_file_stays_good_across_servers(served: Served) -> None:
    # Starting a process closes our descriptors in the child. The first close of a file asks the
    # server, and that server is what is to be started.
    served.path.open().close()
    with open(served.path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert os.pread(file.fileno(), 100, 0) == served.layer.data[:100]
        for i in range(1, 4):
            served.mount.kill()
            served.start()
            offset = i * 40 * SPAN
            assert os.pread(file.fileno(), 100, offset) == served.layer.data[offset:][:100]
    assert os.listdir(served.mount.mountpoint) == [served.layer.info.key]


def test_a_server_ends_by_itself_when_the_mount_is_taken_away(served: Served) -> None:
    served.mount.unmount()
    assert served.mount.servers[-1].wait(PATIENCE_S) == 0

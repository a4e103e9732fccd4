"""Helpers of the node's system tests: a small layered image, mounts by request, checking readers.

The image has pseudo-random files, so that every wrong byte shows; a reader runs in a process of its
own, so that a read that hangs cannot hang the test.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
from typing import TYPE_CHECKING, Any

from clipshim.node.client import call_for_fd
from clipshim.settings import load_settings
from tests.support.node import wait_for

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.support.node import Node

LAYERS = 3
FILES = 4
FILE_BYTES = 1_500_000
DEADLINE_S = 180.0

# Reads every file listed in sums.json below a directory again and again, cold each time; says
# "round" after each; ends when its standard input does, with 1 at the first error or wrong byte.
READER = """
import hashlib, json, os, select, sys
top, sums, layers = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
def cool(path):
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
while not select.select([0], [], [], 0)[0]:
    for name, expected in sums.items():
        path = os.path.join(top, name)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected:
            sys.exit(f"{path}: wrong bytes")
        cool(path)
    for name in os.listdir(layers):
        cool(os.path.join(layers, name))
    print("round", flush=True)
"""


def make_image(
    directory: Path, *, seed: int = 1, padded: bool = True
) -> tuple[str, dict[str, str]]:
    """An image of a few gzip layers; its `oci:` reference, and sha256 by path in it.

    Without `padded` the layers end with the last file's last byte, as umoci insert writes them.
    """
    layout = directory / f"image-{seed}"
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    chance = random.Random(seed)
    sums: dict[str, str] = {}
    layers, diff_ids = [], []
    data_ends = 0

    def store(data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    for number in range(LAYERS):
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name in ("usr", "proc", "data") if number == 0 else ("data",):
                entry = tarfile.TarInfo(name)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(entry)
            for i in range(FILES):
                data = chance.randbytes(FILE_BYTES // 2) + bytes(FILE_BYTES // 2)
                entry = tarfile.TarInfo(f"data/{number}-{i}")
                entry.size, entry.mode = len(data) - (0 if padded else 7), 0o644
                data = data[: entry.size]
                data_ends = raw.tell() + tarfile.BLOCKSIZE + entry.size
                tar.addfile(entry, io.BytesIO(data))
                sums[entry.name] = hashlib.sha256(data).hexdigest()
        stream = raw.getvalue()
        if not padded:
            stream = stream[:data_ends]
        diff_ids.append("sha256:" + hashlib.sha256(stream).hexdigest())
        layers.append(
            {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip"}
            | store(gzip.compress(stream, 6, mtime=0))
        )
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json"}
        | store(json.dumps(config).encode()),
        "layers": layers,
    }
    described = {"mediaType": manifest["mediaType"]} | store(json.dumps(manifest).encode())
    described["annotations"] = {"org.opencontainers.image.ref.name": "test"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return f"oci:{layout}:test", sums


def index(node: Node, reference: str) -> Path:
    """Its index, made once, as a file of the node's directory."""
    path = node.directory / "index.clip"
    if not path.exists():
        node.clipshim("index", reference, path)
    return path


def mount(
    node: Node, clip: Path, container: str, *, origin: str | None = None, **fields: Any
) -> dict[str, Any]:
    """Has the tree of an index file mounted for `container`; the daemon's answer."""
    source = {"fd": True, "origin": origin or str(clip)}
    fd = os.open(clip, os.O_RDONLY)
    try:
        return mount_source(node, source, container, fds=[fd], **fields)
    finally:
        os.close(fd)


def mount_source(
    node: Node, source: dict[str, Any], container: str, *, fds: Sequence[int] = (), **fields: Any
) -> dict[str, Any]:
    """Has a tree mounted; the daemon's answer, as it raises it."""
    answer, tree = call_for_fd(
        load_settings(str(node.config)),
        {"op": "mount", "container": container, "source": source, **fields},
        fds=fds,
        start=False,
    )
    assert tree is not None
    os.close(tree)
    return answer


def daemon_ids(node: Node) -> dict[str, Any]:
    """What keeper.json says."""
    document: dict[str, Any] = json.loads((node.run_dir / "keeper.json").read_text())
    return document


def lock_is_free(node: Node) -> bool:
    """Whether the next daemon may start; a thread of a killed process holds files a bit longer."""
    try:
        with open(node.run_dir / "daemon.lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def kill_everything(node: Node, spared: int = 0) -> None:
    """SIGKILL to all of the daemon's processes, until none has started another one meanwhile."""

    def none_left() -> bool:
        pids = [pid for pid in node.processes() if pid != spared]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids and lock_is_free(node)

    wait_for("every process is gone", none_left)


class Reader:
    """A process that reads a tree over and over. Leaving the block ends and judges it."""

    def __init__(self, node: Node, tree: str, sums: dict[str, str]) -> None:
        self._node = node
        self._output = node.directory / "reader.out"
        with open(self._output, "wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", READER, tree, json.dumps(sums), f"{node.run_dir}/layers"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=node.env,
            )

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            status = self._process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"a read hangs{self._node.log_tail()}") from None
        if kind is None:
            text = self._output.read_text()[-2000:]
            assert status == 0, f"reader: {text}{self._node.log_tail()}"

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def rounds(self) -> int:
        """How often everything was read and right."""
        assert self._process.poll() is None, self._output.read_text() + self._node.log_tail()
        return self._output.read_bytes().count(b"round\n")

    def wait_rounds(self, more: int) -> None:
        """Returns when everything was read so many times more."""
        wanted = self.rounds() + more
        wait_for(f"{wanted} rounds of reading", lambda: self.rounds() >= wanted, DEADLINE_S)

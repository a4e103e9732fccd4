"""Indexing against `gzip -dc LAYER | sha256sum`: wall and CPU time, index size, read amplification.

    bench_index.py [LAYER…] [--runs N] [--quick] [--spacings KIB,…]

LAYER is a layer's blob as a registry stores it (gzip). Without one, a layer is made of this
machine's /usr. Everything is measured in turns within one run, so figures are ratios of one
another; medians are shown. "one core" pins both contenders to one core, "all cores" none. The last
table says what finer checkpoints cost (index size) and bring (compressed bytes that a random read
of 128 KiB makes a node fetch).
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import random
import resource
import statistics
import subprocess
import tempfile
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from clipshim.index.builder import DEFAULT_SPACING, BuildOptions, BuildResult, build_index
from clipshim.index.model import open_index
from clipshim.registry.sources import LayerDescriptor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READ = 128 << 10
READS = 2000
SAMPLE_SIZE = 250 << 20


class LocalLayers:
    """An image made of blobs in files."""

    reference = "bench.local/layers:latest"
    manifest_digest = "sha256:" + "0" * 64
    platform = "linux/amd64"
    manifest_raw = b"{}"

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.layers = [
            LayerDescriptor(
                _digest(path), path.stat().st_size, "application/vnd.oci.image.layer.v1.tar+gzip"
            )
            for path in paths
        ]
        diff_ids = [_diff_id(path) for path in paths]
        self.config_raw = json.dumps({"os": "linux", "rootfs": {"diff_ids": diff_ids}}).encode()

    def open_layer(self, i: int) -> contextlib.AbstractContextManager[BinaryIO]:
        return open(self.paths[i], "rb")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _diff_id(path: Path) -> str:
    with gzip.open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


class Cost(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float


def timed(action: Callable[[], object]) -> Cost:
    """Runs `action`; counts the CPU time of this process and of its children."""

    def cpu() -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    cpu_before, before = cpu(), time.perf_counter()
    action()
    return Cost(time.perf_counter() - before, cpu() - cpu_before)


def median(costs: list[Cost]) -> Cost:
    """The medians of both times, each for itself."""
    return Cost(statistics.median(c.wall for c in costs), statistics.median(c.cpu for c in costs))


@contextlib.contextmanager
def pinned(*, one_core: bool) -> Iterator[None]:
    """Keeps this process and what it starts on one core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)} if one_core else allowed)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def decompress(paths: list[Path]) -> None:
    """What the budget compares with."""
    for path in paths:
        subprocess.run(
            ["sh", "-c", 'gzip -dc "$1" | sha256sum', "sh", path],
            check=True,
            stdout=subprocess.DEVNULL,
        )


def sample_layer(directory: Path) -> Path:
    """A gzip layer of this machine's /usr, cut off where it is large enough."""
    path = directory / "layer.tar.gz"
    names, total = [], 0
    for top, directories, files in os.walk("/usr"):
        directories.sort()
        for name in sorted(files):
            file = os.path.join(top, name)
            if os.path.isfile(file) and total < SAMPLE_SIZE:
                names.append(file)
                total += os.path.getsize(file)
    with open(path, "wb") as output:
        tar = subprocess.Popen(
            ["tar", "-c", "--no-recursion", "--null", "-T", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        packer = subprocess.Popen(["gzip", "-6"], stdin=tar.stdout, stdout=output)
        assert tar.stdin is not None
        tar.stdin.write(b"\0".join(name.encode() for name in names))
        tar.stdin.close()
        tar.wait()
        assert tar.stdout is not None
        tar.stdout.close()
        if packer.wait():
            raise SystemExit("gzip failed")
    return path


def amplification(path: str) -> float:
    """Compressed bytes fetched for a random read, over what these bytes are compressed."""
    rng = random.Random(1)
    fetched = needed = 0.0
    with open_index(path) as index:
        for i, layer in enumerate(index.layers):
            table = index.span_table(i)
            for _ in range(READS // len(index.layers)):
                start = rng.randrange(max(layer.size - READ, 1))
                last = table.find(min(start + READ, layer.size) - 1)
                spans = [table[n] for n in range(table.find(start), last + 1)]
                fetched += sum(span.compressed_size for span in spans)
                needed += READ * layer.blob_size / layer.size
    return fetched / needed


def compare(source: LocalLayers, output: Path, runs: int) -> None:
    """Prints times of both contenders, on all cores and on one."""
    print(f"{'':10} {'gzip|sha256sum':>18} {'index':>18} {'wall ratio':>11} {'CPU ratio':>10}")
    for one_core in (False, True):
        base, ours = [], []
        with pinned(one_core=one_core):
            for _ in range(runs):
                base.append(timed(lambda: decompress(source.paths)))
                ours.append(timed(lambda: build_index(source, output)))
        b, o = median(base), median(ours)
        print(
            f"{'one core' if one_core else 'all cores':10} {b.wall:8.2f}s {b.cpu:5.2f}CPU "
            f"{o.wall:8.2f}s {o.cpu:5.2f}CPU {o.wall / b.wall:11.2f} {o.cpu / b.cpu:10.2f}"
        )


def spacings(source: LocalLayers, output: Path, chosen: list[int]) -> None:
    """Prints what each spacing costs and brings."""
    blobs = sum(layer.size for layer in source.layers)
    heads = ("spacing", "spans", "index", "of blobs", "tree", "windows", "build", "amplification")
    print("\n" + " ".join(f"{head:>13}" for head in heads))
    for spacing in chosen:
        results: list[BuildResult] = []
        cost = timed(
            lambda spacing=spacing, results=results: results.append(  # type: ignore[misc]
                build_index(source, output, BuildOptions(spacing=spacing))
            )
        )
        with open_index(output) as index:
            tree = index.clip.entry("tree").stored_size
            windows = index.clip.entry("windows").stored_size
        size = results[0].size
        cells = [
            f"{spacing >> 10} KiB", f"{results[0].spans}", f"{size / 1000:.0f} kB",
            f"{100 * size / blobs:.2f} %", f"{tree / 1000:.0f} kB", f"{windows / 1000:.0f} kB",
            f"{cost.wall:.2f} s", f"{amplification(str(output)):.1f}",
        ]  # fmt: skip
        print(" ".join(f"{cell:>13}" for cell in cells))


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("layers", nargs="*", type=Path, metavar="LAYER")
    parser.add_argument("--runs", type=int, default=None, help="measurements (5)")
    parser.add_argument("--quick", action="store_true", help="only 2 of them, only the default")
    parser.add_argument("--spacings", default="128,256,512,1024,2048,4096", metavar="KIB,…")
    arguments = parser.parse_args()
    if arguments.runs is None:
        arguments.runs = 2 if arguments.quick else 5
    if arguments.quick:
        arguments.spacings = str(DEFAULT_SPACING >> 10)
    with tempfile.TemporaryDirectory() as directory:
        paths = arguments.layers or [sample_layer(Path(directory))]
        source, output = LocalLayers(paths), Path(directory) / "bench.clip"
        build_index(source, output)  # so that all files are in the page cache
        with open_index(output) as index:
            sizes = [(layer.blob_size, layer.size) for layer in index.layers]
        total, raw = (sum(column) / 1e6 for column in zip(*sizes, strict=True))
        print(
            f"{len(paths)} layers, {total:.1f} MB, {raw:.1f} MB uncompressed; "
            f"{os.cpu_count()} cores, zlib {zlib.ZLIB_RUNTIME_VERSION}, "
            f"spacing {DEFAULT_SPACING >> 10} KiB, medians of {arguments.runs}"
        )
        compare(source, output, arguments.runs)
        spacings(source, output, [int(kib) << 10 for kib in arguments.spacings.split(",")])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"\npeak memory of this process {peak:.0f} MiB")


if __name__ == "__main__":
    main()

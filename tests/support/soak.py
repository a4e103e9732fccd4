"""The soak: containers come and go and read everything, while processes and the registry die.

Called by tests/soak.sh; `soak(...)` by a short test. Each worker runs a container that reads all
files of its image in random order and compares their digests with those of an unpacked copy.
Meanwhile one thread kills servers and another makes the registry refuse connections for a moment.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from tests.support import images, leftovers
from tests.support.node import Node, wait_for
from tests.support.registry import running_registry
from tests.support.runtimes import Runtime, write_bundle

if TYPE_CHECKING:
    from collections.abc import Iterable

# In the container: reads the files named on stdin's stand-in, prints "digest size name".
READER = """
import hashlib, json, os, random, sys
rng, share = random.Random(int(sys.argv[1])), float(sys.argv[2])
names = []
for top in ("/usr", "/etc", "/app"):
    for directory, _, files in os.walk(top):
        names += [os.path.join(directory, name) for name in files]
names = sorted(n for n in names if os.path.isfile(n) and not os.path.islink(n))
rng.shuffle(names)
found = {}
for name in names[: max(1, int(len(names) * share))]:
    with open(name, "rb") as file:
        found[name] = hashlib.sha256(file.read()).hexdigest()
json.dump(found, sys.stdout)
"""
OWN_FILES = ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab")
VARIANTS = images.VARIANTS


class Plan(NamedTuple):
    """What a soak does."""

    seconds: float
    seed: int
    server_kills: int
    containers: int
    readers: int
    image_count: int
    share: float = 0.3  # of an image's files that a container reads
    faults: bool = True


class Counts:
    """What happened; `failures` are sentences."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.starts = self.files = self.kills = self.faults = 0
        self.failures: list[str] = []

    def fail(self, text: str) -> None:
        """Notes a failure."""
        with self.lock:
            self.failures.append(text)

    def line(self) -> str:
        """One line for people."""
        return (
            f"{self.starts} containers, {self.files} files verified, {self.kills} servers killed, "
            f"{self.faults} registry faults, {len(self.failures)} failures"
        )


class Gate:
    """A TCP relay to the registry that can refuse and cut connections."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.target = (host, int(port))
        self.open = True
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.connections: set[socket.socket] = set()
        self.lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return  # closed
            if not self.open:
                client.close()
                continue
            try:
                server = socket.create_connection(self.target, timeout=30)
            except OSError:
                client.close()
                continue
            with self.lock:
                self.connections |= {client, server}
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._relay, args=(source, target), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
        except OSError:
            pass  # cut
        with self.lock:
            self.connections -= {source, target}
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        source.close()

    def cut(self) -> None:
        """Cuts every connection."""
        with self.lock:
            victims = list(self.connections)
        for end in victims:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        """Stops listening and cuts all."""
        # shutdown wakes the accepting thread, close alone does not
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.cut()


def _expected(rootfs: Path) -> dict[str, str]:
    import hashlib

    digests = {}
    for top in ("usr", "etc", "app"):
        for directory, _, files in os.walk(rootfs / top):
            for name in files:
                path = Path(directory, name)
                if path.is_file() and not path.is_symlink():
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                    digests[f"/{path.relative_to(rootfs)}"] = digest
    return digests


def _reader(
    runtime: Runtime, bundle: Path, name: str, expected: dict[str, str], counts: Counts
) -> None:
    done = runtime("run", "--bundle", bundle, name, check=False, timeout_s=600)
    if done.returncode != 0:
        counts.fail(f"{name}: exit {done.returncode}: {done.stderr[-500:]}")
        return
    found: dict[str, str] = json.loads(done.stdout)
    wrong = [
        path
        for path, digest in found.items()
        if path not in OWN_FILES and expected.get(path) != digest
    ]
    with counts.lock:
        counts.starts += 1
        counts.files += len(found)
    if wrong:
        counts.fail(f"{name}: wrong bytes in {wrong[:5]}")


def _killer(node: Node, plan: Plan, stop: threading.Event, counts: Counts) -> None:
    rng = random.Random(plan.seed + 1)
    pause = plan.seconds / (plan.server_kills + 1)
    while counts.kills < plan.server_kills and not stop.wait(pause * rng.uniform(0.5, 1.0)):
        try:
            node.kill_server()
        except (AssertionError, OSError) as exc:
            counts.fail(f"after a kill: {exc}")
            return
        counts.kills += 1


def _faults(gate: Gate, plan: Plan, stop: threading.Event, counts: Counts) -> None:
    rng = random.Random(plan.seed + 2)
    while not stop.wait(rng.uniform(1, 5)):
        if rng.random() < 0.5:
            gate.cut()
        else:
            gate.open = False
            gate.cut()
            stop.wait(rng.uniform(0.1, 2))
            gate.open = True
        counts.faults += 1
    gate.open = True


def soak(root: Path, plan: Plan, *, tell: bool = False) -> Counts:
    """Runs one soak below `root`."""
    counts, stop = Counts(), threading.Event()
    rng = random.Random(plan.seed)
    chosen = [images.debian_image(VARIANTS[i % len(VARIANTS)]) for i in range(plan.image_count)]
    expected = _expected(images.unpack(chosen[0], root / "unpacked"))
    with running_registry(root / "registry") as registry:
        gate = Gate(registry.host)
        try:
            with Node(root / "node", index_dirs=[str(root / "indexes")], linger_s=1.0) as node:
                (root / "indexes").mkdir()
                clips = []
                for number, image in enumerate(chosen):
                    registry.push_layout(image.layout, f"soak{number}:1", tag=images.TAG)
                    clip = root / "indexes" / f"{number}.clip"
                    node.clipshim("index", f"{gate.host}/soak{number}:1", clip)
                    clips.append(clip)
                node.start()
                _work(root, plan, node, gate, clips, expected, counts, stop, rng, tell)
                if node.container_mounts():
                    counts.fail(f"mounts left: {node.container_mounts()}")
        finally:
            gate.close()
    return counts


def _work(
    root: Path,
    plan: Plan,
    node: Node,
    gate: Gate,
    clips: list[Path],
    expected: dict[str, str],
    counts: Counts,
    stop: threading.Event,
    rng: random.Random,
    tell: bool,
) -> None:
    helpers = [threading.Thread(target=_killer, args=(node, plan, stop, counts))]
    if plan.faults:
        helpers.append(threading.Thread(target=_faults, args=(gate, plan, stop, counts)))
    end = time.monotonic() + plan.seconds
    with Runtime.clipshim(root / "rt", node) as runtime:
        for helper in helpers:
            helper.start()

        def worker(number: int, seeds: Iterable[int]) -> None:
            for turn, seed in enumerate(seeds):
                if time.monotonic() > end or counts.failures:
                    return
                clip = clips[seed % len(clips)]
                bundle = write_bundle(
                    root / f"b{number}",
                    ["python3", "-c", READER, str(seed), str(plan.share)],
                    annotations={"io.clipshim.index": str(clip)},
                )
                _reader(runtime, bundle, f"s{number}-{turn}", expected, counts)

        try:
            workers = min(plan.containers, plan.readers)
            seeds = [[rng.randrange(1 << 30) for _ in range(100_000)] for _ in range(workers)]
            with ThreadPoolExecutor(workers) as pool:
                running = [pool.submit(worker, i, seeds[i]) for i in range(workers)]
                while tell and not all(future.done() for future in running):
                    print(counts.line(), flush=True)
                    time.sleep(5)
                for future in running:
                    future.result()
        finally:
            stop.set()
            for helper in helpers:
                helper.join()
        wait_for("all containers are gone", lambda: not runtime.containers())


def main() -> int:
    """Parses the command line, soaks, reports."""
    parser = argparse.ArgumentParser(prog="tests/soak.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    parser.add_argument("--server-kills", type=int, default=1000)
    parser.add_argument("--containers", type=int, default=20, help="at a time, at most")
    parser.add_argument("--readers", type=int, default=20, help="at a time, at most")
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--no-faults", action="store_true", help="leave the registry alone")
    given = parser.parse_args()
    plan = Plan(
        given.minutes * 60,
        given.seed,
        given.server_kills,
        given.containers,
        given.readers,
        given.images,
        faults=not given.no_faults,
    )
    print(f"soak: seed {plan.seed}", flush=True)
    run = secrets.token_hex(4)
    root = leftovers.PARENT / f"{leftovers.PREFIX}{run}"
    root.mkdir(mode=0o711)
    (root / "owner").write_text(f"{os.getpid()} {leftovers.start_time(os.getpid())}\n")
    (root / "tmp").mkdir(mode=0o1777)
    os.environ.update(CLIPSHIM_TEST_RUN=run, CLIPSHIM_TEST_ROOT=str(root), TMPDIR=str(root / "tmp"))
    try:
        counts = soak(root, plan, tell=True)
        left = leftovers.wait_until_gone(root, 30).lines()
        counts.failures += [f"left behind: {line}" for line in left]
    finally:
        leftovers.remove(root)
    for failure in counts.failures[:20]:
        print(failure, file=sys.stderr)
    print(f"soak: seed {plan.seed}: {counts.line()}")
    return 1 if counts.failures else 0


if __name__ == "__main__":
    sys.exit(main())

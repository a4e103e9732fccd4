"""The long test, called by tests/soak.sh: see there for what it does and its options.

One private node, the real docker-registry behind the fault proxy, the Debian image. A wrong byte,
a failed read, a failed start or something left behind is a failure; the exit status is 1 then, and
the summary names each. Not run by pytest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import secrets
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

CHECKOUT = Path(__file__).resolve().parents[2]
if str(CHECKOUT) not in sys.path:
    sys.path.append(str(CHECKOUT))  # at the end: `clipshim` is the installed one

from tests.support import images, leftovers  # noqa: E402  after the path
from tests.support.fault_proxy import Fault, FaultProxy  # noqa: E402
from tests.support.node import Node, wait_for  # noqa: E402
from tests.support.registry import running_registry  # noqa: E402
from tests.support.runtimes import Runtime, write_bundle  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

# Prints path and digest of randomly chosen files of the container, as hex and JSON.
READ_SOME = """
import hashlib, json, os, random, stat, sys
chance, found = random.Random(int(sys.argv[1])), []
for top, names, files in os.walk(b"/"):
    if top == b"/":
        names[:] = [n for n in names if n not in (b"proc", b"sys", b"dev", b"run", b"tmp")]
    found += [os.path.join(top, name) for name in files]
found = [path for path in sorted(found) if stat.S_ISREG(os.lstat(path).st_mode)]
for path in chance.sample(found, min(len(found), int(sys.argv[2]))):
    print(json.dumps([path.hex(), hashlib.sha256(open(path, "rb").read()).hexdigest()]))
"""
SHOWN_FAILURES = 40
PYTHON = ("/usr/bin/python3", "-B")  # -B: what it writes would be compared with the image
FAULTS = (
    Fault("status", status=500),
    Fault("status", status=429, headers={"Retry-After": "1"}),
    Fault("status", status=503),
    Fault("reset", after=4000),
    Fault("close", after=100),
    Fault("stall", after=1000),
    Fault("drip", after=20_000),
    Fault("short", after=10),
    Fault("long", after=10),
    Fault("wrong-bytes"),
    Fault("wrong-range"),
    Fault("stall-headers"),
)


class Deck(NamedTuple):
    """What every part of the soak works with."""

    node: Node
    runtime: Runtime
    proxy: FaultProxy
    reference: str
    expected: dict[str, str]  # hex of the path: sha256 of the contents
    bundles: Path


class Tally:
    """Counts and failures, of all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: dict[str, int] = {}
        self.failures: list[str] = []

    def add(self, what: str, count: int = 1) -> None:
        """Counts something that happened."""
        with self._lock:
            self.counts[what] = self.counts.get(what, 0) + count

    def fail(self, text: str) -> None:
        """Notes a failure, and says so at once."""
        with self._lock:
            self.failures.append(text)
            number = len(self.failures)
        if number <= SHOWN_FAILURES:
            print(f"FAILURE: {text}", flush=True)


def expected_digests(root: Path) -> dict[str, str]:
    """Digests of all regular files of an unpacked image, by the hex of their path."""
    found = {}
    base = os.fsencode(root)
    for top, _, files in os.walk(base):
        for name in files:
            path = os.path.join(top, name)
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                found[path[len(base) :].hex()] = digest
    return found


def compare(deck: Deck, tally: Tally, output: str, what: str) -> None:
    """Compares lines that READ_SOME has printed with what the image holds."""
    lines = [json.loads(line) for line in output.splitlines()]
    if not lines:
        tally.fail(f"{what}: nothing was read")
    for path, digest in lines:
        if path in deck.expected and deck.expected[path] != digest:
            tally.fail(f"{what}: wrong bytes in {bytes.fromhex(path)!r}")
    tally.add("files compared", len(lines))


def run_one(deck: Deck, tally: Tally, seed: int, files: int) -> None:
    """A container that reads some files, from create to delete."""
    name = f"s{seed}"
    bundle = deck.bundles / name
    write_bundle(
        bundle,
        [*PYTHON, "-c", READ_SOME, str(seed), str(files)],
        annotations={"io.clipshim.index": "index.clip"},
    )
    os.link(deck.bundles / "index.clip", bundle / "index.clip")
    try:
        result = deck.runtime("run", "--bundle", bundle, name, check=False, timeout_s=900)
    except subprocess.TimeoutExpired:
        tally.fail(f"container {name} did not end in 900 s")
        return
    if "deleted directory" in result.stderr:
        tally.fail(f"container {name}: {result.stderr}")
    if result.returncode:
        tally.fail(f"container {name}: exit {result.returncode}: {result.stderr[-600:]}")
    else:
        compare(deck, tally, result.stdout, f"container {name}")
    tally.add("containers")
    gone = deck.runtime("delete", "--force", name, check=False)
    if gone.returncode:
        tally.fail(f"delete {name}: {gone.stderr}")
    for path in (bundle / "index.clip", bundle / "config.json"):
        path.unlink(missing_ok=True)


def kill(deck: Deck, tally: Tally, which: str) -> None:
    """SIGKILL to the server or the keeper; returns when the daemon answers with a new one."""
    key = {"server": "pid", "keeper": "keeper_pid"}[which]
    before = wait_for("the daemon answers", deck.node.ping)
    os.kill(int(before[key]), 9)
    wait_for(
        f"another {which}",
        lambda: (reply := deck.node.ping()) is not None and reply[key] != before[key],
        300,
    )
    tally.add(f"{which} kills")


def replace(deck: Deck, tally: Tally) -> None:
    """An orderly change of the server."""
    result = deck.node.clipshim("daemon", "--replace", check=False)
    if result.returncode:
        tally.fail(f"daemon --replace: {result.stderr}")
    tally.add("replacements")


def collect(deck: Deck, tally: Tally) -> None:
    """Garbage collection, which may take nothing from those that run."""
    deck.node.clipshim("gc", check=False)
    tally.add("collections")


def misbehave(deck: Deck, tally: Tally, chance: random.Random) -> None:
    """A burst of one kind of fault."""
    deck.proxy.inject(chance.choice(FAULTS), times=chance.randint(1, 4))
    tally.add("registry faults")


def outage(deck: Deck, tally: Tally, chance: random.Random) -> None:
    """The registry refuses connections for a few seconds."""
    with deck.proxy.refusing():
        time.sleep(chance.uniform(0.5, 5))
    tally.add("outages")


def everything(deck: Deck, tally: Tally, minutes: float, seed: int) -> None:
    """Random starts in three threads while everything is killed and broken."""
    end = time.monotonic() + minutes * 60
    chance = random.Random(seed)
    numbers = iter(range(seed * 1_000_000, (seed + 1) * 1_000_000))
    lock = threading.Lock()

    def starts(which: int) -> None:
        mine = random.Random(f"{seed} {which}")
        while time.monotonic() < end:
            with lock:
                number = next(numbers)
            try:
                run_one(deck, tally, number, mine.choice((5, 50, 500, 100_000)))
            except Exception as exc:  # the soak goes on and ends with the list
                tally.fail(f"start {number}: {exc!r}")

    actions: list[tuple[int, Callable[[], None]]] = [
        (8, lambda: kill(deck, tally, "server")),
        (2, lambda: kill(deck, tally, "keeper")),
        (2, lambda: replace(deck, tally)),
        (8, lambda: misbehave(deck, tally, chance)),
        (2, lambda: outage(deck, tally, chance)),
        (1, lambda: collect(deck, tally)),
    ]
    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(starts, number) for number in range(3)]
        while time.monotonic() < end:
            weights = [weight for weight, _ in actions]
            action = chance.choices([act for _, act in actions], weights)[0]
            try:
                action()
            except Exception as exc:
                tally.fail(f"action: {exc!r}")
            time.sleep(chance.uniform(0.1, 3))
        deck.proxy.clear()
        for worker in workers:
            worker.result()


def read_file(deck: Deck, tally: Tally, root: Path, path: str) -> None:
    """Reads one file of a tree on the host and compares it."""
    try:
        with open(os.fsencode(root) + bytes.fromhex(path), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        tally.fail(f"{bytes.fromhex(path)!r}: {exc}")
        return
    if digest != deck.expected[path]:
        tally.fail(f"wrong bytes in {bytes.fromhex(path)!r}")
    tally.add("files compared")


def server_kills(deck: Deck, tally: Tally, count: int, seed: int) -> None:
    """So many SIGKILLs to the server while four threads read without a pause."""
    tree = deck.bundles / "tree"
    tree.mkdir()
    deck.node.clipshim("mount", deck.bundles / "index.clip", tree)
    done = threading.Event()

    def read(which: int) -> None:
        chance = random.Random(f"{seed} {which}")
        paths = sorted(deck.expected)
        while not done.is_set():
            read_file(deck, tally, tree, chance.choice(paths))

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read, number) for number in range(4)]
        try:
            for number in range(count):
                before = tally.counts.get("files compared", 0)
                # a server that served nobody has not been killed in the middle of anything
                wait_for(
                    "readers get on",
                    lambda before=before: tally.counts.get("files compared", 0) > before + 3,  # type: ignore[misc]
                    900,
                )
                kill(deck, tally, "server")
                if number % 50 == 49:
                    print(f"{number + 1} kills, {len(tally.failures)} failures", flush=True)
        finally:
            done.set()
        for reader in readers:
            reader.result()
    deck.node.clipshim("umount", tree)


def many_readers(deck: Deck, tally: Tally, count: int, seed: int) -> None:
    """So many readers at once, of data that is not cached."""
    tree = deck.bundles / "tree"
    tree.mkdir()
    deck.node.clipshim("mount", deck.bundles / "index.clip", tree)
    chance = random.Random(seed)
    paths = sorted(deck.expected)
    barrier = threading.Barrier(count)

    def read(path: str) -> None:
        barrier.wait()
        read_file(deck, tally, tree, path)

    began = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(read, chance.choice(paths)) for _ in range(count)]:
            done.result()
    print(f"{count} readers: {time.monotonic() - began:.1f} s, server {server_rss(deck)} MiB")
    deck.node.clipshim("umount", tree)


def many_containers(deck: Deck, tally: Tally, count: int) -> None:
    """So many containers of one image at once; each is asked for a file, then all are deleted."""
    names = [f"m{number}" for number in range(count)]

    def start(name: str) -> None:
        bundle = deck.bundles / name
        write_bundle(
            bundle, ["/bin/sleep", "1000000"], annotations={"io.clipshim.index": "index.clip"}
        )
        os.link(deck.bundles / "index.clip", bundle / "index.clip")
        log = open(bundle / "log", "wb")  # noqa: SIM115  a pipe would be kept open by the container
        with log:
            code = subprocess.run(
                deck.runtime.command("run", "--detach", "--bundle", bundle, name),
                env=deck.runtime.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
            ).returncode
        if code:
            tally.fail(f"container {name}: {(bundle / 'log').read_text()}")
        tally.add("containers")

    def ask(name: str) -> None:
        command = [*PYTHON, "-c", READ_SOME, name[1:], "3"]
        result = deck.runtime("exec", name, *command, check=False)
        if result.returncode:
            tally.fail(f"exec in {name}: {result.stderr[-300:]}")
        else:
            compare(deck, tally, result.stdout, name)

    def end(name: str) -> None:
        result = deck.runtime("delete", "--force", name, check=False)
        if result.returncode:
            tally.fail(f"delete {name}: {result.stderr[-300:]}")

    for what, step in (("started", start), ("asked", ask), ("deleted", end)):
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(step, names))
        seconds = time.monotonic() - began
        print(f"{count} containers {what}: {seconds:.1f} s, server {server_rss(deck)} MiB")


def many_images(deck: Deck, tally: Tally, count: int) -> None:
    """So many images mounted at once, none sharing a layer's spans with another."""
    trees = []
    for number in range(count):
        clip = deck.bundles / f"image{number}.clip"
        spacing = str((512 << 10) + 4096 * number)  # other spans: other keys in the layer store
        deck.node.clipshim("index", "-q", "--spacing", spacing, deck.reference, clip)
        tree = deck.bundles / f"tree{number}"
        tree.mkdir()
        deck.node.clipshim("mount", clip, tree)
        trees.append(tree)
        tally.add("images")
    chance = random.Random(count)
    paths = sorted(deck.expected)
    for tree in trees:
        for path in chance.sample(paths, 5):
            read_file(deck, tally, tree, path)
    print(f"{count} images mounted: server {server_rss(deck)} MiB")
    for tree in trees:
        deck.node.clipshim("umount", tree)


def server_rss(deck: Deck) -> int:
    """Resident memory of the server, in MiB."""
    reply = wait_for("the daemon answers", deck.node.ping)
    with open(f"/proc/{reply['pid']}/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmRSS"].split()[0]) >> 10


def check_clean(deck: Deck, tally: Tally) -> None:
    """After everything: no container's mount or directory is left."""
    deck.node.clipshim("gc", check=False)
    if left := deck.node.container_mounts():
        tally.fail(f"mounts left: {left}")
    for name in ("upper", "work"):
        directory = deck.node.state_dir / name
        if directory.exists() and (entries := os.listdir(directory)):
            tally.fail(f"{name}: left {entries[:5]}")


def prepare(stack: ExitStack, root: Path, cache_mib: int, mode: str) -> Deck:
    """Registry, proxy, node, index and expected contents."""
    image = images.debian_image("gzip")
    registry = stack.enter_context(running_registry(root / "registry"))
    registry.push_layout(image.layout, "debian:soak", tag=images.TAG)
    proxy = stack.enter_context(FaultProxy(registry.host))
    reference = f"{proxy.host}/debian:soak"
    node = stack.enter_context(
        Node(
            root / "node",
            mode=mode,
            cache_bytes=cache_mib << 20,
            connect_timeout_s=2.0,
            read_timeout_s=2.0,
            fetch_deadline_s=300.0,
            daemon_timeout_s=300.0,
            linger_s=5.0,
            prefetch="profile",
        )
    )
    bundles = root / "bundles"
    bundles.mkdir()
    node.clipshim("index", "-q", reference, bundles / "index.clip")
    runtime = stack.enter_context(Runtime.clipshim(root / "runc", node))
    expected = expected_digests(images.unpack(image, root / "unpacked"))
    node.start()
    return Deck(node, runtime, proxy, reference, expected, bundles)


def main() -> int:
    """Parses the options, runs the parts that were asked for, prints the summary."""
    parser = argparse.ArgumentParser(prog="tests/soak.sh")
    parser.add_argument("--minutes", type=float, help="of everything at once (default 60)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mode", choices=("auto", "erofs", "fuse"), default="auto")
    parser.add_argument(
        "--cache-mib", type=int, default=80, help="small, so that spans are evicted"
    )
    for name in ("server-kills", "containers", "images", "readers"):
        parser.add_argument(f"--{name}", type=int, default=0)
    options = parser.parse_args()
    parts = (options.server_kills, options.containers, options.images, options.readers)
    minutes = options.minutes if options.minutes is not None else 0 if any(parts) else 60

    run = secrets.token_hex(4)
    root = leftovers.PARENT / f"{leftovers.PREFIX}{run}"
    root.mkdir(mode=0o711)
    (root / "owner").write_text(f"{os.getpid()} {leftovers.start_time(os.getpid())}\n")
    os.environ.update(CLIPSHIM_TEST_RUN=run, CLIPSHIM_TEST_ROOT=str(root))
    tally = Tally()
    began = time.monotonic()
    try:
        with ExitStack() as stack:
            deck = prepare(stack, root, options.cache_mib, options.mode)
            print(
                f"seed {options.seed}, {len(deck.expected)} files, mode {options.mode}", flush=True
            )
            try:
                if options.images:
                    many_images(deck, tally, options.images)
                if options.readers:
                    many_readers(deck, tally, options.readers, options.seed)
                if options.containers:
                    many_containers(deck, tally, options.containers)
                if options.server_kills:
                    server_kills(deck, tally, options.server_kills, options.seed)
                if minutes:
                    everything(deck, tally, minutes, options.seed)
                check_clean(deck, tally)
            finally:
                if tally.failures:
                    print(deck.node.log_tail(60))
    finally:
        left = leftovers.wait_until_gone(root, deadline_s=60).lines()
        leftovers.remove(root)
    for line in left:
        tally.fail(f"left behind: {line}")
    for what, count in sorted(tally.counts.items()):
        print(f"{what}: {count}")
    print(f"{len(tally.failures)} failures in {(time.monotonic() - began) / 60:.1f} minutes")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""What clipshim costs an engine: verbs handed over, create of a warm image; and what it saves.

    bench_start.py [--runs N]

Against bare runc on an unpacked copy of the same image. The last table is the whole way of a
cold image: pull, unpack and run against a lazy run on an empty store, until a program that
imports json, asyncio and http.client has ended.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from typing import TYPE_CHECKING

from common import COLUMNS, against, bench_root, in_turns, print_table, seconds

from tests.support import images
from tests.support.node import Node
from tests.support.registry import running_registry
from tests.support.runtimes import Runtime, write_bundle

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = ["python3", "-c", "import json, asyncio, http.client"]
SLEEP = ["sleep", "100000"]
MODES = ("erofs", "fuse")
_NUMBERS = itertools.count()


def verbs(runc: Runtime, shim: Runtime, bundle: Path, runs: int) -> None:
    """Verbs that clipshim hands to runc, for a container of runc's."""
    runc.quietly("run", "--detach", "--bundle", bundle, "plain")
    shim_on_runc = Runtime(shim.program, runc.root, shim.env)
    for title, words in {
        "--version": ["--version"],
        "state": ["state", "plain"],
        "exec true": ["exec", "plain", "/bin/true"],
    }.items():
        medians = in_turns(
            {
                "runc": lambda words=words: seconds(lambda: runc(*words)),
                "clipshim": lambda words=words: seconds(lambda: shim_on_runc(*words)),
            },
            runs,
        )
        print_table(f"verb handed over: {title}", COLUMNS, against(medians, "runc"))
    runc("delete", "--force", "plain")


def created(runtime: Runtime, bundle: Path) -> float:
    """Seconds of one create; the container is deleted."""
    name = f"c{next(_NUMBERS)}"
    taken = seconds(lambda: runtime.quietly("create", "--bundle", bundle, name))
    runtime("delete", "--force", name)
    return taken


def deleted(runtime: Runtime, bundle: Path) -> float:
    """Seconds of one delete of a container that was created."""
    name = f"c{next(_NUMBERS)}"
    runtime.quietly("create", "--bundle", bundle, name)
    return seconds(lambda: runtime("delete", "--force", name))


def pulled_and_run(runc: Runtime, reference: str, work: Path) -> float:
    """The way without clipshim: skopeo, umoci, runc."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()

    def way() -> None:
        images.run(
            "skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false",
            f"docker://{reference}", f"oci:{work}/oci:{images.TAG}",
        )  # fmt: skip
        rootfs = images.unpack(images.Image(work / "oci", "gzip"), work / "rootfs")
        runc("run", "--bundle", write_bundle(work / "bundle", PROGRAM, rootfs=rootfs), "pulled")

    return seconds(way)


def lazily_run(root: Path, mode: str, clip: Path, fetched: list[int]) -> float:
    """The lazy way: a new node, an empty store, the daemon not running."""
    directory = root / f"cold{next(_NUMBERS)}"
    with Node(directory, mode=mode, index_dirs=[str(clip.parent)]) as node:
        bundle = write_bundle(
            directory / "bundle", PROGRAM, annotations={"io.clipshim.index": str(clip)}
        )
        with Runtime.clipshim(directory / "root", node) as runtime:
            taken = seconds(lambda: runtime("run", "--bundle", bundle, "lazy"))
            status = json.loads(node.clipshim("status", "--format", "json").stdout)
            fetched.append(find_number(status, "fetched_bytes"))
    return taken


def find_number(document: object, key: str) -> int:
    """The first number of this name anywhere in a JSON document."""
    if isinstance(document, dict):
        if isinstance(document.get(key), int):
            return int(document[key])
        document = list(document.values())
    if isinstance(document, list):
        return max((find_number(item, key) for item in document), default=0)
    return 0


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    debian = images.debian_image()
    with bench_root() as root, running_registry(root / "registry") as registry:
        reference = registry.push_layout(debian.layout, "debian:bench", tag=images.TAG)
        clip = root / "indexes" / "debian.clip"
        clip.parent.mkdir()
        with Node(root / "indexer") as indexer:
            indexer.clipshim("index", reference, clip)
        print(
            f"image {debian.compressed_size / 1e6:.1f} MB compressed, "
            f"index {clip.stat().st_size / 1e3:.0f} kB, medians of {runs}"
        )
        rootfs = images.unpack(debian, root / "unpacked")
        plain = write_bundle(root / "plain", SLEEP, rootfs=rootfs)
        lazy = write_bundle(root / "lazy", SLEEP, annotations={"io.clipshim.index": str(clip)})
        nodes = [Node(root / mode, mode=mode, index_dirs=[str(clip.parent)]) for mode in MODES]
        try:
            runc = Runtime.runc(root / "runc-root")
            shims = {
                node.settings["mode"]: Runtime.clipshim(node.directory / "root", node)
                for node in nodes
            }
            verbs(runc, shims["erofs"], plain, runs)
            for title, measure in (("create", created), ("delete", deleted)):
                contenders = {"runc": lambda measure=measure: measure(runc, plain)}
                for mode, shim in shims.items():
                    contenders[f"clipshim {mode}, warm"] = lambda measure=measure, shim=shim: (
                        measure(shim, lazy)
                    )
                medians = in_turns(contenders, runs, warm_up=2)
                print_table(title, COLUMNS, against(medians, "runc"))
        finally:
            for node in nodes:
                node.close()
        fetched: dict[str, list[int]] = {mode: [] for mode in MODES}
        few = max(3, runs // 5)
        medians = in_turns(
            {
                "pull, unpack, run": lambda: pulled_and_run(runc, reference, root / "pull"),
                **{
                    f"lazy {mode}": lambda mode=mode: lazily_run(root, mode, clip, fetched[mode])
                    for mode in MODES
                },
            },
            few,
            warm_up=0,
        )
        print_table("cold image, until python has run", COLUMNS,
                    against(medians, "pull, unpack, run"))  # fmt: skip
        for mode in MODES:
            share = sorted(fetched[mode])[len(fetched[mode]) // 2] / debian.compressed_size
            print(f"  {mode}: {share:.1%} of the image's compressed bytes fetched")


if __name__ == "__main__":
    main()

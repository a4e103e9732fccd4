"""`docker run --rm` of a stub under clipshim against the full image under runc.

    bench_docker.py [--runs N] [--quick]

Cold: nothing of the image on the node, `docker pull` from a registry on loopback and `docker run`
until a Python program has ended; the daemon is not running either. Run alone, cold: the image, or
stub, is pulled, its bytes are not here. Warm: `docker run` again. Both engines are private ones.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from common import PROGRAM, Options, bench_root, drop_caches, in_turns, print_against, seconds

from tests.support import images
from tests.support.docker_engine import Docker
from tests.support.engine import make_target
from tests.support.node import Node
from tests.support.registry import running_registry

if TYPE_CHECKING:
    from collections.abc import Callable

Contender = tuple[Docker, str]


def run(docker: Docker, image: str) -> None:
    """One container."""
    docker("run", "--rm", image, *PROGRAM)


def pull_and_run(docker: Docker, image: str) -> None:
    """What a user does on a fresh machine."""
    docker("pull", "-q", image)
    run(docker, image)


class Coldness:
    """Takes away what earlier runs left."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def forget_bytes(self) -> None:
        """The node ends and its store goes, with what it learned; the page cache is dropped."""
        self.node.stop()
        for directory in (self.node.run_dir, self.node.state_dir):
            shutil.rmtree(directory, ignore_errors=True)
        drop_caches()

    def pulling(self, docker: Docker, image: str) -> float:
        """Seconds of pull and run."""
        docker.run("rmi", "-f", image, check=False)
        self.forget_bytes()
        return seconds(lambda: pull_and_run(docker, image))

    def running(self, docker: Docker, image: str) -> float:
        """Seconds of run; the image is there, its bytes are not in any cache."""
        docker("pull", "-q", image)
        self.forget_bytes()
        return seconds(lambda: run(docker, image))


def main() -> None:
    """Measures and prints."""
    options = Options(__doc__, runs=15, quick=5)
    debian = images.debian_image()
    with (
        bench_root() as root,
        running_registry(root / "registry") as registry,
        Node(root / "node") as node,
    ):
        full = registry.push_layout(debian.layout, "debian:full", tag=images.TAG)
        stub = registry.reference("debian:lazy")
        node.clipshim("stub", full, stub, "--quiet")
        coldness = Coldness(node)
        engines: dict[str, Contender] = {}
        try:
            for name, target, image in (
                ("runc, full image", make_target("runc", root / "t", None), full),
                ("clipshim, stub", make_target("clipshim", root / "t", node), stub),
            ):
                engines[name] = Docker(root / f"docker-{target.name}", target), image
            ways: list[tuple[str, int, Callable[[Docker, str], float]]] = [
                ("docker pull and run, cold", options.few, coldness.pulling),
                ("docker run alone, cold", options.few, coldness.running),
                (
                    "docker run --rm, warm",
                    options.runs,
                    lambda docker, image: seconds(lambda: run(docker, image)),
                ),
            ]
            for title, count, measure in ways:
                medians = in_turns(
                    {
                        name: lambda engine=engine, measure=measure: measure(*engine)
                        for name, engine in engines.items()
                    },
                    count,
                )
                print_against(title, medians)
        finally:
            for docker, _ in engines.values():
                docker.close()


if __name__ == "__main__":
    main()

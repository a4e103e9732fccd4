"""`docker run --rm` of a stub under clipshim against the full image under runc.

    bench_docker.py [--runs N]

Cold: nothing of the image on the node, `docker pull` from a registry on loopback and `docker run`
until a Python program has ended. Warm: `docker run` alone.
"""

from __future__ import annotations

import argparse

from common import COLUMNS, against, bench_root, in_turns, print_table, seconds

from tests.support import images
from tests.support.docker_engine import Docker
from tests.support.engine import make_target
from tests.support.node import Node
from tests.support.registry import running_registry

PROGRAM = ("python3", "-c", "import json, asyncio, http.client")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    debian = images.debian_image()
    with (
        bench_root() as root,
        running_registry(root / "registry") as registry,
        Node(root / "node") as node,
    ):
        full = registry.push_layout(debian.layout, "debian:full", tag=images.TAG)
        stub = registry.reference("debian:lazy")
        node.clipshim("stub", full, stub, "--quiet")
        engines: dict[str, tuple[Docker, str]] = {}
        try:
            engines["runc, full image"] = (
                Docker(root / "d-runc", make_target("runc", root / "t", None)), full
            )  # fmt: skip
            engines["clipshim, stub"] = (
                Docker(root / "d-clip", make_target("clipshim", root / "t", node)), stub
            )  # fmt: skip

            def run(docker: Docker, image: str) -> None:
                docker("run", "--rm", image, *PROGRAM)

            def cold(docker: Docker, image: str) -> float:
                docker.run("rmi", "-f", image, check=False)
                node.stop()
                for directory in (node.run_dir, node.state_dir):
                    images.run("rm", "-rf", directory)

                def way() -> None:
                    docker("pull", "-q", image)
                    run(docker, image)

                return seconds(way)

            for title, count, measure in (
                ("docker pull and run, cold", max(3, runs // 3), cold),
                ("docker run --rm, warm", runs, lambda *them: seconds(lambda: run(*them))),
            ):
                medians = in_turns(
                    {
                        name: lambda engine=engine, measure=measure: measure(*engine)
                        for name, engine in engines.items()
                    },
                    count,
                )
                print_table(title, COLUMNS, against(medians, "runc, full image"))
        finally:
            for docker, _ in engines.values():
                docker.close()


if __name__ == "__main__":
    main()

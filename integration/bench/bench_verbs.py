"""What clipshim adds to a verb that it hands to runc: `--version`, `state` and `exec`.

    bench_verbs.py [--runs N] [--quick]

On a container that runc itself made; both programs are called in turns.
"""

from __future__ import annotations

from common import Options, bench_root, in_turns, print_against, seconds

from tests.support import images
from tests.support.node import Node
from tests.support.runtimes import Runtime, write_bundle

BUDGET_MS = 5


def main() -> None:
    """Measures and prints."""
    options = Options(__doc__, runs=60, quick=15)
    with bench_root() as root, Node(root / "node") as node:
        rootfs = images.unpack(images.tiny_image(), root / "unpacked")
        bundle = write_bundle(root / "bundle", ["/bin/sleep", "100000"], rootfs=rootfs)
        with Runtime.runc(root / "runc-root") as runc:
            runc.quietly("run", "--detach", "--bundle", bundle, "plain")
            shim = Runtime.clipshim(runc.root, node)
            for title, words in {
                "--version": ["--version"],
                "state": ["state", "plain"],
                "exec true": ["exec", "plain", "/bin/true"],
            }.items():
                medians = in_turns(
                    {
                        "runc": lambda words=words: seconds(lambda: runc(*words)),
                        "clipshim": lambda words=words: seconds(lambda: shim(*words)),
                    },
                    options.runs,
                    warm_up=3,
                )
                print_against(f"verb handed over: {title}", medians, extra_ms=BUDGET_MS)


if __name__ == "__main__":
    main()

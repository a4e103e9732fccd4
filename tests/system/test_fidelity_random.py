"""Random layers: wherever umoci can unpack them, the tree is what umoci made of them.

The seeds are fixed, so the layers are the same in every run.
"""

from __future__ import annotations

import os
import random
import tarfile
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from clipshim.errors import ClipError
from clipshim.index.unpack_check import (
    compare,
    describe_directory,
    describe_image,
    unpack_with_umoci,
)
from tests.support.tar_layers import layer, link, member, tree_of

if TYPE_CHECKING:
    from pathlib import Path

ROUNDS = 30
TARGETS = ["a", "b", "/a/b", "../b", "c/a", "../../c", "/"]


def random_member(choose: random.Random, *, lowest: bool) -> bytes:
    """One entry over a few names, so that entries meet each other."""
    parts = [choose.choice("abc") for _ in range(choose.randint(1, 3))]
    name = "/".join(parts)
    mtime = choose.randrange(1, 10**6)
    mode = choose.choice([0o600, 0o755, 0o4711, 0o1777])
    kind = choose.random()
    if kind < 0.3:
        return member(name, b"%d" % mtime, mode=mode, mtime=mtime)
    if kind < 0.55:
        return member(name, kind=tarfile.DIRTYPE, mode=mode, mtime=mtime)
    if kind < 0.65:
        return link(name, choose.choice(TARGETS), kind=tarfile.SYMTYPE)
    if kind < 0.75:
        return link(name, choose.choice("abc"))
    if lowest:
        return member(name, kind=tarfile.FIFOTYPE, mode=mode, mtime=mtime)
    parts[-1] = f".wh.{parts[-1]}" if kind < 0.9 else ".wh..wh..opq"
    return member("/".join(parts))


@pytest.mark.parametrize("seed", range(8))
def test_random_layers_equal_what_umoci_unpacks(seed: int, tmp_path: Path) -> None:
    choose = random.Random(seed)
    compared = 0
    for number in range(ROUNDS):
        work = tmp_path / str(number)
        work.mkdir()
        layers = [
            layer(*(random_member(choose, lowest=not i) for _ in range(choose.randint(1, 7))))
            for i in range(choose.randint(1, 3))
        ]
        files = [os.fspath(work / f"layer.{i}") for i in range(len(layers))]
        for path, data in zip(files, layers, strict=True):
            with open(path, "wb") as file:
                file.write(data)
        since_ns = os.stat(work).st_ctime_ns
        try:
            unpacked = unpack_with_umoci(files, os.fspath(work / "umoci"))
        except ClipError:
            continue  # a link to nothing, a file as a parent
        with ExitStack() as stack:
            assert (
                compare(
                    describe_directory(unpacked, stack),
                    describe_image(tree_of(*layers), files, stack),
                    unpacked_since_ns=since_ns,
                )
                == []
            )
        compared += 1
    assert compared

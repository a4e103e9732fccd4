"""The judges of fidelity: umoci's unpacking and the kernel's view of a tree."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from clipshim.index.erofs_read import ErofsImage
from clipshim.index.unpack_check import (
    compare,
    compare_trees,
    describe_directory,
    describe_image,
    unpack_with_umoci,
)
from clipshim.mounts.erofs import mount_erofs, probe_erofs
from clipshim.mounts.syscalls import MNT_DETACH, umount2
from tests.support.tar_layers import tree_of_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


def kernel_can(work: Path) -> bool:
    """Whether this kernel mounts EROFS images from files; older ones have the reader only."""
    return probe_erofs(str(work)) is None


@contextmanager
def mounted(tree: bytes, layer_files: Sequence[Path], work: Path) -> Iterator[Path]:
    """The kernel's mount of a tree over raw layer files."""
    meta, target = work / "tree.erofs", work / "tree"
    meta.write_bytes(tree)
    target.mkdir()
    mount_erofs(str(meta), [str(path) for path in layer_files], str(target))
    try:
        yield target
    finally:
        umount2(str(target), MNT_DETACH)


def differences(
    expected: str | Path,
    layer_files: Sequence[Path],
    work: Path,
    *,
    unpacked_since_ns: int | None = None,
) -> list[str]:
    """How the tree of these layers differs from an unpacked one, in the reader and the kernel."""
    tree = tree_of_files(layer_files)
    names = [str(path) for path in layer_files]
    with ExitStack() as stack:
        found = compare(
            describe_directory(expected, stack),
            describe_image(ErofsImage(tree), names, stack),
            unpacked_since_ns=unpacked_since_ns,
        )
    found = [f"reader: {line}" for line in found]
    if kernel_can(work):
        with mounted(tree, layer_files, work) as target:
            lines = compare_trees(expected, target, unpacked_since_ns=unpacked_since_ns)
            found += [f"kernel: {line}" for line in lines]
    return found


def differences_from_umoci(layers: Sequence[bytes], work: Path) -> list[str]:
    """The same for layers in memory, unpacked by umoci."""
    files = []
    for number, data in enumerate(layers):
        path = work / f"layer.{number}"
        path.write_bytes(data)
        files.append(path)
    since_ns = os.stat(work).st_ctime_ns
    unpacked = unpack_with_umoci([os.fspath(path) for path in files], os.fspath(work / "umoci"))
    return differences(unpacked, files, work, unpacked_since_ns=since_ns)

"""Layers as the tools that build images write them."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

from tests.system.fidelity import differences_from_umoci

if TYPE_CHECKING:
    from pathlib import Path


def fill(root: Path) -> None:
    """What a writer of layers has to get right."""
    (root / "dir").mkdir(mode=0o750)
    (root / "dir" / ("n" * 200)).write_bytes(b"one")
    (root / "dir" / "gone").write_bytes(b"two" * 1000)
    (root / "dir" / "gone").chmod(0o4755)
    os.link(root / "dir" / "gone", root / "linked")
    (root / "capable").write_bytes(b"x")
    os.chown(root / "linked", 3_000_000, 4)
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    os.setxattr(root / "capable", "security.capability", capability)
    os.symlink("t" * 300, root / "link")
    os.utime(root / "link", ns=(0, 1_600_000_000_123_456_789), follow_symlinks=False)


def layers_of(layout: Path, image: str) -> list[bytes]:
    """The uncompressed layers of an image in an OCI layout."""
    raw = subprocess.run(
        ["skopeo", "inspect", "--raw", f"oci:{image}"], check=True, capture_output=True
    ).stdout
    layers = []
    for descriptor in json.loads(raw)["layers"]:
        data = (layout / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes()
        layers.append(gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data)
    return layers


def test_layers_that_buildah_writes(tmp_path: Path) -> None:
    root, layout = tmp_path / "root", tmp_path / "layout"
    root.mkdir()
    fill(root)

    def buildah(*arguments: str) -> str:
        store = ["--root", f"{tmp_path}/store", "--runroot", f"{tmp_path}/run"]
        command = ["buildah", *store, "--storage-driver", "vfs", *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return str(done.stdout).strip()

    container = buildah("from", "scratch")
    buildah("copy", "-q", container, str(root), "/")
    buildah("commit", "-q", container, f"oci:{layout}:image")
    buildah("rm", "-a")
    layers = layers_of(layout, f"{layout}:image")
    assert len(layers) == 1
    (tmp_path / "work").mkdir()
    assert differences_from_umoci(layers, tmp_path / "work") == []


def test_layers_that_umoci_writes(tmp_path: Path) -> None:
    layout, bundle = tmp_path / "layout", tmp_path / "bundle"
    image = f"{layout}:a"
    subprocess.run(["umoci", "init", "--layout", layout], check=True)
    subprocess.run(["umoci", "new", "--image", image], check=True)
    subprocess.run(["umoci", "unpack", "--image", image, bundle], check=True)
    root = bundle / "rootfs"
    fill(root)
    subprocess.run(["umoci", "repack", "--image", image, bundle], check=True)
    shutil.rmtree(bundle)
    subprocess.run(["umoci", "unpack", "--image", image, bundle], check=True)
    (root / "dir" / "gone").unlink()
    (root / "new").write_bytes(b"three")
    subprocess.run(["umoci", "repack", "--image", image, bundle], check=True)
    layers = layers_of(layout, image)
    assert len(layers) == 2
    (tmp_path / "work").mkdir()
    assert differences_from_umoci(layers, tmp_path / "work") == []

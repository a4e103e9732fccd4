"""`check_against_unpack`: an index proved against a real unpack of its image."""

from __future__ import annotations

import gzip
import hashlib
import json
from typing import TYPE_CHECKING

import pytest
import zstandard

from clipshim.errors import ClipError, DigestError, LayerError
from clipshim.index.builder import BuildOptions, build_index
from clipshim.index.unpack_check import check_against_unpack
from clipshim.registry.access import RegistryAccess
from clipshim.registry.sources import open_source
from tests.support.tar_layers import directory, layer, link, member

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from clipshim.registry.sources import ImageSource

OCI = "application/vnd.oci.image"
LAYERS = [
    layer(directory("./"), directory("etc/", mode=0o750), member("etc/a", b"a" * 100_000)),
    layer(member("etc/.wh.a"), member("etc/b", b"b", mode=0o4755, uid=70_000), link("c", "etc/b")),
    layer(member("usr/d", b"d" * 5000), member(".wh.c")),
]


def compressed(number: int, data: bytes) -> tuple[str, bytes]:
    """Gzip of two members, zstd of two frames, plain tar."""
    half = len(data) // 2
    if number == 0:
        return "+gzip", gzip.compress(data[:half], 9) + gzip.compress(data[half:], 1)
    if number == 1:
        return "+zstd", zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    return "", data


def image(layout: Path, layers: Sequence[bytes], diff_ids: Sequence[str] = ()) -> ImageSource:
    """An OCI layout with these layers."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": OCI + kind, "digest": f"sha256:{digest}", "size": len(data)}

    descriptors = []
    for number, data in enumerate(layers):
        suffix, blob = compressed(number, data)
        descriptors.append(put(blob, f".layer.v1.tar{suffix}"))
    config = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {
            "type": "layers",
            "diff_ids": list(diff_ids)
            or [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in layers],
        },
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": put(json.dumps(config).encode(), ".config.v1+json"),
        "layers": descriptors,
    }
    reference = put(json.dumps(manifest).encode(), ".manifest.v1+json")
    reference["platform"] = {"architecture": "amd64", "os": "linux"}
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [reference]}))
    return open_source(f"oci:{layout}", platform="linux/amd64", access=RegistryAccess())


def test_an_index_of_gzip_zstd_and_plain_layers_passes(tmp_path: Path) -> None:
    source = image(tmp_path / "image", LAYERS)
    build_index(source, tmp_path / "a.clip", BuildOptions(), None)
    assert check_against_unpack(tmp_path / "a.clip", source, work_dir=tmp_path) == []


def test_an_index_of_another_image_does_not(tmp_path: Path) -> None:
    build_index(image(tmp_path / "one", LAYERS), tmp_path / "a.clip", BuildOptions(), None)
    other = image(tmp_path / "two", [*LAYERS[:2], layer()])
    found = check_against_unpack(tmp_path / "a.clip", other, work_dir=tmp_path)
    assert found == ["the index is of an image with other layers"]


def test_a_layer_that_is_not_what_the_image_says_is_an_error(tmp_path: Path) -> None:
    build_index(image(tmp_path / "one", LAYERS), tmp_path / "a.clip", BuildOptions(), None)
    diff_ids = [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in LAYERS]
    changed = [LAYERS[0][:-1] + b"x", *LAYERS[1:]]
    with pytest.raises(DigestError, match="expected diff ID sha256:"):
        check_against_unpack(
            tmp_path / "a.clip", image(tmp_path / "two", changed, diff_ids), work_dir=tmp_path
        )
    bomb = [LAYERS[0] + bytes(50_000_000), *LAYERS[1:]]
    with pytest.raises(LayerError, match="more than the"):
        check_against_unpack(
            tmp_path / "a.clip", image(tmp_path / "three", bomb, diff_ids), work_dir=tmp_path
        )


def test_without_umoci_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = image(tmp_path / "image", LAYERS)
    build_index(source, tmp_path / "a.clip", BuildOptions(), None)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ClipError, match="install the package umoci"):
        check_against_unpack(tmp_path / "a.clip", source, work_dir=tmp_path)

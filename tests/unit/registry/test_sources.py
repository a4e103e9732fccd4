"""Finding one image for one platform, in archives and registries, among things that are none."""

from __future__ import annotations

import gzip
import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from clipshim.errors import BadReferenceError, DigestError, NotFoundError, RegistryError
from clipshim.registry.access import RegistryAccess
from clipshim.registry.embedded_server import EmbeddedRegistry
from clipshim.registry.manifests import parse_manifest
from clipshim.registry.references import parse_reference
from clipshim.registry.sources import VerifiedStream, fetch_manifest, open_source
from tests.support.fault_proxy import Fault, FaultProxy
from tests.unit.registry.layouts import (
    Layout,
    digest_of,
    docker_archive,
    layer_tar,
    some_bytes,
)

if TYPE_CHECKING:
    from pathlib import Path

    from clipshim.registry.sources import ImageSource

TARS = [layer_tar("one", some_bytes(50_000, 1)), layer_tar("two", b"two")]
ATTESTATION = {
    "platform": {"os": "unknown", "architecture": "unknown"},
    "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
}


def open_local(image: str, platform: str | None = "linux/amd64") -> ImageSource:
    return open_source(image, platform=platform, access=RegistryAccess(anonymous=True))


def stored_layers(source: ImageSource) -> list[bytes]:
    result = []
    for number, layer in enumerate(source.layers):
        with source.open_layer(number) as stream:
            raw = stream.read()
        assert digest_of(raw) == layer.digest
        assert len(raw) == layer.size
        result.append(raw)
    return result


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def multi_platform(layout: Layout) -> dict[str, Any]:
    images = [
        layout.image(layer_tar("arm", b"arm"), architecture="arm64", variant="v8"),
        layout.image(*TARS),
    ]
    broken = layout.manifest({"schemaVersion": 2, "layers": "attestation"}) | ATTESTATION
    return layout.index_of(broken, *images)


def test_layouts_and_their_archives(layout: Layout, tmp_path: Path) -> None:
    layout.tag(layout.image(*TARS), "v1")
    packed = layout.pack(tmp_path / "packed.tar")
    for image in (f"oci:{layout.path}", f"oci:{layout.path}:v1", f"oci-archive:{packed}:v1"):
        source = open_local(image)
        assert [gzip.decompress(raw) for raw in stored_layers(source)] == TARS
        assert source.platform == "linux/amd64"
        assert source.manifest_digest == digest_of(source.manifest_raw)
        assert source.reference == image
        assert json.loads(source.config_raw)["architecture"] == "amd64"


def test_a_platform_is_chosen_and_attestations_are_not_images(layout: Layout) -> None:
    layout.tag(multi_platform(layout))
    assert open_local(f"oci:{layout.path}").platform == "linux/amd64"
    assert open_local(f"oci:{layout.path}", "linux/arm64").platform == "linux/arm64"
    with pytest.raises(NotFoundError, match="got only linux/amd64, linux/arm64") as caught:
        open_local(f"oci:{layout.path}", "linux/s390x")
    assert caught.value.hint is not None


def test_an_explicit_platform_must_be_the_images(layout: Layout) -> None:
    layout.tag(layout.image(*TARS, architecture="s390x"))
    with pytest.raises(NotFoundError, match="linux/s390x"):
        open_local(f"oci:{layout.path}", "linux/amd64")
    assert open_local(f"oci:{layout.path}", None).platform == "linux/s390x"


def test_tags_of_layouts(layout: Layout) -> None:
    layout.tag(layout.image(TARS[0]), "one")
    layout.tag(layout.image(TARS[1]), "two")
    one, two = (open_local(f"oci:{layout.path}:{tag}") for tag in ("one", "two"))
    assert one.manifest_digest != two.manifest_digest
    with pytest.raises(BadReferenceError, match="one, two"):
        open_local(f"oci:{layout.path}")
    with pytest.raises(NotFoundError, match="one, two"):
        open_local(f"oci:{layout.path}:three")


def test_a_layout_of_several_platforms_without_an_index(layout: Layout) -> None:
    layout.tag(layout.image(TARS[0], architecture="arm64"))
    layout.tag(layout.image(TARS[1]))
    assert open_local(f"oci:{layout.path}", "linux/arm64").platform == "linux/arm64"


@pytest.mark.parametrize("compressed", [False, True])
def test_archives_of_docker_save(tmp_path: Path, compressed: bool) -> None:
    saved = docker_archive(tmp_path / "s.tar", TARS, ["app:v1", "app:v2"], compressed=compressed)
    for image in (f"docker-archive:{saved}", f"docker-archive:{saved}:app:v2"):
        source = open_local(image)
        layers = stored_layers(source)
        assert [gzip.decompress(raw) if compressed else raw for raw in layers] == TARS
        assert source.manifest_digest == open_local(image).manifest_digest
        assert source.layers[0].media_type.endswith(".gzip") == compressed
    with pytest.raises(NotFoundError, match="app:v1"):
        open_local(f"docker-archive:{saved}:app:v3")


def test_the_wrong_scheme_is_corrected(layout: Layout, tmp_path: Path) -> None:
    layout.tag(layout.image(*TARS))
    packed = layout.pack(tmp_path / "packed.tar")
    saved = docker_archive(tmp_path / "saved.tar", TARS, [])
    for image, hint in (
        (f"oci:{packed}", "oci-archive:"),
        (f"oci-archive:{layout.path}", "oci:"),
        (f"docker-archive:{packed}", "oci-archive:"),
        (f"oci-archive:{saved}", "docker-archive:"),
    ):
        with pytest.raises((BadReferenceError, RegistryError)) as caught:
            open_local(image)
        assert caught.value.hint is not None
        assert hint in caught.value.hint
    with pytest.raises(NotFoundError, match=r"(?i)no such file"):
        open_local(f"oci:{tmp_path}/missing")


def test_what_is_no_archive_is_refused(tmp_path: Path, layout: Layout) -> None:
    layout.tag(layout.image(*TARS))
    packed = layout.pack(tmp_path / "packed.tar")
    junk = tmp_path / "junk.tar"
    for raw in (b"junk" * 1000, gzip.compress(packed.read_bytes()), packed.read_bytes()[:700]):
        junk.write_bytes(raw)
        with pytest.raises((RegistryError, NotFoundError)):
            open_local(f"oci-archive:{junk}")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RegistryError, match=r"index\.json"):
        open_local(f"oci:{empty}")


def test_a_damaged_blob_is_noticed(layout: Layout) -> None:
    descriptor = layout.image(*TARS)
    layout.tag(descriptor)
    blob = layout.path / "blobs/sha256" / descriptor["digest"].removeprefix("sha256:")
    blob.write_bytes(blob.read_bytes() + b" ")
    with pytest.raises(DigestError, match=descriptor["digest"]):
        open_local(f"oci:{layout.path}")


# Manifests that are hostile, old, or of something else


def manifest(**changes: Any) -> bytes:
    good = {"mediaType": "application/vnd.oci.image.config.v1+json", "size": 1}
    document = {
        "schemaVersion": 2,
        "config": good | {"digest": "sha256:" + "0" * 64},
        "layers": [],
        **changes,
    }
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"[]", b"{}", b"\xff", b"[" * 100_000,
        manifest(layers={}), manifest(layers=[7]), manifest(layers=[{}] * 5000),
        manifest(config=None), manifest(config={"digest": "sha256:../x", "size": 1}),
        manifest(config={"digest": "sha256:" + "0" * 64, "size": -1}),
        manifest(config={"digest": "sha256:" + "0" * 64, "size": True}),
        manifest(config={"digest": "sha256:" + "0" * 64, "size": 1 << 60}),
        manifest(mediaType="text/plain"), manifest(mediaType="x" * 10_000),
    ],
)  # fmt: skip
def test_bad_manifests_are_errors(raw: bytes) -> None:
    with pytest.raises(RegistryError, match=r"^what"):
        parse_manifest(raw, "what")


def test_schema_1_is_explained() -> None:
    for raw in (
        b'{"schemaVersion":1,"name":"a","fsLayers":[]}',
        manifest(mediaType="application/vnd.docker.distribution.manifest.v1+prettyjws"),
    ):
        with pytest.raises(RegistryError, match="schema 1") as caught:
            parse_manifest(raw, "what")
        assert caught.value.hint is not None


def test_docker_media_types_foreign_layers_and_annotations() -> None:
    layer = {
        "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "digest": "sha256:" + "1" * 64,
        "size": 5,
        "urls": ["https://x.io/layer", 7],
        "annotations": {"a": "b", "c": 7},
    }
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    parsed = parse_manifest(manifest(mediaType=kind, layers=[layer]), "what")
    assert parsed.media_type == kind
    assert parsed.layers[0].urls == ("https://x.io/layer",)
    assert parsed.layers[0].annotations == {"a": "b"}


def test_an_artifact_is_no_image(layout: Layout) -> None:
    layout.tag(layout.image(*TARS, extra={"artifactType": "application/vnd.example"}))
    with pytest.raises(RegistryError, match=r"artifact of type 'application/vnd\.example'"):
        open_local(f"oci:{layout.path}")


# Registries


def test_an_image_in_a_registry(layout: Layout) -> None:
    layout.tag(multi_platform(layout))
    with EmbeddedRegistry({"team/app": str(layout.path)}) as registry:
        name = f"{registry.address}/team/app"
        access = RegistryAccess(anonymous=True)
        source = open_source(f"{name}:v1", platform="linux/amd64", access=access)
        assert source.reference == f"{name}:v1"
        assert [gzip.decompress(raw) for raw in stored_layers(source)] == TARS
        pinned = f"{name}@{source.manifest_digest}"
        again = open_source(pinned, platform="linux/amd64", access=access)
        assert again.manifest_raw == source.manifest_raw
        assert again.reference == pinned
        with pytest.raises(NotFoundError):
            open_source(f"{registry.address}/other", platform=None, access=access)
        with pytest.raises(NotFoundError, match="got only"):
            open_source(name, platform="linux/s390x", access=access)
        access.transport.close()


def test_a_manifest_that_is_not_the_digests_is_refused(layout: Layout) -> None:
    layout.tag(layout.image(*TARS))
    with (
        EmbeddedRegistry({"app": str(layout.path)}) as registry,
        FaultProxy(registry.address) as proxy,
    ):
        access = RegistryAccess(anonymous=True)
        reference = parse_reference(f"{proxy.host}/app:1")
        good = fetch_manifest(access, reference)
        proxy.inject(Fault("wrong-bytes"), match="GET .*/manifests/", times=100)
        with pytest.raises(RegistryError, match="expected digest"):
            fetch_manifest(access, reference, good.digest)
        with pytest.raises(RegistryError, match="expected JSON"):
            fetch_manifest(access, reference)
        proxy.clear()
        proxy.inject(Fault("reset", after=20), match="GET .*/manifests/", times=2)
        assert fetch_manifest(access, reference) == good
        access.transport.close()


def test_a_registry_that_is_not_there_is_an_error_soon(layout: Layout) -> None:
    layout.tag(layout.image(*TARS))
    with (
        EmbeddedRegistry({"app": str(layout.path)}) as registry,
        FaultProxy(registry.address) as proxy,
    ):
        image = f"{proxy.host}/app"
        with proxy.refusing(), pytest.raises(RegistryError, match="connection refused"):
            open_source(image, platform=None, access=RegistryAccess(anonymous=True))


def test_verified_streams(tmp_path: Path) -> None:
    raw = some_bytes(100_000, 3)
    file = tmp_path / "file"
    file.write_bytes(raw)
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    with open(file, "rb") as stream:
        assert VerifiedStream(stream, digest, len(raw)).read() == raw
    for wrong_digest, size in (("sha256:" + "0" * 64, len(raw)), (digest, len(raw) - 1)):
        with open(file, "rb") as stream, pytest.raises(DigestError, match="expected"):
            VerifiedStream(stream, wrong_digest, size).read()

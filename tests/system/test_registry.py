"""The registry room against the real docker-registry, skopeo and umoci, and faults in between."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import threading
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from clipshim.errors import AuthError, DigestError, NotFoundError, RegistryError
from clipshim.registry.access import RegistryAccess
from clipshim.registry.artifacts import (
    ARTIFACT_TYPE,
    fallback_tag,
    find_index,
    list_indexes,
    pull_index,
    push_index,
)
from clipshim.registry.blobs import BlobReader, RegistryBlob, locate_blob
from clipshim.registry.references import parse_reference
from clipshim.registry.sources import ImageSource, open_source
from clipshim.registry.stubs import StubFile, build_stub
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.registry import NO_PROXY, TestRegistry, run_tool, running_registry
from tests.unit.registry.layouts import (
    OCI_INDEX,
    OCI_MANIFEST,
    Layout,
    digest_of,
    docker_archive,
    layer_tar,
    some_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TARS = [layer_tar("one", some_bytes(2_000_000, 1)), layer_tar("two", some_bytes(100_000, 2))]
PATIENCE_S = 180.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def registry(directory: Path) -> Iterator[TestRegistry]:
    with running_registry(directory / "open") as registry:
        yield registry


@pytest.fixture(scope="module")
def image(registry: TestRegistry, directory: Path) -> str:
    """An image for two platforms with an attestation, as buildx pushes them."""
    layout = Layout(directory / "layout")
    attestation = layout.image(TARS[1], architecture="unknown")
    attestation["platform"] = {"os": "unknown", "architecture": "unknown"}
    attestation["annotations"] = {"vnd.docker.reference.type": "attestation-manifest"}
    layout.tag(
        layout.index_of(
            attestation,
            layout.image(TARS[1], architecture="arm64", variant="v8"),
            layout.image(*TARS, architecture="amd64"),
        ),
        "v1",
    )
    return registry.push_layout(layout.path, "team/app:v1", tag="v1")


@pytest.fixture
def access() -> Iterator[RegistryAccess]:
    access = RegistryAccess(anonymous=True)
    yield access
    access.transport.close()


def contents(source: ImageSource) -> list[bytes]:
    found = []
    for number, layer in enumerate(source.layers):
        with source.open_layer(number) as stream:
            raw = stream.read()
        assert digest_of(raw) == layer.digest
        found.append(gzip.decompress(raw))
    return found


def amd64(image: str, access: RegistryAccess) -> ImageSource:
    return open_source(image, platform="linux/amd64", access=access)


def index_file(directory: Path, seed: int, size: int = 300_000) -> Path:
    path = directory / f"{seed}.clip"
    path.write_bytes(some_bytes(size, seed))
    return path


# Reading


def test_the_platform_is_chosen_and_every_layer_is_right(
    image: str, access: RegistryAccess
) -> None:
    source = amd64(image, access)
    assert contents(source) == TARS
    assert source.platform == "linux/amd64"
    assert open_source(image, platform="linux/arm64/v8", access=access).platform == "linux/arm64"
    with pytest.raises(NotFoundError, match="linux/s390x"):
        open_source(image, platform="linux/s390x", access=access)
    pinned = f"{parse_reference(image).name}@{source.manifest_digest}"
    assert amd64(pinned, access).manifest_raw == source.manifest_raw


def test_ranges_of_a_layer(image: str, access: RegistryAccess) -> None:
    source = amd64(image, access)
    layer = source.layers[0]
    with source.open_layer(0) as stream:
        whole = stream.read()
    reader = BlobReader(access, transport=access.transport)
    blob = locate_blob(source.reference, layer.digest, layer.size)
    for start, length in ((0, 10), (1_000_000, 500_000), (layer.size - 1, 1), (0, layer.size)):
        deadline = time.monotonic() + PATIENCE_S
        assert (
            reader.read_range(blob, start, length, deadline=deadline)
            == (whole[start : start + length])
        )
    assert reader.statistics()["retries"] == {}


def test_docker_schema_2(registry: TestRegistry, tmp_path: Path, access: RegistryAccess) -> None:
    saved = docker_archive(tmp_path / "saved.tar", TARS, ["app:v1"])
    name = registry.reference("schema2:v1")
    run_tool(
        ["skopeo", "--insecure-policy", "copy", "--quiet", "--format", "v2s2",
         "--dest-tls-verify=false", f"docker-archive:{saved}", f"docker://{name}"]
    )  # fmt: skip
    source = amd64(name, access)
    assert "docker" in json.loads(source.manifest_raw)["mediaType"]
    assert contents(source) == TARS


def test_what_is_not_there_is_not_found(registry: TestRegistry, access: RegistryAccess) -> None:
    with pytest.raises(NotFoundError, match="manifest unknown"):
        amd64(registry.reference("missing:v1"), access)
    blob = RegistryBlob(parse_reference(registry.reference("team/app")), "sha256:" + "0" * 64, 9)
    with pytest.raises(NotFoundError):
        BlobReader(access, transport=access.transport).read_range(
            blob, 0, 1, deadline=time.monotonic() + PATIENCE_S
        )


def test_archives_written_by_skopeo_and_layouts_by_umoci(
    image: str, tmp_path: Path, access: RegistryAccess
) -> None:
    source = f"docker://{image}"
    for target in ("oci-archive", "docker-archive", "oci"):
        place = f"{target}:{tmp_path / target}:app:v1"
        if target == "oci":
            place = f"{target}:{tmp_path / target}:v1"
        run_tool(
            ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false",
             "--override-os=linux", "--override-arch=amd64", source, place]
        )  # fmt: skip
        local = amd64(f"{target}:{tmp_path / target}", access)
        found = []
        for number, layer in enumerate(local.layers):
            with local.open_layer(number) as stream:
                raw = stream.read()
            assert digest_of(raw) == layer.digest
            found.append(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
        assert found == TARS
    run_tool(["umoci", "tag", "--image", f"{tmp_path / 'oci'}:v1", "v2"])
    assert amd64(f"oci:{tmp_path / 'oci'}:v2", access).platform == "linux/amd64"


# Logging in


@pytest.fixture(scope="module")
def private(directory: Path) -> Iterator[TestRegistry]:
    with running_registry(directory / "private", username="bob", password="p:w d") as registry:
        layout = Layout(directory / "private-layout")
        layout.tag(layout.image(*TARS), "v1")
        registry.push_layout(layout.path, "app:v1", tag="v1")
        yield registry


def test_a_password_opens_a_private_registry(private: TestRegistry, tmp_path: Path) -> None:
    name = private.reference("app:v1")
    access = RegistryAccess(username="bob", password="p:w d")
    assert contents(amd64(name, access)) == TARS
    pushed = push_index(index_file(tmp_path, 1), name, access=access, platform="linux/amd64")
    found = find_index(name, platform="linux/amd64", access=access)
    assert found is not None
    assert found.manifest_digest == pushed
    access.transport.close()
    with pytest.raises(AuthError, match="credentials are needed") as caught:
        amd64(name, RegistryAccess(anonymous=True))
    assert caught.value.hint is not None
    for wrong in ("wrong", ""):
        with pytest.raises(AuthError, match="refused"):
            amd64(name, RegistryAccess(username="bob", password=wrong))


def test_a_log_in_is_read_again_when_the_registry_refuses_the_old_one(
    private: TestRegistry, tmp_path: Path
) -> None:
    authfile = tmp_path / "auth.json"
    command = ["skopeo", "login", "--tls-verify=false", "--authfile", str(authfile)]
    authfile.write_text('{"auths": {}}')
    name = private.reference("app:v1")
    access = RegistryAccess(authfile=str(authfile))
    with pytest.raises(AuthError):
        amd64(name, access)
    run_tool([*command, "-u", "bob", "-p", "p:w d", private.host])
    assert contents(amd64(name, access)) == TARS
    access.transport.close()


# Indexes as referrers


def test_an_index_is_found_by_its_images_name(
    image: str, tmp_path: Path, access: RegistryAccess
) -> None:
    target = tmp_path / "pulled.clip"
    with pytest.raises(NotFoundError, match="has no index") as caught:
        pull_index(image, target, platform="linux/arm64", access=access)
    assert caught.value.hint is not None
    first = index_file(tmp_path, 1)
    source = amd64(image, access)
    pushed = push_index(first, image, access=access, manifest_digest=source.manifest_digest)
    assert push_index(first, image, access=access, platform="linux/amd64") == pushed
    assert pull_index(image, target, platform="linux/amd64", access=access) == str(target)
    assert target.read_bytes() == first.read_bytes()
    second = index_file(tmp_path, 2)
    newer = push_index(second, image, access=access, platform="linux/amd64")
    assert newer != pushed
    pull_index(image, target, platform="linux/amd64", access=access)
    assert target.read_bytes() == second.read_bytes()
    assert find_index(image, platform="linux/arm64", access=access) is None
    reference = parse_reference(image)
    found = list_indexes(access, reference, source.manifest_digest)
    assert [item.manifest_digest for item in found] == [newer, pushed]
    assert sorted(os.listdir(tmp_path)) == ["1.clip", "2.clip", "pulled.clip"]


def test_the_artifact_is_as_the_specification_wants_it(
    registry: TestRegistry, image: str, tmp_path: Path, access: RegistryAccess
) -> None:
    subject = amd64(image, access).manifest_digest
    pushed = push_index(index_file(tmp_path, 3), image, access=access, platform="linux/amd64")
    url = f"{registry.url}/v2/team/app/manifests"
    document = get_json(f"{url}/{pushed}", OCI_MANIFEST)
    assert document["artifactType"] == ARTIFACT_TYPE
    assert document["subject"]["digest"] == subject
    assert document["config"]["mediaType"] == "application/vnd.oci.empty.v1+json"
    assert len(document["layers"]) == 1
    listed = get_json(f"{url}/{fallback_tag(subject)}", OCI_INDEX)
    entry = next(item for item in listed["manifests"] if item["digest"] == pushed)
    assert entry["artifactType"] == ARTIFACT_TYPE


def test_an_index_of_another_image_is_not_pushed(
    image: str, tmp_path: Path, access: RegistryAccess
) -> None:
    with pytest.raises(NotFoundError, match="does not have"):
        push_index(
            index_file(tmp_path, 4), image, access=access, manifest_digest="sha256:" + "0" * 64
        )
    with pytest.raises(NotFoundError, match="No such file"):
        push_index(tmp_path / "gone", image, access=access, platform="linux/amd64")


def test_indexes_pushed_at_the_same_time_are_all_found(image: str, tmp_path: Path) -> None:
    files = [index_file(tmp_path, seed, 1000) for seed in range(10, 14)]
    pushed: list[str] = []

    def push(path: Path) -> None:
        access = RegistryAccess(anonymous=True)
        # The fallback tag has no compare-and-swap: a lost entry is added again by pushing again.
        for _ in range(20):
            try:
                digest = push_index(path, image, access=access, platform="linux/arm64")
            except RegistryError:
                continue
            pushed.append(digest)
            break
        access.transport.close()

    threads = [threading.Thread(target=push, args=(path,)) for path in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(pushed) == 4
    access = RegistryAccess(anonymous=True)
    for path in files:
        push_index(path, image, access=access, platform="linux/arm64")
    subject = open_source(image, platform="linux/arm64", access=access).manifest_digest
    found = list_indexes(access, parse_reference(image), subject)
    assert len({item.index.digest for item in found}) == 4
    access.transport.close()


def test_an_index_that_is_too_large_or_damaged_never_reaches_its_place(
    registry: TestRegistry, image: str, tmp_path: Path
) -> None:
    target = tmp_path / "pulled.clip"
    with FaultProxy(registry.host) as proxy:
        access = RegistryAccess(anonymous=True)
        name = f"{proxy.host}/team/app:v1"
        push_index(index_file(tmp_path, 5), name, access=access, platform="linux/amd64")
        with pytest.raises(RegistryError, match="at most 1000 bytes"):
            pull_index(name, target, platform="linux/amd64", access=access, max_bytes=1000)
        proxy.inject(Fault("wrong-bytes"), times=1)
        with pytest.raises(DigestError):
            pull_index(name, target, platform="linux/amd64", access=access)
        assert os.listdir(tmp_path) == ["5.clip"]
        proxy.inject(Fault("reset", after=100_000))
        proxy.inject(Fault("status", status=503), times=2)
        pull_index(name, target, platform="linux/amd64", access=access)
        assert target.read_bytes() == (tmp_path / "5.clip").read_bytes()
        access.transport.close()


# Pushing


class FakeIndex:
    """What a stub asks of an index."""

    def __init__(self, path: Path, source: ImageSource) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self.reference = source.reference
        self.manifest_digest = source.manifest_digest
        self.platform = source.platform
        self.config_raw = source.config_raw
        self.digest = digest_of(path.read_bytes())

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()


def test_a_stub_is_an_image_that_others_can_pull(
    registry: TestRegistry, image: str, tmp_path: Path, access: RegistryAccess
) -> None:
    index = FakeIndex(index_file(tmp_path, 6), amd64(image, access))
    stub = build_stub(index, {"/etc/passwd": StubFile(b"root:x:0:0::/:/bin/sh\n")})
    index.close()
    target = registry.reference("team/app:v1-lazy")
    assert stub.push(target, access) == stub.digest
    assert amd64(target, access).manifest_digest == stub.digest
    run_tool(
        ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false",
         f"docker://{target}", f"oci:{tmp_path / 'copy'}:v1"]
    )  # fmt: skip
    run_tool(
        ["umoci", "unpack", "--rootless", "--image", f"{tmp_path / 'copy'}:v1",
         str(tmp_path / "bundle")]
    )  # fmt: skip
    rootfs = tmp_path / "bundle/rootfs"
    assert (rootfs / ".clip/index.clip").read_bytes() == (tmp_path / "6.clip").read_bytes()
    assert (rootfs / "etc/passwd").read_bytes() == b"root:x:0:0::/:/bin/sh\n"


def test_archives_of_a_stub_are_read_by_skopeo(
    image: str, tmp_path: Path, access: RegistryAccess
) -> None:
    index = FakeIndex(index_file(tmp_path, 7), amd64(image, access))
    stub = build_stub(index, {})
    index.close()
    for kind in ("oci-archive", "docker-archive"):
        stub.write(tmp_path / kind, kind, "team/app:lazy")
        found = json.loads(run_tool(["skopeo", "inspect", "--config", f"{kind}:{tmp_path / kind}"]))
        assert found["rootfs"]["diff_ids"] == [digest_of(stub.layer_tar)]


def test_pushing_goes_on_after_passing_faults(
    registry: TestRegistry, image: str, tmp_path: Path
) -> None:
    with FaultProxy(registry.host) as proxy:
        access = RegistryAccess(anonymous=True)
        name = f"{proxy.host}/team/app:v1"
        for match in ("POST .*/blobs/uploads/", "PUT .*/blobs/uploads/", "PUT .*/manifests/"):
            proxy.inject(Fault("status", status=503), match=match)
        pushed = push_index(index_file(tmp_path, 8), name, access=access, platform="linux/amd64")
        found = find_index(name, platform="linux/amd64", access=access)
        assert found is not None
        assert found.manifest_digest == pushed
        proxy.inject(Fault("status", status=403), match="POST .*/blobs/uploads/", times=100)
        with pytest.raises(AuthError, match="403"):
            push_index(index_file(tmp_path, 9), name, access=access, platform="linux/amd64")
        access.transport.close()


# Everything at once


def test_a_bad_day_of_a_registry_costs_time_but_no_byte(
    registry: TestRegistry, image: str, directory: Path
) -> None:
    """Tokens and signatures expire and connections break while many threads read."""
    with FaultProxy(registry.host) as proxy:
        proxy.require_tokens(users={"bob": "pw"})
        proxy.redirect_to_cdn()
        access = RegistryAccess(username="bob", password="pw")
        source = amd64(f"{proxy.host}/team/app:v1", access)
        with source.open_layer(0) as stream:
            whole = stream.read()
        assert hashlib.sha256(whole).hexdigest() == source.layers[0].digest[7:]
        blob = locate_blob(source.reference, source.layers[0].digest, len(whole))
        reader = BlobReader(access, transport=access.transport)
        wrong: list[Any] = []
        step = 50_000

        def read(offset: int) -> None:
            for start in range(offset * 7919 % step, len(whole) - step, step * 8):
                deadline = time.monotonic() + PATIENCE_S
                try:
                    if (
                        reader.read_range(blob, start, step, deadline=deadline)
                        != (whole[start : start + step])
                    ):
                        wrong.append(start)
                except RegistryError as exc:
                    wrong.append(exc)

        for fault in (
            Fault("reset", after=1000),
            Fault("status", status=500),
            Fault("close", after=30_000),
            Fault("status", status=429, headers={"Retry-After": "0"}),
        ):
            proxy.inject(fault, times=4)
        threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            proxy.expire_tokens()
            proxy.expire_signatures()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []
        assert all(item.authorization is None for item in proxy.requests if item.at == "cdn")
        access.transport.close()


def get_json(url: str, accept: str) -> dict[str, Any]:
    request = urllib.request.Request(url, headers={"Accept": accept})
    with NO_PROXY.open(request, timeout=PATIENCE_S) as answer:
        document = json.load(answer)
    assert isinstance(document, dict)
    return document

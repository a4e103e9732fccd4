"""Stubs: what is in them, that they are always the same, and that archives of them can be read."""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from clipshim.errors import RegistryError, UsageError
from clipshim.registry.access import RegistryAccess
from clipshim.registry.sources import open_source
from clipshim.registry.stubs import ARCHIVE_FORMATS, StubFile, StubImage, build_stub
from tests.unit.registry.layouts import digest_of, some_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RAW_INDEX = some_bytes(200_000)
CONFIG = {
    "created": "2024-01-01T00:00:00Z",
    "os": "linux",
    "architecture": "amd64",
    "config": {"User": "app", "Env": ["A=ü"], "Labels": {"own": "label"}},
    "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "1" * 64]},
    "history": [{"created_by": "x"}],
    "unknown": {"kept": True},
}
FILES = {
    "/etc": StubFile(mode=stat.S_IFDIR | 0o750, gid=3, mtime_ns=5_000_000_000),
    "/etc/passwd": StubFile(b"app:x:1:1::/:/bin/sh\n", 0o640, 7, 3_000_000, 1_500_000_001),
}


@dataclass
class FakeIndex:
    fd: int
    reference: str = "r.io/app:1"
    manifest_digest: str = "sha256:" + "2" * 64
    platform: str = "linux/amd64"
    config_raw: bytes = json.dumps(CONFIG).encode()
    digest: str = digest_of(RAW_INDEX)

    def fileno(self) -> int:
        return self.fd


@pytest.fixture
def index(tmp_path: Path) -> Iterator[FakeIndex]:
    (tmp_path / "index.clip").write_bytes(RAW_INDEX)
    fd = os.open(tmp_path / "index.clip", os.O_RDONLY)
    yield FakeIndex(fd)
    os.close(fd)


@pytest.fixture
def stub(index: FakeIndex) -> StubImage:
    return build_stub(index, FILES)


def test_a_stub_is_deterministic(index: FakeIndex, stub: StubImage) -> None:
    again = build_stub(index, dict(reversed(FILES.items())))
    assert again == stub
    assert stub.size < len(RAW_INDEX) + 20_000


def test_the_layer_holds_index_and_accounts_as_they_were(stub: StubImage) -> None:
    assert gzip.decompress(stub.layer_raw) == stub.layer_tar
    with tarfile.open(fileobj=io.BytesIO(stub.layer_tar)) as archive:
        members = {member.name: member for member in archive}
        assert list(members) == [".clip", ".clip/index.clip", "etc", "etc/passwd"]
        index_file = archive.extractfile(".clip/index.clip")
        passwd = archive.extractfile("etc/passwd")
        assert index_file is not None
        assert passwd is not None
        assert index_file.read() == RAW_INDEX
        assert passwd.read() == FILES["/etc/passwd"].content
    found = members["etc/passwd"]
    assert (found.mode, found.uid, found.gid) == (0o640, 7, 3_000_000)
    assert found.mtime == pytest.approx(1.500000001)
    assert members["etc"].isdir()
    assert (members["etc"].mode, members["etc"].gid) == (0o750, 3)
    assert members[".clip/index.clip"].mode == 0o444


def test_the_config_is_the_images_but_for_rootfs_history_and_labels(stub: StubImage) -> None:
    config = json.loads(stub.config_raw)
    assert config["rootfs"] == {"type": "layers", "diff_ids": [digest_of(stub.layer_tar)]}
    assert len(config["history"]) == 1
    labels = config["config"].pop("Labels")
    assert labels["own"] == "label"
    assert labels["io.clipshim.stub.image"] == "r.io/app:1"
    assert labels["io.clipshim.stub.index-digest"] == digest_of(RAW_INDEX)
    assert config["config"] == {"User": "app", "Env": ["A=ü"]}
    assert config["unknown"] == CONFIG["unknown"]
    assert config["created"] == CONFIG["created"]
    manifest = json.loads(stub.manifest_raw)
    assert manifest["annotations"]["io.clipshim.stub.manifest-digest"] == "sha256:" + "2" * 64
    # Engines copy annotations of images to containers: this one would name the image twice.
    assert "io.clipshim.image" not in manifest["annotations"]


@pytest.mark.parametrize("kind", ARCHIVE_FORMATS)
def test_archives_can_be_read_and_do_not_change(stub: StubImage, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "stub.tar"
    stub.write(path, kind, "app:lazy")
    first = path.read_bytes()
    source = open_source(f"{kind}:{path}", platform=None, access=RegistryAccess())
    assert source.config_raw == stub.config_raw
    with source.open_layer(0) as stream:
        raw = stream.read()
    assert raw == (stub.layer_raw if kind == "oci-archive" else stub.layer_tar)
    if kind == "oci-archive":
        assert source.manifest_digest == stub.digest
    stub.write(path, kind, "app:lazy")
    assert path.read_bytes() == first
    assert os.listdir(tmp_path).count("stub.tar") == 1
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".stub-")]


def test_docker_archives_carry_the_familiar_name(stub: StubImage, tmp_path: Path) -> None:
    for name, familiar in (("app", "app:latest"), ("r.io/a/b:c", "r.io/a/b:c")):
        stub.write(tmp_path / "s.tar", "docker-archive", name)
        with tarfile.open(tmp_path / "s.tar") as archive:
            member = archive.extractfile("manifest.json")
            assert member is not None
            assert json.load(member)[0]["RepoTags"] == [familiar]


def test_what_cannot_be_done_is_said(index: FakeIndex, stub: StubImage, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="oci-archive, docker-archive"):
        stub.write(tmp_path / "x", "zip", "app")
    with pytest.raises(UsageError, match="expected a registry"):
        stub.push(f"oci:{tmp_path}", RegistryAccess())
    for path in ("/", "/../etc/passwd", "/.clip/index.clip"):
        with pytest.raises(UsageError, match="inside the image"):
            build_stub(index, {path: StubFile(b"")})
    index.digest = "sha256:" + "0" * 64
    with pytest.raises(RegistryError, match="expected digest"):
        build_stub(index, FILES)

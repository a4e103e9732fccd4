"""Which mounts are new volumes of an engine, and what an interrupted fill leaves."""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from clipshim.errors import MountError
from clipshim.shim import copy_tree, volumes
from clipshim.shim.bundle import Bundle
from clipshim.shim.volumes import RECORD, STAGE

if TYPE_CHECKING:
    from pathlib import Path

ID = "0123456789abcdef" * 4
NEVER = "0001-01-01T00:00:00Z"


def bind(source: object, destination: str, *options: str) -> dict[str, Any]:
    return {
        "type": "bind",
        "source": str(source),
        "destination": destination,
        "options": ["rbind", *options],
    }


class Docker:
    """What Docker leaves on the disk of a container with one volume."""

    def __init__(self, top: Path) -> None:
        self.root = top / "docker"
        self.data = self.root / "volumes/new/_data"
        self.data.mkdir(parents=True)
        self.directory = self.root / "containers" / ID
        self.directory.mkdir(parents=True)
        self.rootfs = top / "rootfs"
        (self.rootfs / "srv").mkdir(parents=True)
        self.point: dict[str, Any] = {
            "Type": "volume", "Driver": "local", "Name": "new", "Destination": "/srv", "Spec": {},
        }  # fmt: skip
        self.record: dict[str, Any] = {"ID": ID, "State": {"StartedAt": NEVER}}
        self.mounts = [
            bind(self.directory / "hostname", "/etc/hostname"),
            bind(self.data, "/srv"),
            bind(top / "elsewhere/volumes/new/_data", "/other"),
        ]

    def bundle(self) -> Bundle:
        record = {**self.record, "MountPoints": {"/srv": self.point}}
        (self.directory / "config.v2.json").write_text(json.dumps(record))
        (self.directory / "config.v2.json").chmod(0o600)
        config = {"root": {"path": str(self.rootfs)}, "mounts": self.mounts}
        return Bundle("/run/bundle", config, b"")

    def found(self, container_id: str = ID) -> list[str]:
        return [v.data for v in volumes.find_volumes(self.bundle(), container_id)]

    def new(self) -> volumes.NewVolumes:
        found = self.bundle()
        return volumes.NewVolumes(found, volumes.find_volumes(found, ID), has_engines_copy=True)


@pytest.fixture
def docker(tmp_path: Path) -> Docker:
    return Docker(tmp_path)


def test_docker_says_which_mounts_are_local_volumes(docker: Docker) -> None:
    assert docker.found() == [str(docker.data)]
    assert docker.found("another-id") == []


def test_a_container_that_has_run_before_gets_nothing(docker: Docker) -> None:
    docker.record["State"]["StartedAt"] = "2026-11-21T17:52:03.981846796Z"
    assert docker.found() == []
    docker.record["State"] = None
    assert docker.found() == []


@pytest.mark.parametrize(
    "change",
    [
        {"Type": "bind"},
        {"Driver": "nfs"},
        {"Name": "other"},
        {"Name": "../volumes/new"},
        {"Relabel": "z,nocopy"},
        {"Spec": {"VolumeOptions": {"NoCopy": True}}},
        {"Name": None},
    ],
)
def test_what_docker_would_not_fill(change: dict[str, Any], docker: Docker) -> None:
    docker.point |= change
    assert docker.found() == []


def test_a_mount_that_only_looks_like_a_volume(docker: Docker) -> None:
    docker.mounts[1] = bind(docker.root / "volumes/other/_data", "/srv")
    assert docker.found() == []
    docker.mounts[1] = {**bind(docker.data, "/srv"), "type": "tmpfs"}
    assert docker.found() == []
    docker.mounts = [bind(docker.data, "/srv")]  # nothing names Docker's directory
    assert docker.found() == []


def test_a_record_that_is_not_roots_alone_is_not_believed(docker: Docker) -> None:
    found = docker.bundle()
    record = docker.directory / "config.v2.json"
    for mode, owner in ((0o622, 0), (0o600, 1000)):
        record.chmod(mode)
        os.chown(record, owner, owner)
        assert volumes.find_volumes(found, ID) == []
    record.unlink()
    record.symlink_to("hostname")
    assert volumes.find_volumes(found, ID) == []
    record.unlink()
    os.mkfifo(record)
    assert volumes.find_volumes(found, ID) == []
    record.unlink()
    record.write_bytes(b"[" * 1000)
    assert volumes.find_volumes(found, ID) == []


def test_a_volume_that_is_mounted_twice_is_filled_from_its_first_place(docker: Docker) -> None:
    docker.mounts.append(bind(docker.data, "/srv"))
    (docker.rootfs / "srv/file").write_bytes(b"x")
    assert docker.found() == [str(docker.data)]
    assert fill(docker) == ["file"]


def test_absurd_configurations_name_no_volumes(docker: Docker) -> None:
    for mounts in (None, 3, "x", [None], [{"type": "bind"}], [{"source": 1, "destination": 2}]):
        found = Bundle("/run/bundle", {"mounts": mounts}, b"")
        assert not found.may_have_volumes
        assert volumes.find_volumes(found, ID) == []


def test_podmans_volumes_lie_beside_its_containers(tmp_path: Path) -> None:
    root = tmp_path / "storage"
    mounts = [
        bind(root / "volumes/new/_data", "/srv", "rw"),
        bind(root / "volumes/bare/_data", "/bare", "nocopy"),
        bind(root / "volumes/new/_data/sub", "/sub"),
        bind(root / "volumes/a/b/_data", "/deeper"),
        bind(tmp_path / "volumes/new/_data", "/other"),
    ]
    found = Bundle(f"{root}/overlay-containers/{ID}/userdata", {"mounts": mounts}, b"")
    names = [volume.data for volume in volumes.find_volumes(found, ID)]
    assert names == [str(root / "volumes/new/_data")]
    found = Bundle(f"{root}/elsewhere/{ID}/userdata", {"mounts": mounts}, b"")
    assert volumes.find_volumes(found, ID) == []


def fill(docker: Docker) -> list[str]:
    """Fills what is new, as create does; what the volume holds then."""
    new = docker.new()
    try:
        new.fill(str(docker.rootfs))
    finally:
        new.close()
    return sorted(os.listdir(docker.data))


def test_a_new_volume_is_filled_and_nothing_else_is_left(docker: Docker) -> None:
    (docker.rootfs / "srv/file").write_bytes(b"x")
    os.utime(docker.rootfs / "srv", ns=(7, 7))
    assert fill(docker) == ["file"]
    assert docker.data.stat().st_mtime_ns == 7
    assert os.listdir(docker.data.parent) == ["_data"]


def test_a_used_volume_is_left_alone(docker: Docker) -> None:
    (docker.rootfs / "srv/file").write_bytes(b"x")
    (docker.data / "mine").write_bytes(b"y")
    before = docker.data.stat()
    assert docker.new().paths == []
    assert fill(docker) == ["mine"]
    assert docker.data.stat().st_mtime_ns == before.st_mtime_ns


def test_what_the_engine_copied_is_completed(docker: Docker) -> None:
    """At the time of the look the rootfs shows the stub, when it is filled the tree too."""
    (docker.rootfs / "srv/stub").write_bytes(b"s")
    with_stub = docker.data / "stub"
    with_stub.write_bytes(b"s")
    facts = (docker.rootfs / "srv/stub").stat()
    os.utime(with_stub, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    new = docker.new()
    (docker.rootfs / "srv/tree").write_bytes(b"t")
    inode = with_stub.stat().st_ino
    new.fill(str(docker.rootfs))
    assert sorted(os.listdir(docker.data)) == ["stub", "tree"]
    assert with_stub.stat().st_ino == inode


def test_links_of_the_image_stay_in_the_image(docker: Docker, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"the host's")
    (docker.rootfs / "srv").rmdir()
    for target in (str(tmp_path), "../../../../../../.." + str(tmp_path), "srv", "/nowhere"):
        (docker.rootfs / "srv").symlink_to(target)
        assert fill(docker) == []
        (docker.rootfs / "srv").unlink()
    (docker.rootfs / "srv").symlink_to("/inside")
    (docker.rootfs / "inside").mkdir()
    (docker.rootfs / "inside/file").write_bytes(b"x")
    assert fill(docker) == ["file"]


def test_a_volume_whose_directory_is_a_link_is_left_alone(docker: Docker, tmp_path: Path) -> None:
    (docker.rootfs / "srv/file").write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    docker.data.rmdir()
    docker.data.symlink_to(tmp_path / "elsewhere")
    assert fill(docker) == []
    docker.data.unlink()
    docker.data.parent.rmdir()
    assert docker.new().paths == []


def test_a_failure_names_the_volume_and_leaves_it_as_it_was(
    docker: Docker, monkeypatch: pytest.MonkeyPatch
) -> None:
    (docker.rootfs / "srv/sub").mkdir()
    (docker.rootfs / "srv/sub/one").write_bytes(b"1")
    (docker.rootfs / "srv/sub/two").write_bytes(b"2")
    copied: list[int] = []

    def full(read: int, write: int) -> None:
        if copied:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copied.append(write)

    with monkeypatch.context() as patch:
        patch.setattr(copy_tree, "_copy_data", full)
        with pytest.raises(
            MountError, match=r"volume new: .* /srv .*: sub/(one|two): No space left"
        ):
            fill(docker)
    assert os.listdir(docker.data) == []
    assert os.listdir(docker.data.parent) == ["_data"]
    assert fill(docker) == ["sub"]


def leave_behind(docker: Docker, word: str) -> None:
    """What a create that was killed leaves."""
    (docker.data / STAGE).mkdir(mode=0o700)
    (docker.data / STAGE / "copied").write_bytes(b"c")
    (docker.data.parent / RECORD).write_text(f"{word}\n")


@pytest.mark.parametrize("by", ["create", "clean-up"])
def test_half_a_copy_is_thrown_away(by: str, docker: Docker) -> None:
    (docker.rootfs / "srv/file").write_bytes(b"x")
    leave_behind(docker, "filling")
    if by == "clean-up":
        volumes.clean_up(str(docker.data))
        assert os.listdir(docker.data) == []
        assert os.listdir(docker.data.parent) == ["_data"]
    assert fill(docker) == ["file"]


@pytest.mark.parametrize("by", ["create", "clean-up"])
def test_a_whole_copy_is_moved_on(by: str, docker: Docker) -> None:
    leave_behind(docker, "moving")
    os.chmod(docker.data / STAGE, 0o750)
    if by == "clean-up":
        volumes.clean_up(str(docker.data))
    else:
        assert docker.new().paths == []
    assert os.listdir(docker.data) == ["copied"]
    assert stat.S_IMODE(docker.data.stat().st_mode) == 0o750
    assert (docker.data.parent / RECORD).read_text() == "filled\n"


def test_a_directory_that_a_container_planted_is_not_ours(docker: Docker) -> None:
    leave_behind(docker, "moving")
    (docker.data.parent / RECORD).unlink()
    volumes.clean_up(str(docker.data))
    assert docker.new().paths == []
    assert os.listdir(docker.data) == [STAGE]
    assert os.listdir(docker.data / STAGE) == ["copied"]


def test_who_cleans_up_leaves_a_volume_that_is_being_filled(docker: Docker) -> None:
    new = docker.new()
    leave_behind(docker, "filling")
    volumes.clean_up(str(docker.data))
    assert os.listdir(docker.data / STAGE) == ["copied"]
    new.close()
    volumes.clean_up(str(docker.data))
    assert os.listdir(docker.data) == []


def test_podman_fills_a_volume_once_in_its_life(tmp_path: Path) -> None:
    data = tmp_path / "volumes/new/_data"
    data.mkdir(parents=True)
    (tmp_path / "rootfs/srv").mkdir(parents=True)
    (tmp_path / "rootfs/srv/file").write_bytes(b"x")
    config = {"root": {"path": str(tmp_path / "rootfs")}, "mounts": [bind(data, "/srv")]}
    found = Bundle(f"{tmp_path}/overlay-containers/{ID}/userdata", config, b"")

    def start() -> list[str]:
        wanted = volumes.find_volumes(found, ID)
        new = volumes.NewVolumes(found, wanted, has_engines_copy=True)
        new.fill(str(tmp_path / "rootfs"))
        return os.listdir(data)

    assert start() == ["file"]
    (data / "file").unlink()
    assert start() == []


def test_another_images_files_are_not_completed(docker: Docker) -> None:
    """A container that only names an image: the engine has filled the volume from another one."""
    found = docker.bundle()
    wanted = volumes.find_volumes(found, ID)
    (docker.data / "engines").mkdir()
    (docker.rootfs / "srv/engines").mkdir()
    assert volumes.NewVolumes(found, wanted, has_engines_copy=False).paths == []
    (docker.data / "engines").rmdir()
    new = volumes.NewVolumes(found, wanted, has_engines_copy=False)
    assert new.paths == [str(docker.data)]
    new.close()

"""New volumes begin with what the image holds where they are mounted, as with the full image."""

from __future__ import annotations

import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from clipshim.index.unpack_check import compare_trees
from tests.support import images, small_images
from tests.support.docker_engine import Docker
from tests.support.engine import Client, make_target
from tests.support.node import Node, wait_for
from tests.support.podman_engine import Podman
from tests.support.tar_layers import directory, link, member

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.engine import Target
    from tests.support.registry import TestRegistry

pytestmark = pytest.mark.engine
IMAGE = "localhost/volumes:1"
ABOVE = "localhost/above:1"  # with a layer on top
AT_ONCE = 6
LARGE = small_images.BLOB  # more than a stub holds
NOTE = "extended attribute b'user.note': expected b'kept', got None"
FRACTION = f"mtime_ns: expected {1_500_000_000_123_456_000}, got {1_500_000_000_000_000_000}"
CAPABILITY = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"


def _layer(path: Path) -> Path:
    """What a volume can begin with: every kind of entry that all engines copy."""
    odd = {"SCHILY.xattr.user.note": "kept"}
    own = partial(member, mode=0o640, uid=1234, gid=1235, pax=odd)
    capable = {"SCHILY.xattr.security.capability": CAPABILITY}
    deep = "/".join(["srv/deep", *("d" * 20 for _ in range(12))])
    levels = [deep.rsplit("/", count)[0] for count in range(12, 0, -1)] + [deep]
    members = [
        member("srv", kind=tarfile.DIRTYPE, mode=0o1770, uid=1234, gid=1235, pax=odd),
        own("srv/a", b"a\n"),
        member("srv/setuid", b"#!\n", mode=0o4755),
        member("srv/capable", b"#!\n", mode=0o755, pax=capable),
        member("srv/blob", LARGE, mtime=1_500_000_000.123456),
        member("srv/hole", b"x" + bytes(3 << 20) + b"y"),
        member("srv/empty", b""),
        member("srv/größe\\x", b"odd\n"),
        # Docker heeds what a hard link's own header says, where it differs
        member("srv/hard", kind=tarfile.LNKTYPE, target="srv/blob", mtime=1_500_000_000.123456),
        link("srv/soft", "a", kind=tarfile.SYMTYPE),
        link("srv/outside", "/etc/passwd", kind=tarfile.SYMTYPE),
        link("srv/dangling", "../../../nothing", kind=tarfile.SYMTYPE),
        member("srv/null", kind=tarfile.CHRTYPE, mode=0o666, device=(1, 3)),
        directory("srv/none", mode=0o700),
        *(directory(name) for name in levels),
        member(f"{deep}/end", b"end\n"),
        own("srv/deep/again", kind=tarfile.LNKTYPE, target="srv/a"),
        directory("bare", mode=0o1777),
        member("owned", kind=tarfile.DIRTYPE, mode=0o750, uid=1234, gid=1235),
        directory("declared"),
        member("declared/blob", LARGE),
        link("to-srv", "srv", kind=tarfile.SYMTYPE),
        member("etc/issue", b"this image\n"),
        directory("desk"),
        directory("desk/home"),
        member("desk/other", b"other\n"),
    ]
    path.write_bytes(b"".join(members) + bytes(1024))
    return path


@pytest.fixture(scope="module", params=["runc", "clipshim"])
def target(request: pytest.FixtureRequest, run_root: Path) -> Iterator[Target]:
    """The runtime that the engine calls, of a node of this module."""
    if request.param == "runc":
        yield make_target("runc", run_root / "vol-t", None)
        return
    with Node(run_root / "vol-n") as node:
        yield make_target("clipshim", run_root / "vol-t", node)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> images.Image:
    """busybox and the directories."""
    made = tmp_path_factory.mktemp("volumes")
    layers = [small_images.busybox_layer(made / "1.tar"), _layer(made / "2.tar")]
    volumes: dict[str, dict[str, str]] = {"/declared": {}}
    return small_images.image(made / "oci", layers, Volumes=volumes, WorkingDir="/desk/home")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory, image: images.Image) -> Path:
    """What the image holds."""
    return images.unpack(image, tmp_path_factory.mktemp("unpacked") / "rootfs")


@pytest.fixture(scope="module", params=["docker", "podman"])
def engine(
    request: pytest.FixtureRequest,
    run_root: Path,
    target: Target,
    image: images.Image,
    registry: TestRegistry,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Docker | Podman]:
    """One engine with the image, or its stub."""
    reference = registry.push_layout(image.layout, "volumes:1")
    archive = tmp_path_factory.mktemp("archive") / "image.tar"
    small_images.archive(target, image, reference, archive, IMAGE)
    files = {"srv/": b"", "srv/deep/": b"", "srv/deep/more": b"more\n"}
    layer = small_images.layer(archive.with_name("3.tar"), files)
    above = small_images.add_layer(archive, layer, archive.with_name("above.tar"), ABOVE)
    kind = Docker if request.param == "docker" else Podman
    started = kind(run_root / f"vol-{request.param[0]}{target.name[0]}", target)
    try:
        for path in (archive, above):
            started("load", "-q", "-i", path)
        yield started
        wait_for("no container mount is left", lambda: not target.container_mounts())
    finally:
        started.close()


def run(engine: Docker | Podman, *arguments: str) -> str:
    common = engine.common() if isinstance(engine, Podman) else ["--network=none"]
    return engine("run", "--rm", *common, *arguments)


def data(engine: Docker | Podman, name: str) -> Path:
    """Where a volume lies."""
    return Path(engine("volume", "inspect", "-f", "{{.Mountpoint}}", name))


def differences(engine: Docker | Podman, expected: Path, name: str) -> list[str]:
    """How a volume differs from what the image holds, but for what the engine itself changes."""
    since = None if engine.target.lazy else 0  # times of directories: engines' are made up
    lines = compare_trees(expected, data(engine, name), unpacked_since_ns=since)
    if engine.target.lazy or isinstance(engine, Docker):
        return lines
    # podman's own copies lack users' attributes and parts of seconds
    return [line for line in lines if not line.endswith((NOTE, FRACTION))]


def test_a_new_volume_begins_with_the_images_files(engine: Docker | Podman, unpacked: Path) -> None:
    assert run(engine, "-v", "new:/srv", IMAGE, "cat", "/srv/a") == "a"
    assert differences(engine, unpacked / "srv", "new") == []


@pytest.mark.parametrize("path", ["/bare", "/owned"])
def test_an_empty_directory_gives_its_owner_and_mode(
    path: str, engine: Docker | Podman, unpacked: Path
) -> None:
    name = f"empty-{path[1:]}"
    run(engine, "-v", f"{name}:{path}", IMAGE, "true")
    found, expected = data(engine, name).stat(), (unpacked / path[1:]).stat()
    modes = expected.st_mode, expected.st_uid, expected.st_gid
    assert (found.st_mode, found.st_uid, found.st_gid) == modes


def test_where_the_image_has_nothing_a_volume_is_empty(engine: Docker | Podman) -> None:
    script = "test -d /not/there && ls -A /not/there && echo x > /not/there/x"
    assert run(engine, "-v", "nothing:/not/there", IMAGE, "sh", "-c", script) == ""
    assert (data(engine, "nothing") / "x").read_text() == "x\n"


def test_anonymous_and_declared_volumes(engine: Docker | Podman) -> None:
    script = "cat /srv/deep/again; busybox sha256sum </declared/blob"
    out = run(engine, "-v", "/srv", IMAGE, "sh", "-c", script)
    assert out.split() == ["a", small_images.BLOB_SHA256, "-"]


def test_a_volume_that_is_mounted_read_only_is_filled(
    engine: Docker | Podman, unpacked: Path
) -> None:
    assert run(engine, "-v", "read-only:/srv:ro", IMAGE, "cat", "/srv/a") == "a"
    assert differences(engine, unpacked / "srv", "read-only") == []


def test_a_destination_may_be_a_link_in_the_image(engine: Docker | Podman, unpacked: Path) -> None:
    assert run(engine, "-v", "by-link:/to-srv", IMAGE, "cat", "/srv/a") == "a"
    found = differences(engine, unpacked / "srv", "by-link")
    assert [line for line in found if not line.startswith("/: ")] == []
    if engine.target.lazy or isinstance(engine, Docker):
        assert found == []  # podman gives the volume the link's mode


def test_nocopy_leaves_a_volume_empty(engine: Docker | Podman) -> None:
    if isinstance(engine, Podman):
        return  # 4.9 hands it on to runc, which refuses it, and 5.7 does not tell the runtime
    assert run(engine, "-v", "bare:/srv:nocopy", IMAGE, "ls", "-A", "/srv") == ""


def test_what_is_in_a_volume_stays(engine: Docker | Podman) -> None:
    engine("volume", "create", "used")
    (data(engine, "used") / "mine").write_text("mine\n")
    assert run(engine, "-v", "used:/srv", IMAGE, "ls", "-A", "/srv") == "mine"
    (data(engine, "used") / "mine").unlink()


def test_a_volume_where_a_stub_has_something_gets_the_rest(engine: Docker | Podman) -> None:
    """A stub has the working directory and users' names; the engine copies these alone."""
    options = ["-v", "partly:/desk", "-v", "etc:/etc"]
    script = "cat /desk/other /etc/issue /etc/passwd; ls /desk"
    lines = run(engine, *options, IMAGE, "sh", "-c", script).splitlines()
    assert lines[:2] == ["other", "this image"]
    assert lines[2].startswith("root:")
    assert lines[-2:] == ["home", "other"]


def test_an_image_that_is_built_on_top_fills_volumes_too(engine: Docker | Podman) -> None:
    script = "cat /srv/a /srv/deep/more /srv/deep/again"
    assert run(engine, "-v", "above:/srv", ABOVE, "sh", "-c", script) == "a\nmore\na"


def test_volumes_of_another_container(engine: Docker | Podman) -> None:
    common = engine.common() if isinstance(engine, Podman) else ["--network=none"]
    name = engine("create", *common, "-v", "/srv", IMAGE, "true")
    try:
        if isinstance(engine, Podman):  # which fills a volume when a container starts
            engine("start", name)
        assert run(engine, "--volumes-from", name, IMAGE, "cat", "/srv/a") == "a"
    finally:
        engine("rm", "-f", "-v", name)


def test_compose_fills_named_volumes(
    engine: Docker | Podman, tmp_path: Path, unpacked: Path
) -> None:
    if not isinstance(engine, Docker):
        return
    (tmp_path / "docker-compose.yml").write_text(
        "version: '2.4'\nservices:\n  app:\n"
        f"    image: {IMAGE}\n    runtime: {engine.target.name}\n    network_mode: none\n"
        "    volumes: ['app:/srv']\n    command: ['cat', '/srv/a']\nvolumes:\n  app: {}\n"
    )
    plugin = engine.run("compose", "version", check=False).returncode == 0
    program = [*engine.prefix, "compose"] if plugin else ["/usr/bin/docker-compose"]
    compose = Client([*program, "-p", "volumes", "-f", tmp_path / "docker-compose.yml"], engine.env)
    try:
        compose("up", "--no-color")
        assert differences(engine, unpacked / "srv", "volumes_app") == []
    finally:
        compose("down", "-v", "-t", "0", check=False)


def test_volumes_inside_each_other(engine: Docker | Podman, unpacked: Path) -> None:
    options = ["-v", "outer:/srv", "-v", "inner:/srv/deep"]
    assert run(engine, *options, IMAGE, "cat", "/srv/a", "/srv/deep/again") == "a\na"
    assert differences(engine, unpacked / "srv", "outer") == []
    assert (data(engine, "inner") / "again").read_text() == "a\n"


def test_an_emptied_volume_stays_empty_over_a_restart(engine: Docker | Podman) -> None:
    common = engine.common() if isinstance(engine, Podman) else ["--network=none"]
    name = engine("run", "-d", *common, "-v", "emptied:/srv", IMAGE, "sleep", "100000")
    try:
        top = data(engine, "emptied")
        assert (top / "a").exists()
        images.run("find", top, "-mindepth", "1", "-delete")
        engine("restart", "-t", "0", name)
        assert list(top.iterdir()) == []
        engine("stop", "-t", "0", name)
        engine("start", name)
        assert list(top.iterdir()) == []
    finally:
        engine("rm", "-f", name)


def test_a_volume_that_is_made_again_is_filled_again(engine: Docker | Podman) -> None:
    for _ in range(2):
        assert run(engine, "-v", "again:/srv", IMAGE, "cat", "/srv/a") == "a"
        engine("volume", "rm", "again")


def test_containers_that_start_at_once_share_one_whole_volume(
    engine: Docker | Podman, unpacked: Path
) -> None:
    def one(_: int) -> str:
        script = "busybox sha256sum </srv/blob; cat /srv/deep/again"
        return run(engine, "-v", "shared:/srv", IMAGE, "sh", "-c", script)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(one, range(AT_ONCE)))
    assert found == [f"{small_images.BLOB_SHA256}  -\na"] * AT_ONCE
    assert differences(engine, unpacked / "srv", "shared") == []

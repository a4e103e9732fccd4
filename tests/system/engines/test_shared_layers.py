"""Images that share layers, layers on top of stubs, and their way to another engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support import small_images
from tests.support.docker_engine import Docker
from tests.support.engine import make_target
from tests.support.node import Node, wait_for
from tests.support.podman_engine import Podman

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.engine import Target
    from tests.support.images import Image
    from tests.support.registry import TestRegistry

pytestmark = pytest.mark.engine
FIRST, SECOND = "localhost/first:1", "localhost/second:1"
HOME = "localhost/home:1"  # its working directory and its volumes are a user's


class Engines(NamedTuple):
    """dockerd with the two images, and a podman of another machine."""

    docker: Docker
    other: Podman
    registry: TestRegistry


@pytest.fixture(scope="module", params=["runc", "clipshim"])
def target(request: pytest.FixtureRequest, run_root: Path) -> Iterator[Target]:
    """The runtime that docker calls, of a node of this module."""
    if request.param == "runc":
        yield make_target("runc", run_root / "sl-t", None)
        return
    with Node(run_root / "sl-n", prefetch="none") as node:
        yield make_target("clipshim", run_root / "sl-t", node)


@pytest.fixture(scope="module")
def other_target(target: Target, run_root: Path) -> Iterator[Target]:
    """The runtime of another machine: nothing of the first one's is known there."""
    if target.node is None:
        yield make_target("runc", run_root / "sl-o", None)
        return
    with Node(run_root / "sl-m") as node:
        yield make_target("clipshim", run_root / "sl-o", node)


@pytest.fixture(scope="module")
def engines(
    run_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    target: Target,
    other_target: Target,
    registry: TestRegistry,
) -> Iterator[Engines]:
    """Two images of which two layers are the same."""
    directory = tmp_path_factory.mktemp("shared")
    base = small_images.busybox_layer(directory / "base.tar")
    shared = small_images.layer(
        directory / "shared.tar",
        {
            "data/": b"",
            "data/a": b"a\n",
            "data/b": b"b\n",
            "data/sub/": b"",
            "data/sub/c": b"c\n",
            "data/blob": small_images.BLOB,
        },
    )
    docker = Docker(run_root / f"sl-{target.name[0]}", target)
    try:
        for name in (FIRST, SECOND):
            word = name.removeprefix("localhost/").removesuffix(":1")
            top = small_images.layer(directory / f"{word}.tar", {"which": word.encode()})
            image = small_images.image(directory / word, [base, shared, top])
            reference = registry.push_layout(image.layout, f"shared-{word}:1")
            archive = directory / f"{word}-image.tar"
            small_images.archive(target, image, reference, archive, name)
            docker("load", "-q", "-i", archive)
        home = home_image(directory, base)
        reference = registry.push_layout(home.layout, "home:1")
        small_images.archive(target, home, reference, directory / "home-image.tar", HOME)
        docker("load", "-q", "-i", directory / "home-image.tar")
        other = Podman(run_root / f"slp-{target.name[0]}", other_target)
        try:
            other("load", "-q", "-i", directory / "home-image.tar")
            yield Engines(docker, other, registry)
            wait_for(
                "no container mount is left",
                lambda: not (target.container_mounts() or other_target.container_mounts()),
            )
        finally:
            other.close()
    finally:
        docker.close()


def home_image(directory: Path, base: Path) -> Image:
    """An image of an unprivileged user, as those of Jenkins and the like."""
    files: dict[str, bytes | str] = {
        "home/": b"",
        "home/app/": b"",
        "home/app/own": b"own\n",
        "var/": b"",
        "var/lib/": b"",
        "var/lib/app/": b"",
        "var/lib/app/initial": b"initial\n",
        "var/lib/app/link": "initial",
        "var/lib/app/deep/": b"",
        "var/lib/app/deep/file": b"deep\n",
        "run/": b"",
        "run/app/": b"",
        "var/run": "../run",
    }
    owners = {name: 1234 for name in files if "app" in name}
    layer = small_images.layer(directory / "home.tar", files, owners)
    return small_images.image(
        directory / "home",
        [base, layer],
        User="tester",
        WorkingDir="/home/app",
        Volumes={"/var/lib/app": {}, "/var/run/app": {}},
    )


def fetched(target: Target) -> dict[str, int]:
    """The node's counters; none for runc."""
    return dict(target.node.call("status")["fetch"]) if target.node is not None else {}


def test_what_two_images_share_is_fetched_once(engines: Engines, target: Target) -> None:
    script = "busybox sha256sum </data/blob; cat /which"
    out = engines.docker("run", "--rm", FIRST, "sh", "-c", script)
    assert out.split() == [small_images.BLOB_SHA256, "-", "first"]
    before = fetched(target)
    if target.lazy:
        assert before["fetched_bytes"] >= small_images.BLOB_BYTES
    first = engines.docker("run", "-d", FIRST, "sleep", "100000")
    second = engines.docker("run", "-d", SECOND, "sleep", "100000")
    try:
        for name, word in ((first, "first"), (second, "second")):
            out = engines.docker("exec", name, "sh", "-c", script)
            assert out.split() == [small_images.BLOB_SHA256, "-", word]
        if target.lazy:
            after = fetched(target)
            # only the second one's own layer, of one file
            assert after["fetched_spans"] - before["fetched_spans"] <= 1
            assert after["fetched_bytes"] - before["fetched_bytes"] < 10_000
    finally:
        engines.docker("rm", "-f", first, second)


def test_containers_of_an_image_share_one_tree(engines: Engines, target: Target) -> None:
    names = [engines.docker("run", "-d", FIRST, "sleep", "100000") for _ in range(3)]
    try:
        for number, name in enumerate(names):
            engines.docker("exec", name, "sh", "-c", f"echo {number} >/data/a")
        for number, name in enumerate(names):
            assert engines.docker("exec", name, "cat", "/data/a", "/data/b") == f"{number}\nb"
        if target.node is not None:
            node = target.node

            def one_tree() -> bool:  # the daemon hears of ended containers a little later
                trees = node.call("status")["images"]
                return [tree["containers"] for tree in trees if tree["containers"]] == [3]

            wait_for("one tree has the three containers", one_tree)
    finally:
        engines.docker("rm", "-f", *names)


def test_built_on_top_pushed_and_pulled_elsewhere(engines: Engines, tmp_path: Path) -> None:
    """Whiteouts of the layers on top hide the tree's files, on whatever engine they arrive."""
    (tmp_path / "Dockerfile").write_text(
        f"FROM {FIRST}\n"
        "RUN busybox rm /data/b && echo changed >>/data/a\n"
        "RUN busybox rm -r /data/sub && busybox mkdir /data/sub && echo d >/data/sub/d\n"
        "COPY added /data/added\n"
    )
    (tmp_path / "added").write_text("added\n")
    docker, other, registry = engines
    name = registry.reference("built-on-top:1")
    docker("build", "-q", "--network=none", "-t", name, tmp_path)
    script = "ls /data /data/sub; cat /data/a /data/added; busybox sha256sum </data/blob"
    deleted = ("b", "c") if docker.forgets_deletions else ()
    expected = ["/data:", "a", "added", *deleted[:1], "blob", "sub", "/data/sub:", *deleted[1:]]
    expected += ["d", "a", "changed", "added", small_images.BLOB_SHA256, "-"]
    assert docker("run", "--rm", name, "sh", "-c", script).split() == expected
    docker("push", "-q", name)
    docker("rmi", name)
    other("pull", "-q", "--tls-verify=false", name)
    assert other.start_container("--rm", name, "sh", "-c", script).split() == expected
    docker("pull", "-q", name)
    assert docker("run", "--rm", name, "sh", "-c", script).split() == expected


def test_committed_pushed_and_pulled_elsewhere(engines: Engines) -> None:
    docker, other, registry = engines
    name = registry.reference("committed:1")
    container = docker("run", "-d", SECOND, "sleep", "100000")
    try:
        docker("exec", container, "sh", "-c", "echo new >/data/sub/new; busybox rm /data/b")
        docker("commit", container, name)
    finally:
        docker("rm", "-f", container)
    docker("push", "-q", name)
    other("pull", "-q", "--tls-verify=false", name)
    out = other.start_container("--rm", name, "sh", "-c", "ls /data /data/sub; cat /which")
    deleted = ["b"] if docker.forgets_deletions else []
    expected = ["/data:", "a", *deleted, "blob", "sub", "/data/sub:", "c", "new", "second"]
    assert out.split() == expected


HOME_SCRIPT = (
    "busybox pwd; echo x >made; cat own made /var/lib/app/link /var/lib/app/deep/file;"
    "echo x >/var/lib/app/made; echo y >/run/app/made; cat /var/lib/app/made /var/run/app/made;"
    "busybox stat -c '%a %u %n' /home/app /var/lib/app /var/lib/app/deep /run/app;"
    "busybox readlink /var/run"
)
HOME_OUTPUT = [
    "/home/app", "own", "x", "initial", "deep", "x", "y", "700 1234 /home/app",
    "700 1234 /var/lib/app", "700 1234 /var/lib/app/deep", "700 1234 /run/app", "../run",
]  # fmt: skip


def test_working_directory_and_volumes_belong_to_their_user(engines: Engines) -> None:
    """Engines make both from what they see before the runtime is called: from the stub."""
    out = engines.docker("run", "--rm", HOME, "sh", "-c", HOME_SCRIPT)
    assert out.splitlines() == HOME_OUTPUT
    out = engines.other.start_container("--rm", HOME, "sh", "-c", HOME_SCRIPT)
    assert out.splitlines() == HOME_OUTPUT

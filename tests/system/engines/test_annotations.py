"""Containers of ordinary images that name an index: by annotation, and by the image's name in CRI.

The engines' image is empty, so that whatever runs comes from the tree. Only clipshim: to runc these
annotations mean nothing.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from typing import TYPE_CHECKING

import grpc
import pytest

from tests.support import images, small_images
from tests.support.containerd_engine import PAUSE, Containerd
from tests.support.cri import RUNNING, Cri
from tests.support.engine import cgroup_parent, make_target
from tests.support.node import Node, wait_for
from tests.support.podman_engine import Podman
from tests.system.engines.conftest import loaded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.engine import Target
    from tests.support.images import Image
    from tests.support.registry import TestRegistry

pytestmark = pytest.mark.engine
EMPTY = "localhost/empty:1"
INDEX, IMAGE = "io.clipshim.index", "io.clipshim.image"
GROUPS = "root:x:0:\ntesters:x:1235:"
FOREIGN = "registry.example.com/app:1"  # never asked: the policy refuses it
_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def index_dir(run_root: Path) -> Path:
    """The directory from which containers may name index files."""
    path = run_root / "an-indexes"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def target(run_root: Path, index_dir: Path, tiny_reference: str) -> Iterator[Target]:
    """clipshim of a node that has the index of one image, and allows one registry."""
    settings = {"index_dirs": [str(index_dir)], "allowed_registries": ["127.0.0.1:*"]}
    with Node(run_root / "an-n", **settings) as node:
        node.clipshim("index", tiny_reference)
        yield make_target("clipshim", run_root / "an-t", node)


@pytest.fixture(scope="module")
def node(target: Target) -> Node:
    """The target's node."""
    assert target.node is not None
    return target.node


@pytest.fixture(scope="module")
def clip(node: Node, index_dir: Path, tiny_reference: str) -> Path:
    """An index file where containers may name it."""
    node.clipshim("index", tiny_reference, index_dir / "tiny.clip")
    return index_dir / "tiny.clip"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory, tiny_reference: str) -> list[Path]:
    """The empty image under a name of its own, and under the name of an image with an index."""
    directory = tmp_path_factory.mktemp("empty")
    image = small_images.empty_image(directory / "image")
    made = []
    for number, name in enumerate((EMPTY, tiny_reference)):
        archive = directory / f"{number}.tar"
        images.convert(image, f"docker-archive:{archive}", name=name)
        made.append(archive)
    return made


@pytest.fixture(scope="module")
def pushed(registry: TestRegistry, run_root: Path, tiny: Image) -> str:
    """An image whose index lies beside it in the registry; the node does not know it."""
    reference = registry.push_layout(tiny.layout, "with-index:1", tag=images.TAG)
    with Node(run_root / "an-push") as pusher:
        pusher.clipshim("index", reference, pusher.directory / "it.clip")
        pusher.clipshim("push", pusher.directory / "it.clip", reference)
    return reference


@pytest.fixture(scope="module")
def podman(run_root: Path, target: Target, archives: list[Path]) -> Iterator[Podman]:
    """podman with the empty image."""
    with loaded(Podman(run_root / "an-p", target), archives[:1]) as engine:
        yield engine


@pytest.fixture(scope="module")
def containerd(run_root: Path, target: Target, archives: list[Path]) -> Iterator[Containerd]:
    """containerd with the empty image by both names, and a pause image that is not empty."""
    engine = Containerd(run_root / "an-c", target)
    try:
        pause = engine.directory / "pause.tar"
        images.convert(images.tiny_image("sleep 1000000"), f"docker-archive:{pause}", name=PAUSE)
        for archive in (*archives, pause):
            engine("images", "import", archive)
        yield engine
    finally:
        engine.close()


@pytest.fixture(autouse=True)
def nothing_is_left(node: Node) -> Iterator[None]:
    """Whatever happened to a container, it leaves nothing of clipshim's."""
    yield
    uppers = node.state_dir / "upper"

    def nothing() -> bool:
        states = list(node.run_dir.glob("*/state.json")) + list(node.run_dir.glob("*/lock"))
        return not (states or node.container_mounts() or (uppers.exists() and os.listdir(uppers)))

    wait_for("no mount, state or upper directory of a container is left", nothing)


def podman_run(podman: Podman, key: str, value: str, **options: bool) -> str:
    arguments = ["run", "--rm", *podman.common(), "--annotation", f"{key}={value}", EMPTY]
    done = podman.run(*arguments, "cat", "/etc/group", **options)
    return done.stdout.strip() if done.returncode == 0 else done.stderr


def ctr_run(containerd: Containerd, *options: str, check: bool = True) -> str:
    name = f"c{next(_NUMBERS)}"
    done = containerd.run(
        "run", "--rm", "--runc-binary", str(containerd.target.runtime),
        "--runc-root", f"{containerd.directory}/ctr-runtime",
        "--cgroup", f"{cgroup_parent()}/{name}-{os.urandom(3).hex()}", *options,
        EMPTY, name, "cat", "/etc/group", check=check,
    )  # fmt: skip
    return done.stdout.strip() if done.returncode == 0 else done.stderr


def test_podman_by_image_in_the_local_store(podman: Podman, tiny_reference: str) -> None:
    assert podman_run(podman, IMAGE, tiny_reference) == GROUPS


def test_podman_by_image_whose_index_is_in_the_registry(podman: Podman, pushed: str) -> None:
    assert podman_run(podman, IMAGE, pushed) == GROUPS


def test_podman_by_index_file_and_by_digest(podman: Podman, clip: Path) -> None:
    assert podman_run(podman, INDEX, str(clip)) == GROUPS
    digest = hashlib.sha256(clip.read_bytes()).hexdigest()
    assert podman_run(podman, INDEX, f"sha256:{digest}") == GROUPS


def test_podman_exec_copy_volumes_and_restart(
    podman: Podman, tiny_reference: str, tmp_path: Path
) -> None:
    (tmp_path / "f").write_text("bound\n")
    name = podman.start_container(
        "-d", "-v", f"{tmp_path}:/usr/bin", "--annotation", f"{IMAGE}={tiny_reference}", EMPTY,
        "sleep", "100000",
    )  # fmt: skip
    try:
        assert podman("exec", name, "cat", "/usr/bin/f", "/etc/group") == f"bound\n{GROUPS}"
        podman("cp", tmp_path / "f", f"{name}:/etc/copied")
        assert podman("exec", name, "cat", "/etc/copied") == "bound"
        podman("restart", "-t", "0", name)
        assert podman("exec", name, "cat", "/etc/copied", "/etc/group") == f"bound\n{GROUPS}"
        assert "A /etc/copied" in podman("diff", name).splitlines()
    finally:
        podman("rm", "-f", "-t", "0", name)


def test_podman_restarts_with_a_user_namespace(podman: Podman, tiny_reference: str) -> None:
    name = podman.start_container(
        "-d", "--uidmap=0:100000:65536", "--gidmap=0:100000:65536",
        "--annotation", f"{IMAGE}={tiny_reference}", EMPTY, "sleep", "100000",
    )  # fmt: skip
    try:
        podman("exec", name, "sh", "-c", "echo kept >/etc/new")
        podman("restart", "-t", "0", name)
        shown = podman("exec", name, "sh", "-c", "cat /etc/new; stat -c %u /etc/new /etc/group")
        assert shown.split() == ["kept", "0", "0"]
        assert "A /etc/new" in podman("diff", name).splitlines()
    finally:
        podman.remove(name)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (IMAGE, FOREIGN, "registry registry.example.com is not allowed"),
        (IMAGE, "oci:/etc", "containers may name registries only"),
        (INDEX, "/etc/passwd", "expected a file in one of index_dirs"),
        (INDEX, "../../x.clip", "expected a digest, a file name in the bundle"),
        (INDEX, f"sha256:{'0' * 64}", "0" * 64),
    ],
    ids=["registry", "local", "file", "parent", "digest"],
)
def test_podman_shows_a_refusal(podman: Podman, key: str, value: str, message: str) -> None:
    assert message in podman_run(podman, key, value, check=False)
    assert podman("ps", "-aq") == ""


def test_podman_without_annotation_runs_the_image_itself(podman: Podman) -> None:
    done = podman.run("run", "--rm", *podman.common(), EMPTY, "cat", "/etc/group", check=False)
    assert done.returncode == 127
    assert "cat" in done.stderr


def test_ctr_by_image_and_by_index(containerd: Containerd, clip: Path, tiny_reference: str) -> None:
    assert ctr_run(containerd, "--annotation", f"{IMAGE}={tiny_reference}") == GROUPS
    assert ctr_run(containerd, "--annotation", f"{INDEX}={clip}") == GROUPS


def test_ctr_shows_a_refusal(containerd: Containerd) -> None:
    text = ctr_run(containerd, "--annotation", f"{IMAGE}={FOREIGN}", check=False)
    assert "registry registry.example.com is not allowed" in text
    assert "allowed_registries" in text, "what to do next"
    assert containerd("tasks", "ls", "-q") == ""


def lazily_run(node: Node) -> int:
    """How many containers have a rootfs of clipshim's."""
    return len(node.call("status")["containers"])


@pytest.mark.parametrize("annotated", ["container", "pod", "name"])
def test_a_pods_container(
    containerd: Containerd, node: Node, tiny_reference: str, annotated: str
) -> None:
    """The pause container stays an ordinary one, even in a pod that has the annotation."""
    annotations = {IMAGE: tiny_reference}
    image = tiny_reference if annotated == "name" else EMPTY
    node.start()
    with Cri(containerd.socket) as cri:
        for name in (image, PAUSE):
            wait_for(f"{name} is known", functools.partial(cri.knows_image, name))
        sandbox, config = cri.run_sandbox(
            f"pod-{annotated}", containerd.target.name, cgroup_parent(),
            annotations if annotated == "pod" else None,
        )  # fmt: skip
        try:
            wait_for("no container is lazy", lambda: lazily_run(node) == 0)
            container = cri.create(
                sandbox, config, "app", image, ["sleep", "100000"],
                annotations if annotated == "container" else None,
            )  # fmt: skip
            cri.start(container)
            assert cri.status(container)[0] == RUNNING
            assert cri.exec(container, ["cat", "/etc/group"]) == (0, f"{GROUPS}\n")
            assert lazily_run(node) == 1
            cri.remove(container)
        finally:
            cri.remove_sandbox(sandbox)


def test_a_pods_container_that_is_refused(containerd: Containerd) -> None:
    with Cri(containerd.socket) as cri:
        for name in (EMPTY, PAUSE):
            wait_for(f"{name} is known", functools.partial(cri.knows_image, name))
        sandbox, config = cri.run_sandbox("refused", containerd.target.name, cgroup_parent())
        try:
            container = cri.create(
                sandbox, config, "app", EMPTY, ["sleep", "100000"], {IMAGE: FOREIGN}
            )
            with pytest.raises(grpc.RpcError, match=r"registry registry\.example\.com is not"):
                cri.start(container)
            cri.remove(container)
        finally:
            cri.remove_sandbox(sandbox)


def test_a_pods_container_that_names_nothing_is_an_ordinary_one(containerd: Containerd) -> None:
    """Its image's name has no index in the local store: the image itself runs."""
    with Cri(containerd.socket) as cri:
        wait_for(f"{PAUSE} is known", functools.partial(cri.knows_image, PAUSE))
        sandbox, config = cri.run_sandbox("ordinary", containerd.target.name, cgroup_parent())
        try:
            container = cri.create(sandbox, config, "app", PAUSE, ["sleep", "100000"])
            cri.start(container)
            assert cri.exec(container, ["cat", "/etc/group"]) == (0, f"{GROUPS}\n")
            cri.remove(container)
        finally:
            cri.remove_sandbox(sandbox)

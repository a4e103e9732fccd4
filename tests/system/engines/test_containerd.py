"""containerd, by ctr and through its CRI plugin as a kubelet would."""

from __future__ import annotations

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.support import images
from tests.support.containerd_engine import PAUSE, Containerd
from tests.support.cri import EXITED, RUNNING, Cri
from tests.support.engine import cgroup_parent
from tests.support.images import PYTHON_LINE
from tests.support.node import wait_for
from tests.system.engines.conftest import IMAGE, ORDINARY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.engine import Target

pytestmark = pytest.mark.engine
AT_ONCE = 10
_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def containerd(run_root: Path, target: Target, archives: list[Path]) -> Iterator[Containerd]:
    """containerd with the images imported where Kubernetes has its own."""
    engine = Containerd(run_root / f"containerd-{target.name}", target)
    try:
        pause = engine.directory / "pause.tar"
        images.convert(images.tiny_image("sleep 1000000"), f"docker-archive:{pause}", name=PAUSE)
        for archive in [*archives, pause]:
            engine("images", "import", archive)
        yield engine
        wait_for("no container mount is left", lambda: not target.container_mounts())
    finally:
        engine.close()


def ctr_run(
    containerd: Containerd, image: str, *command: str, options: tuple[str, ...] = ()
) -> str:
    name = f"c{next(_NUMBERS)}"
    return containerd(
        "run", "--rm", *options, "--runc-binary", str(containerd.target.runtime),
        "--runc-root", f"{containerd.directory}/ctr-runtime",
        "--cgroup", f"{cgroup_parent()}/{name}-{os.urandom(3).hex()}", image, name, *command,
    )  # fmt: skip


def test_ctr_runs_the_image(containerd: Containerd) -> None:
    assert ctr_run(containerd, IMAGE, "python3", "-c", PYTHON_LINE) == "lazy [1]"


def test_ctr_runs_several_at_once(containerd: Containerd) -> None:
    def one(number: int) -> str:
        return ctr_run(containerd, IMAGE, "python3", "-c", f"print({number} * 2)")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert list(pool.map(one, range(AT_ONCE))) == [str(2 * i) for i in range(AT_ONCE)]


def test_an_ordinary_image_runs_as_ever(containerd: Containerd) -> None:
    assert ctr_run(containerd, ORDINARY, "sh", "-c", "echo $(id -u) on") == "0 on"


@pytest.mark.parametrize("way", ["stub", "ordinary", "annotation"])
def test_a_user_namespace(containerd: Containerd, request: pytest.FixtureRequest, way: str) -> None:
    """containerd 2 mounts the layers with shifted owners, where they are gone afterwards."""
    if "containerd/v2" not in containerd("--version"):
        return  # older ones copy the layers, to where the container's root may not enter
    options = ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536", "--remap-labels"]
    if way == "annotation" and containerd.target.node is not None:
        reference = request.getfixturevalue("debian_reference")
        containerd.target.node.clipshim("index", reference)
        options += ["--annotation", f"io.clipshim.image={reference}"]
    image = IMAGE if way == "stub" else ORDINARY
    script = "id -u; stat -c %u:%g /etc/passwd /bin/sh; echo x >/etc/passwd; echo y >/new; ls /new"
    out = ctr_run(containerd, image, "sh", "-c", script, options=tuple(options))
    assert out.split() == ["0", "0:0", "0:0", "/new"]


def test_a_pod_as_a_kubelet_runs_it(containerd: Containerd) -> None:
    with Cri(containerd.socket) as cri:
        for image in (IMAGE, PAUSE):
            wait_for(f"{image} is known", functools.partial(cri.knows_image, image))
        sandbox, config = cri.run_sandbox("pod", containerd.target.name, cgroup_parent())
        try:
            container = cri.create(sandbox, config, "app", IMAGE, ["sleep", "100000"])
            cri.start(container)
            assert cri.status(container)[0] == RUNNING
            assert cri.exec(container, ["python3", "-c", PYTHON_LINE]) == (0, "lazy [1]\n")
            assert cri.exec(container, ["sh", "-c", "exit 3"])[0] == 3
            cri.remove(container)
            short = cri.create(sandbox, config, "short", IMAGE, ["sh", "-c", "exit 5"])
            cri.start(short)
            wait_for("it has ended", lambda: cri.status(short)[0] == EXITED)
            assert cri.status(short)[1] == 5
            cri.remove(short)
        finally:
            cri.remove_sandbox(sandbox)


def test_a_container_that_names_the_full_image_in_an_annotation(
    containerd: Containerd, debian_reference: str
) -> None:
    """No stub: an ordinary image's container is given the tree by its annotation."""
    node = containerd.target.node
    if node is None:
        return  # plain runc knows no such annotation: nothing to prove there
    node.clipshim("index", debian_reference)
    with Cri(containerd.socket) as cri:
        for image in (ORDINARY, PAUSE):
            wait_for(f"{image} is known", functools.partial(cri.knows_image, image))
        sandbox, config = cri.run_sandbox("annotated", containerd.target.name, cgroup_parent())
        try:
            annotations = {"io.clipshim.image": debian_reference}
            container = cri.create(
                sandbox, config, "app", ORDINARY, ["sleep", "100000"], annotations
            )
            cri.start(container)
            assert cri.exec(container, ["python3", "-c", PYTHON_LINE]) == (0, "lazy [1]\n")
            cri.remove(container)
        finally:
            cri.remove_sandbox(sandbox)

"""Bundles: those of `clipshim bundle` and the samples run as they stand."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from clipshim.errors import IndexFormatError
from clipshim.index.model import open_index
from tests.support.images import debian_root
from tests.support.skips import kernel_cannot

if TYPE_CHECKING:
    from types import ModuleType

    from tests.support.node import Node

SAMPLES = Path(__file__).resolve().parents[2] / "bundles"
CONTENT_SECTIONS = ("image", "layers", "tree", "spans")


def run_bundle(node: Node, bundle: Path, name: str) -> str:
    """What the container prints; it and its mounts must be gone afterwards."""
    before = (bundle / "config.json").read_text()
    done = node.clipshim("run", "--bundle", bundle, name)
    assert (bundle / "config.json").read_text() == before
    assert node.container_mounts() == []
    return done.stdout


def bundled(node: Node, source: str | Path, *arguments: str) -> dict[str, Any]:
    """config.json of a fresh bundle `b` of the node."""
    shutil.rmtree(node.directory / "b", ignore_errors=True)
    node.clipshim("bundle", source, node.directory / "b", *arguments)
    spec: dict[str, Any] = json.loads((node.directory / "b" / "config.json").read_text())
    return spec


def test_a_bundle_runs_as_it_stands(node: Node, debian_clip: Path) -> None:
    bundled(node, debian_clip)
    assert run_bundle(node, node.directory / "b", "as-it-stands").startswith("lazy ")


def test_a_bundle_runs_after_it_was_moved(node: Node, debian_clip: Path) -> None:
    spec = bundled(node, debian_clip, "--", "/bin/sh", "-c", "echo $APP; pwd")
    assert spec["annotations"]["io.clipshim.index"] == "index.clip"
    (node.directory / "b").rename(node.directory / "elsewhere")
    assert run_bundle(node, node.directory / "elsewhere", "moved").split() == ["1", "/app"]


def test_a_bundle_of_an_image_is_indexed_on_the_way(node: Node, tiny_reference: str) -> None:
    bundled(node, tiny_reference, "--", "/bin/sh", "-c", "echo started")
    assert run_bundle(node, node.directory / "b", "on-the-way") == "started\n"


def test_a_user_by_name_has_its_numbers_and_groups(node: Node, debian_clip: Path) -> None:
    spec = bundled(node, debian_clip, "--user", "www-data", "--", "/bin/sh", "-c", "id -u; id -G")
    for line in (debian_root() / "etc/passwd").read_text().splitlines():
        if line.startswith("www-data:"):
            uid, gid = line.split(":")[2:4]
            break
    else:
        pytest.fail("the image has no www-data")
    assert spec["process"]["user"]["uid"] == int(uid)
    assert run_bundle(node, node.directory / "b", "by-name").split() == [uid, gid]


def test_an_unknown_user_is_an_error_that_leaves_no_bundle(node: Node, debian_clip: Path) -> None:
    done = node.clipshim(
        "bundle", debian_clip, node.directory / "b", "--user", "nobody-at-all", check=False
    )
    assert done.returncode == 1
    assert "nobody-at-all" in done.stderr
    assert not (node.directory / "b").exists()


def test_a_bundle_is_not_replaced_without_being_asked(node: Node, debian_clip: Path) -> None:
    bundled(node, debian_clip)
    again = node.clipshim("bundle", debian_clip, node.directory / "b", check=False)
    assert again.returncode == 2
    assert "--force" in again.stderr
    node.clipshim(
        "bundle", debian_clip, node.directory / "b", "--force", "--entrypoint", "/bin/true"
    )


def test_the_network_of_the_host_on_request(node: Node, debian_clip: Path) -> None:
    bundled(node, debian_clip, "--host-network", "--", "readlink", "/proc/self/ns/net")
    shown = run_bundle(node, node.directory / "b", "network").strip()
    assert shown == os.readlink("/proc/self/ns/net")


@pytest.fixture
def samples(node: Node) -> Path:
    """A copy of the sample bundles, which running writes to."""
    if platform.machine() != "x86_64":
        kernel_cannot("run x86-64 programs: the samples are for that machine")
    copy = node.directory / "bundles"
    shutil.copytree(SAMPLES, copy)
    return copy


def test_the_samples_run_as_they_stand(node: Node, samples: Path) -> None:
    hello = "Hello from a container whose image was never unpacked.\n"
    assert run_bundle(node, samples / "hello", "hello") == hello
    counted = "".join(f"{number:04}\n" for number in range(1, 11))
    assert run_bundle(node, samples / "counter", "one") == counted
    assert run_bundle(node, samples / "counter", "two") == counted, "what was written was kept"


def sample_maker() -> ModuleType:
    """bundles/make.py."""
    spec = importlib.util.spec_from_file_location("clipshim_samples", SAMPLES / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_samples_are_what_their_script_makes(tmp_path: Path) -> None:
    maker = sample_maker()
    for sample in maker.samples():
        maker.make_bundle(sample, tmp_path / sample.name)
        made, kept = tmp_path / sample.name, SAMPLES / sample.name
        assert (made / "config.json").read_text() == (kept / "config.json").read_text()
        # The contents, not the file: another zstd may compress them to other bytes.
        try:
            open_index(kept / "index.clip").close()
        except IndexFormatError as exc:
            pytest.fail(f"the format has changed, run python bundles/make.py: {exc}")
        with open_index(made / "index.clip") as new, open_index(kept / "index.clip") as old:
            for name in CONTENT_SECTIONS:
                assert new.clip.section(name) == old.clip.section(name), name
        assert (kept / "index.clip").stat().st_size < 64 << 10

"""Names of layers that an engine had mounted with shifted owners for a moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from clipshim.shim import bundle, idmap

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("lower", "root"),
    [
        ("/home/overlay/id/mapped/0/l/ABC", "/home/overlay/id/mapped/0"),
        ("/mapped/1/overlay/id/mapped/12/l/ABC", "/mapped/1/overlay/id/mapped/12"),
        ("/home/overlay/l/ABC", ""),
        ("/home/overlay/id/mapped/0/diff", ""),
        ("/home/overlay/id/mapped/x/l/ABC", ""),
        ("/home/overlay/id/mapped", ""),
        ("", ""),
    ],
)
def test_the_root_of_mapped_layers(lower: str, root: str) -> None:
    assert idmap.mapped_root(lower) == root


def test_layers_that_are_there_need_nothing(tmp_path: Path) -> None:
    lower = tmp_path / "id/mapped/0/l/ABC"
    lower.mkdir(parents=True)
    assert idmap.mapped_root(str(lower)) == ""


@pytest.mark.parametrize(
    "linux",
    [
        {},
        {"uidMappings": []},
        {"uidMappings": [{"containerID": 0}]},
        {"uidMappings": [{"containerID": 0, "hostID": "x", "size": 1}]},
        {"uidMappings": "nonsense"},
        {"uidMappings": [{"containerID": 0, "hostID": -1, "size": 1}]},
        {"namespaces": [{"type": "user", "path": "/no/such/file"}]},
        {"namespaces": [{"type": "user", "path": 1}, "user"]},
        {"namespaces": 1},
    ],
)
def test_mappings_that_are_wrong_are_left_to_the_runtime(linux: dict[str, object]) -> None:
    assert idmap.user_namespace(bundle.Bundle("/b", {"linux": linux}, b"")) == -1

"""A few seconds of the soak, so that the long test is known to work when it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.soak import Plan, soak

if TYPE_CHECKING:
    from pathlib import Path


def test_a_short_soak_finds_nothing(run_root: Path) -> None:
    root = run_root / "soak"
    root.mkdir()
    counts = soak(root, Plan(8, 7, server_kills=2, containers=3, readers=3, image_count=1,
                             share=0.1))  # fmt: skip
    assert counts.failures == []
    assert counts.starts > 0

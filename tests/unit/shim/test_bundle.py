"""Replacing config.json."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from clipshim.errors import BundleError
from clipshim.shim import bundle

if TYPE_CHECKING:
    from pathlib import Path


def test_a_config_that_cannot_be_replaced_stays_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"root": {"path": "rootfs"}}')
    found = bundle.read_bundle(str(tmp_path))
    assert found is not None

    def full(_fd: int, _data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("clipshim.shim.bundle.os.write", full)
        with pytest.raises(BundleError, match="cannot be replaced"):
            found.set_root_path("/elsewhere")
    assert os.listdir(tmp_path) == ["config.json"]
    assert path.read_text() == '{"root": {"path": "rootfs"}}'
    found.set_root_path("/elsewhere")
    again = bundle.read_bundle(str(tmp_path))
    assert again is not None
    assert again.root_path == "/elsewhere"

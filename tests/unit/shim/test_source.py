"""Which index a bundle names; what a tenant may write there."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from clipshim.errors import NotFoundError, PolicyError
from clipshim.settings import Settings
from clipshim.shim import bundle, source

if TYPE_CHECKING:
    from pathlib import Path


def _bundle(directory: Path, annotations: dict[str, str] | None = None) -> bundle.Bundle:
    (directory / "rootfs").mkdir(parents=True, exist_ok=True)
    config = {"root": {"path": "rootfs"}, "annotations": annotations or {}, "future": {"x": 1.50}}
    (directory / "config.json").write_text(json.dumps(config))
    found = bundle.read_bundle(str(directory))
    assert found is not None
    return found


def _settings(directory: Path, *index_dirs: Path) -> Settings:
    return Settings(
        {"state_dir": f"{directory}/state", "index_dirs": [str(path) for path in index_dirs]}
    )


def test_nothing_named(tmp_path: Path) -> None:
    made = _bundle(tmp_path / "b")
    assert not source.names_index(made)
    assert source.find_source(made, _settings(tmp_path)) is None


@pytest.mark.parametrize(
    "key", ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"]
)
def test_a_sandbox_names_nothing(key: str, tmp_path: Path) -> None:
    made = _bundle(tmp_path / "b", {key: "sandbox", "io.clipshim.image": "x"})
    assert not source.names_index(made)


def test_an_image(tmp_path: Path) -> None:
    made = _bundle(tmp_path / "b", {"io.clipshim.image": "r.example/app:1"})
    assert source.names_index(made)
    found = source.find_source(made, _settings(tmp_path))
    assert found is not None
    assert found.request == {"image": "r.example/app:1", "engine_named": False}
    assert not found.is_optional


def test_the_cris_name_counts_only_with_a_local_store(tmp_path: Path) -> None:
    made = _bundle(tmp_path / "b", {"io.kubernetes.cri.image-name": "r.example/app:1"})
    settings = _settings(tmp_path)
    assert source.find_source(made, settings) is None
    os.makedirs(settings.index_store)
    (tmp_path / "state/indexes/names.json").write_text("{}")
    found = source.find_source(made, settings)
    assert found is not None
    assert found.is_optional


def test_a_file_in_an_allowed_directory(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    (allowed / "deep").mkdir(parents=True)
    (allowed / "deep/a.clip").write_text("index")
    made = _bundle(tmp_path / "b", {"io.clipshim.index": f"{allowed}/deep/../deep/a.clip"})
    found = source.find_source(made, _settings(tmp_path, allowed))
    assert found is not None
    assert os.pread(found.fd, 10, 0) == b"index"
    found.close()
    found.close()


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "{a}x/a.clip", "{a}/../secret", "{a}", "a/b", ".."]
)
def test_other_files_are_refused(name: str, tmp_path: Path) -> None:
    allowed = tmp_path / "a"
    allowed.mkdir()
    (tmp_path / "secret").write_text("s")
    value = name.replace("{a}", str(allowed))
    made = _bundle(tmp_path / "b", {"io.clipshim.index": value})
    with pytest.raises(PolicyError):
        source.find_source(made, _settings(tmp_path, allowed))


def test_links_lead_nowhere(tmp_path: Path) -> None:
    allowed = tmp_path / "a"
    allowed.mkdir()
    (tmp_path / "secret").write_text("s")
    (allowed / "link.clip").symlink_to(tmp_path / "secret")
    (allowed / "directory").symlink_to(tmp_path)
    for name in ("link.clip", "directory/secret"):
        made = _bundle(tmp_path / "b", {"io.clipshim.index": f"{allowed}/{name}"})
        with pytest.raises(PolicyError, match="beneath"):
            source.find_source(made, _settings(tmp_path, allowed))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    made = _bundle(tmp_path / "b", {"io.clipshim.index": "none.clip"})
    with pytest.raises(NotFoundError, match=r"none\.clip"):
        source.find_source(made, _settings(tmp_path))


def test_a_stub(tmp_path: Path) -> None:
    made = _bundle(tmp_path / "b")
    (tmp_path / "b/rootfs/.clip").mkdir()
    (tmp_path / "b/rootfs/.clip/index.clip").write_text("stub")
    assert source.names_index(made)
    found = source.find_source(made, _settings(tmp_path))
    assert found is not None
    assert found.is_stub
    assert os.pread(found.fd, 10, 0) == b"stub"
    found.close()


def test_replacing_the_root_keeps_unknown_fields(tmp_path: Path) -> None:
    made = _bundle(tmp_path / "b")
    path = tmp_path / "b/config.json"
    os.chmod(path, 0o640)
    before = json.loads(path.read_text())
    made.set_root_path("/new")
    after = json.loads(path.read_text())
    assert after["root"]["path"] == "/new"
    assert after["future"] == before["future"]
    assert "1.5" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o640
    bundle.restore_root_path(str(tmp_path / "b"), "/other", "rootfs", "")
    assert json.loads(path.read_text())["root"]["path"] == "/new"
    bundle.restore_root_path(str(tmp_path / "b"), "/new", "rootfs", "")
    assert json.loads(path.read_text()) == before
    assert sorted(os.listdir(tmp_path / "b")) == ["config.json", "rootfs"]


ODD_CONFIG = b"""{ "root" : {"path":"rootfs" , "readonly": false},
  "number": 1.50e3, "name": "\xc3\xa9\\u00e9\\/", "nothing": null
}
"""


def _rewritten(directory: Path, raw: bytes) -> tuple[Path, str]:
    """config.json of a bundle after clipshim has set root.path, and the file that keeps `raw`."""
    directory.mkdir()
    path, kept = directory / "config.json", str(directory / "kept")
    path.write_bytes(raw)
    made = bundle.read_bundle(str(directory))
    assert made is not None
    bundle.keep_original(kept, made.raw)
    made.set_root_path("/new")
    assert json.loads(path.read_bytes())["root"]["path"] == "/new"
    return path, kept


@pytest.mark.parametrize("raw", [ODD_CONFIG, b'{"a":1}', b'{"root":{}}\n'])
def test_config_is_restored_byte_for_byte(tmp_path: Path, raw: bytes) -> None:
    path, kept = _rewritten(tmp_path / "b", raw)
    bundle.restore_root_path(str(tmp_path / "b"), "/new", "rootfs", kept)
    assert path.read_bytes() == raw
    assert os.stat(kept).st_mode & 0o077 == 0, "it may hold secrets"


def test_what_others_changed_in_config_stays(tmp_path: Path) -> None:
    path, kept = _rewritten(tmp_path / "b", ODD_CONFIG)
    changed = json.loads(path.read_bytes()) | {"hostname": "changed"}
    path.write_text(json.dumps(changed))
    bundle.restore_root_path(str(tmp_path / "b"), "/new", "rootfs", kept)
    after = json.loads(path.read_bytes())
    assert (after["hostname"], after["root"]["path"]) == ("changed", "rootfs")


def test_a_damaged_copy_of_config_is_not_used(tmp_path: Path) -> None:
    path, kept = _rewritten(tmp_path / "b", ODD_CONFIG)
    for damaged in (b"", b"{", b"[]", b'{"root": 3}', ODD_CONFIG[:20]):
        (tmp_path / "b/kept").write_bytes(damaged)
        bundle.restore_root_path(str(tmp_path / "b"), "/new", "rootfs", kept)
        after = json.loads(path.read_bytes())
        assert (after["root"]["path"], after["nothing"]) == ("rootfs", None)
        again = bundle.read_bundle(str(tmp_path / "b"))
        assert again is not None
        again.set_root_path("/new")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\xff"])
def test_what_is_no_bundle_is_the_runtimes_to_refuse(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    assert bundle.read_bundle(str(tmp_path)) is None
    assert bundle.read_bundle(str(tmp_path / "missing")) is None

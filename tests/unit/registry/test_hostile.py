"""Answers made to break their reader: an error of ours or a value, never anything else."""

from __future__ import annotations

import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipshim.errors import ClipError
from clipshim.registry.access import RegistryAccess
from clipshim.registry.attempts import AttemptFailed
from clipshim.registry.manifests import choose_platform, parse_manifest
from clipshim.registry.mirrors import Endpoint
from clipshim.registry.platforms import Platform, platform_of, rank
from clipshim.registry.references import parse_reference
from clipshim.registry.replies import _retry_after_s
from clipshim.registry.sources import open_source
from clipshim.registry.tokens import Authorizer, _parse_token, parse_challenges
from tests.unit.registry.layouts import Layout, docker_archive, layer_tar

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = "sha256:" + "a" * 64
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=9)
)
KEYS = st.sampled_from(
    ["schemaVersion", "mediaType", "config", "layers", "manifests", "digest", "size", "platform",
     "urls", "annotations", "subject", "artifactType", "os", "architecture", "variant",
     "vnd.docker.reference.type"]
)  # fmt: skip
LEAVES = SCALARS | st.sampled_from(
    [DIGEST, "application/vnd.oci.image.manifest.v1+json", "linux", "amd64", "v8", 2]
)
DOCUMENTS = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=25,
)


@settings(deadline=None, max_examples=300)
@given(DOCUMENTS)
def test_any_json_is_a_manifest_or_an_error(document: Any) -> None:
    raw = json.dumps(document).encode()
    for parse in (
        lambda: parse_manifest(raw, "x"),
        lambda: choose_platform(raw, Platform("linux", "amd64"), "x"),
    ):
        try:
            parse()
        except ClipError:
            continue


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_an_error(raw: bytes) -> None:
    with pytest.raises(ClipError):
        parse_manifest(raw, "x")


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["os", "architecture", "variant"]), LEAVES))
def test_any_platform_has_a_name(fields: dict[str, Any]) -> None:
    found = platform_of(fields)
    assert str(found)
    assert rank(found, found) is not None


@settings(deadline=None)
@given(st.lists(st.text(max_size=60), max_size=3))
def test_any_challenge_is_taken_apart(headers: list[str]) -> None:
    for offer in parse_challenges([f"Bearer {header}" for header in headers]):
        assert offer.scheme in ("bearer", "basic")


@settings(deadline=None)
@given(st.text(max_size=60), st.binary(max_size=60))
def test_any_token_server_gives_a_clean_header_or_an_error(realm: str, answer: bytes) -> None:
    authorizer = Authorizer(RegistryAccess(anonymous=True))
    escaped = realm.replace("\\", "").replace('"', "")
    try:
        grant = authorizer.renew(
            Endpoint("https://r.io/v2", "r.io"),
            parse_reference("r.io/a"),
            "pull",
            [f'Bearer realm="https://{escaped}"'],
            None,
            lambda *_: (200, answer),
        )
    except AttemptFailed:
        return
    assert grant.header.isascii()
    assert grant.header.isprintable()


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 600, 1024, 1500, 3000])
def test_an_archive_cut_anywhere_is_an_error(tmp_path: Path, cut: int) -> None:
    layout = Layout(tmp_path / "layout")
    layout.tag(layout.image(layer_tar("a", b"a" * 5000)), "v1")
    for kind, whole in (
        ("oci-archive", layout.pack(tmp_path / "packed.tar")),
        ("docker-archive", docker_archive(tmp_path / "saved.tar", [layer_tar("a", b"a")], ["a:1"])),
    ):
        broken = tmp_path / f"{kind}-broken.tar"
        broken.write_bytes(whole.read_bytes()[:cut])
        with pytest.raises(ClipError):
            open_source(f"{kind}:{broken}", platform=None, access=RegistryAccess(anonymous=True))


def test_links_in_archives_lead_to_members_only(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as tar:
        for name, target in (
            ("manifest.json", str(secret)),
            ("index.json", f"../{secret.name}"),
            ("oci-layout", "oci-layout"),
        ):
            info = tarfile.TarInfo(name)
            info.type = tarfile.SYMTYPE
            info.linkname = target
            tar.addfile(info)
    for kind in ("docker-archive", "oci-archive"):
        with pytest.raises(ClipError, match="expected"):
            open_source(f"{kind}:{archive}", platform=None, access=RegistryAccess(anonymous=True))


@pytest.mark.parametrize(
    "listed",
    [7, None, [7], [[]], [{}], [{"digest": "sha256:../../../etc/passwd"}], [{"digest": 7}],
     [{"digest": DIGEST}], [{"digest": DIGEST, "annotations": 7}]],
)  # fmt: skip
def test_a_layout_with_a_broken_list_is_an_error(tmp_path: Path, listed: Any) -> None:
    (tmp_path / "oci-layout").write_text("{}")
    (tmp_path / "index.json").write_text(json.dumps({"manifests": listed}))
    for tag in ("", ":v1"):
        with pytest.raises(ClipError):
            open_source(
                f"oci:{tmp_path}{tag}", platform=None, access=RegistryAccess(anonymous=True)
            )


@pytest.mark.parametrize(
    "entries",
    [7, {}, [7], [], [{}], [{"Config": 7, "Layers": []}], [{"Config": "c", "Layers": 7}],
     [{"Config": "../c", "Layers": []}], [{"Config": "c", "Layers": ["x"], "RepoTags": 7}],
     [{"Config": "manifest.json", "Layers": []}]],
)  # fmt: skip
def test_a_docker_archive_with_a_broken_list_is_an_error(tmp_path: Path, entries: Any) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(entries))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "manifest.json", "manifest.json")
    for tag in ("", ":v1"):
        with pytest.raises(ClipError):
            open_source(
                f"docker-archive:{tmp_path}/a.tar{tag}",
                platform=None,
                access=RegistryAccess(anonymous=True),
            )


@pytest.mark.parametrize("value", ["\u00b2", "9" * 5000, "Fri, 99 Foo", "Mon, 01 Jan 99999"])
def test_a_wish_that_is_no_time_is_none_or_a_long_one(value: str) -> None:
    found = _retry_after_s(value)
    assert found is None or found > 0


def test_json_that_is_too_deep_is_an_error(tmp_path: Path) -> None:
    deep = b"[" * 200_000
    with pytest.raises(AttemptFailed):
        _parse_token(deep, 0.0, "r.io")
    path = tmp_path / "deep.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("manifest.json")
        info.size = len(deep)
        archive.addfile(info, io.BytesIO(deep))
    with pytest.raises(ClipError):
        open_source(f"docker-archive:{path}", platform=None, access=RegistryAccess(anonymous=True))

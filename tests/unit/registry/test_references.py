"""Names of images: what users write, what it means, and what they get told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipshim.errors import BadReferenceError
from clipshim.registry.references import (
    ArchiveReference,
    Reference,
    canonical_image,
    check_digest,
    is_loopback,
    parse_image,
    parse_reference,
    split_port,
)
from tests.unit.registry.layouts import Layout, docker_archive, layer_tar

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "canonical", "server"),
    [
        ("ubuntu", "docker.io/library/ubuntu:latest", "registry-1.docker.io"),
        ("ubuntu:22.04", "docker.io/library/ubuntu:22.04", "registry-1.docker.io"),
        ("bitnami/redis", "docker.io/bitnami/redis:latest", "registry-1.docker.io"),
        ("docker.io/ubuntu", "docker.io/library/ubuntu:latest", "registry-1.docker.io"),
        ("index.docker.io/a/b:c", "docker.io/a/b:c", "registry-1.docker.io"),
        ("registry-1.docker.io/ubuntu", "docker.io/library/ubuntu:latest", "registry-1.docker.io"),
        ("localhost/app", "localhost/app:latest", "localhost"),
        ("localhost:5000/app:1", "localhost:5000/app:1", "localhost:5000"),
        ("ghcr.io/a/b/c:v1", "ghcr.io/a/b/c:v1", "ghcr.io"),
        ("[::1]:5000/app", "[::1]:5000/app:latest", "[::1]:5000"),
        (f"quay.io/a@{DIGEST}", f"quay.io/a@{DIGEST}", "quay.io"),
        (f"quay.io/a:b@{DIGEST}", f"quay.io/a:b@{DIGEST}", "quay.io"),
        ("host_with:5000/a__b/c-d.e", "host_with:5000/a__b/c-d.e:latest", "host_with:5000"),
        ("docker://ubuntu", "docker.io/library/ubuntu:latest", "registry-1.docker.io"),
        ("oci:5000/app", "oci:5000/app:latest", "oci:5000"),
    ],
)
def test_names_are_normalised_as_docker_does(text: str, canonical: str, server: str) -> None:
    parsed = parse_image(text)
    assert isinstance(parsed, Reference)
    assert str(parsed) == canonical
    assert parsed.server == server
    assert str(parse_reference(canonical)) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "", "Ubuntu", "a/B", "ubuntu:", "ubuntu:a b", "ubuntu@sha256:12", "ubuntu@md5:ab",
        "https://ghcr.io/a", "a//b", "-a", "a/b/", "ghcr.io/", "a:b:c", "ho st.io/a", "a\nb",
        "ghcr.io/" + "a" * 300, "ubuntu:" + "x" * 129, "exa$mple.io/a", "\x00",
    ],
)  # fmt: skip
def test_bad_names_are_refused(text: str) -> None:
    with pytest.raises(BadReferenceError):
        parse_reference(text)


def test_an_upper_case_name_is_explained() -> None:
    with pytest.raises(BadReferenceError, match="lower case"):
        parse_reference("docker.io/Ubuntu")


@settings(deadline=None)
@given(st.text(max_size=80))
def test_any_text_gives_a_name_that_reads_back_or_an_error(text: str) -> None:
    try:
        parsed = parse_reference(text)
    except BadReferenceError:
        return
    assert parse_reference(str(parsed)) == parsed


@pytest.mark.parametrize("path", ["/srv/image", "./image", "../image", "~/image", ".", ".."])
def test_a_bare_path_is_never_a_reference(path: str) -> None:
    with pytest.raises(BadReferenceError, match="file-system path") as caught:
        parse_image(path)
    assert caught.value.hint is not None
    assert "oci:" in caught.value.hint


def test_the_hint_names_the_scheme_that_was_probably_meant(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.tag(layout.image(layer_tar("a", b"a")), "v1")
    packed = layout.pack(tmp_path / "packed.tar")
    saved = docker_archive(tmp_path / "saved.tar", [layer_tar("a", b"a")], ["a:1"])
    for path, scheme in ((layout.path, "oci"), (packed, "oci-archive"), (saved, "docker-archive")):
        with pytest.raises(BadReferenceError) as caught:
            parse_image(str(path))
        assert caught.value.hint is not None
        assert f"{scheme}:{path}" in caught.value.hint


def test_a_directory_of_the_same_name_does_not_hide_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ubuntu").mkdir()
    assert str(parse_image("ubuntu")) == "docker.io/library/ubuntu:latest"
    (tmp_path / "image.tar").write_bytes(b"")
    with pytest.raises(BadReferenceError):
        parse_image("image.tar")


def test_archives_are_taken_apart_at_the_existing_path(tmp_path: Path) -> None:
    path = tmp_path / "with:colon"
    path.mkdir()
    assert parse_image(f"oci:{path}") == ArchiveReference("oci", str(path), None)
    assert parse_image(f"oci:{path}:v1") == ArchiveReference("oci", str(path), "v1")
    file = tmp_path / "saved.tar"
    file.touch()
    assert parse_image(f"docker-archive:{file}:app:v1") == ArchiveReference(
        "docker-archive", str(file), "app:v1"
    )
    with pytest.raises(BadReferenceError):
        parse_image("oci-archive:")


def test_canonical_archives_have_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "layout").mkdir()
    assert canonical_image("oci:layout:v1") == f"oci:{tmp_path}/layout:v1"
    assert canonical_image("ubuntu") == "docker.io/library/ubuntu:latest"


def test_digests_and_hosts() -> None:
    assert check_digest(DIGEST) == DIGEST
    for bad in ("sha256:../../x", DIGEST.upper(), DIGEST + "0", ""):
        with pytest.raises(BadReferenceError):
            check_digest(bad)
    for host in ("localhost", "localhost:5000", "127.0.0.1:80", "127.9.9.9", "[::1]:5000"):
        assert is_loopback(host)
    for host in ("localhost.example.com", "127.0.0.1.example.com", "10.0.0.1", "::2"):
        assert not is_loopback(host)
    assert split_port("[::1]:5000") == ("[::1]", 5000)
    assert split_port("[::1]") == ("[::1]", None)
    assert split_port("host:80") == ("host", 80)


def test_versions() -> None:
    reference = parse_reference(f"a.io/b:c@{DIGEST}")
    assert reference.version == DIGEST
    assert parse_reference("a.io/b", default_tag=None).version == "latest"

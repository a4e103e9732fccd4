"""The local store of indexes."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING

import pytest

from clipshim.errors import BadReferenceError, NotFoundError, StoreError
from clipshim.node.images import ImageFacts, ImageNames
from clipshim.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def images(tmp_path: Path) -> ImageNames:
    return ImageNames(
        Settings({"state_dir": str(tmp_path / "state"), "run_dir": str(tmp_path / "run")})
    )


def add(images: ImageNames, path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with open(path, "rb") as file:
        return images.add(file.fileno())


def test_a_file_is_stored_under_its_digest_once(images: ImageNames, tmp_path: Path) -> None:
    digest = add(images, tmp_path / "a", b"index")
    assert digest == "sha256:" + hashlib.sha256(b"index").hexdigest()
    before = os.stat(images.path(digest)).st_ino
    assert add(images, tmp_path / "b", b"index") == digest
    assert os.stat(images.path(digest)).st_ino == before
    assert images.digests() == [digest]
    assert [name for name in os.listdir(images.directory) if name.startswith(".new")] == []


def test_only_regular_files_are_taken(images: ImageNames) -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(StoreError, match="regular file"):
            images.add(read)
    finally:
        os.close(read)
        os.close(write)


def test_images_are_found_by_every_form_of_their_name(images: ImageNames, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"index")
    stored = images.adopt(str(path), "ubuntu")
    digest = images.digests()[0]
    assert stored == images.path(digest)
    for name in ("ubuntu", "docker.io/library/ubuntu:latest", digest, digest[7:39]):
        assert images.find(name) == digest
    assert images.find("debian") is None
    assert images.find("sha256:" + "0" * 64) is None
    assert images.is_named(digest)


def test_a_name_moves_to_another_index_and_goes_with_it(images: ImageNames, tmp_path: Path) -> None:
    one, two = add(images, tmp_path / "1", b"1"), add(images, tmp_path / "2", b"2")
    images.name("app.example/x:1", one)
    images.name("app.example/x:1", two)
    assert images.find("app.example/x:1") == two
    images.remove(two)
    assert images.find("app.example/x:1") is None
    assert images.names() == {}
    images.remove(two)  # twice is once


def test_a_digest_that_is_a_path_is_refused(images: ImageNames) -> None:
    for digest in ("sha256:../../x", "../x", "sha256:" + "g" * 64, ""):
        with pytest.raises(BadReferenceError):
            images.path(digest)
    with pytest.raises(NotFoundError):
        images.existing_path("sha256:" + "0" * 64)


def test_a_damaged_name_file_is_an_error_that_says_which(
    images: ImageNames, tmp_path: Path
) -> None:
    add(images, tmp_path / "a", b"x")
    with open(f"{images.directory}/names.json", "w") as file:
        file.write("{")
    with pytest.raises(StoreError, match=r"names\.json"):
        images.names()


def test_facts_are_kept_and_those_of_another_version_ignored(
    images: ImageNames, tmp_path: Path
) -> None:
    digest = add(images, tmp_path / "a", b"x")
    assert images.facts(digest) is None
    facts = ImageFacts(digest[7:39], digest, "a.example/b:c", True, False, {"bin": "usr/bin"})
    images.keep_facts(facts)
    assert images.facts(digest) == facts
    path = images.path(digest).removesuffix(".clip") + ".facts"
    with open(path) as file:
        raw = json.load(file)
    with open(path, "w") as file:
        json.dump(raw | {"version": 99}, file)
    assert images.facts(digest) is None

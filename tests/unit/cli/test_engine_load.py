"""Loading stubs into engines: names, programs, errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from clipshim.cli.engine_load import load, same_registry, stub_name
from clipshim.errors import ClipError, NotFoundError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("registry.example.com/app:1.0", "registry.example.com/app:1.0-lazy"),
        ("localhost:5000/app", "localhost:5000/app:latest-lazy"),
        ("ubuntu", "docker.io/library/ubuntu:latest-lazy"),
        ("a.example/app:1@sha256:" + "0" * 64, "a.example/app:1-lazy"),
        ("oci:/srv/My Image:v2", "localhost/my-image:v2-lazy"),
        ("docker-archive:/srv/app.tar", "localhost/app-tar:latest-lazy"),
    ],
)
def test_a_stub_is_named_after_its_image(reference: str, name: str) -> None:
    assert stub_name(reference) == name


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a.example/x", "a.example/y:1", True),
        ("a.example/x", "b.example/x", False),
        ("a.example/x", "a.example:5000/x", False),
        ("oci:/srv/image", "a.example/x", False),
        ("ubuntu", "docker.io/me/app", True),
    ],
)
def test_a_log_in_is_for_one_registry(one: str, other: str, same: bool) -> None:
    assert same_registry(one, other) is same


def write(path: Path, kind: str) -> None:
    path.write_text(kind)


def engine_program(directory: Path, name: str, *, fails: bool = False) -> None:
    """A program that keeps its arguments and the archive, or fails with a message."""
    program = directory / name
    body = 'echo "the engine is asleep" >&2; exit 1' if fails else (
        f'printf "%s\\n" "$@" >{directory}/arguments; for last; do :; done; '
        f'cp "$last" {directory}/archive'
    )  # fmt: skip
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("engine", "program", "first", "kind"),
    [
        ("docker", "docker", "load", "docker-archive"),
        ("podman", "podman", "load", "docker-archive"),
        ("containerd", "ctr", "images", "oci-archive"),
    ],
)
def test_each_engine_loads_with_its_own_program(
    engine: str,
    program: str,
    first: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    engine_program(tmp_path, program)
    load(engine, write)
    assert (tmp_path / "arguments").read_text().split()[0] == first
    assert (tmp_path / "archive").read_text() == kind


def test_a_missing_engine_is_an_error_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotFoundError) as caught:
        load("docker", write)
    assert "-o FILE" in (caught.value.hint or "")


def test_what_an_engine_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    engine_program(tmp_path, "docker", fails=True)
    with pytest.raises(ClipError, match="the engine is asleep"):
        load("docker", write)

"""What is guessed of a program's first reads."""

from __future__ import annotations

import hashlib
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from clipshim.index.span_table import Span, SpanTable
from clipshim.lazy.first_reads import PART, WHOLE_FILE, first_spans
from tests.support.tar_layers import directory, layer, link, member, tree_of

if TYPE_CHECKING:
    from clipshim.index.erofs_read import ErofsImage

SPAN = 4096
LIBRARIES = "usr/lib/x86_64-linux-gnu"


def table_of(data: bytes) -> SpanTable:
    """A table of a plain layer with a span each SPAN bytes."""
    spans = []
    for start in range(0, len(data), SPAN):
        piece = data[start : start + SPAN]
        digest = hashlib.sha256(piece).digest()
        spans.append(Span(start, len(piece), start, len(piece), 0, None, digest, "plain", 0))
    return SpanTable("none", len(data), len(data), spans)


def symlink(name: str, target: str) -> bytes:
    """A symbolic link."""
    return link(name, target, kind=tarfile.SYMTYPE)


def contents(spans: list[tuple[int, int]], *layers: bytes) -> bytes:
    """The bytes of spans, put together."""
    return b"".join(layers[number][span * SPAN : (span + 1) * SPAN] for number, span in spans)


def guess(config: dict[str, Any], *layers: bytes) -> bytes:
    """The bytes that are guessed."""
    tree: ErofsImage = tree_of(*layers)
    spans = first_spans(tree, {"config": config}, [table_of(data) for data in layers])
    assert len(spans) == len(set(spans))
    return contents(spans, *layers)


def mark(name: str, size: int = 5 * SPAN) -> bytes:
    """A file's contents: begins and ends with marks, and has one where no other file's span is."""
    first, middle, last = (f"<{name} {place}>".encode() for place in ("begins", "goes on", "ends"))
    half = size // 2
    return first + bytes(half - len(first)) + middle + bytes(half - len(middle + last)) + last


def image() -> bytes:
    """A layer with a program, the loader and the C library as Debian has them."""
    return layer(
        directory("etc/"),
        member("etc/group", mark("group")),
        member("etc/ld.so.cache", mark("cache")),
        member("etc/passwd", mark("passwd")),
        symlink("lib", "usr/lib"),
        symlink("lib64", "/usr/lib64"),
        directory("usr/bin/"),
        member("usr/bin/other", mark("other")),
        member("usr/bin/program3.1", mark("program"), mode=0o755),
        symlink("usr/bin/program", "program3.1"),
        directory(f"{LIBRARIES}/"),
        member(f"{LIBRARIES}/ld-linux-x86-64.so.2", mark("loader")),
        member(f"{LIBRARIES}/libc.so.6", mark("libc")),
        member(f"{LIBRARIES}/libz.so.1", mark("libz")),
        directory("usr/lib64/"),
        symlink("usr/lib64/ld-linux-x86-64.so.2", f"/{LIBRARIES}/ld-linux-x86-64.so.2"),
    )


@pytest.mark.parametrize(
    "config",
    [
        {"Cmd": ["program"]},
        {"Entrypoint": ["/usr/bin/program"], "Cmd": ["other"]},
        {"Entrypoint": None, "Cmd": ["program", "x"], "Env": ["A=1", "PATH=/nowhere:/usr/bin"]},
        {"Cmd": ["/lib/../bin/.//program"]},
    ],
)
def test_program_loader_and_library_are_found_through_links(config: dict[str, Any]) -> None:
    guessed = guess(config, image())

    for name in (b"passwd", b"group", b"program", b"loader", b"cache", b"libc"):
        for place in (b"begins", b"goes on", b"ends"):
            assert b"<%s %s>" % (name, place) in guessed
    for name in (b"other", b"libz"):
        assert b"<%s goes on>" % name not in guessed


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"Cmd": []},
        {"Cmd": "program"},
        {"Cmd": [1, None, ["program"]]},
        {"Cmd": ["missing"]},
        {"Cmd": ["/etc"]},
        {"Cmd": ["/usr/bin/program/x"]},
        {"Cmd": ["program"], "Env": ["PATH=:relative:/" + "x" * 300]},
        {"Cmd": ["\ud800"]},
        {"Cmd": ["../" * 2000]},
    ],
)
def test_a_configuration_that_names_no_program_leaves_the_rest(config: dict[str, Any]) -> None:
    guessed = guess(config, image())

    assert b"<program goes on>" not in guessed
    assert b"<libc goes on>" in guessed


def test_whatever_a_configuration_is_nothing_fails() -> None:
    data = image()
    configs: list[dict[str, Any]] = [
        {},
        {"config": None},
        {"config": []},
        {"config": {"Env": 1, "Cmd": ["x"]}},
    ]
    for config in configs:
        assert first_spans(tree_of(data), config, [table_of(data)])


def test_links_that_lead_in_circles_lead_nowhere() -> None:
    circle = layer(symlink("a", "b"), symlink("b", "/a"), symlink("c", "c/c"))

    for name in ("/a", "/c", "/c/d"):
        assert guess({"Cmd": [name]}, circle) == b""


def test_of_a_large_program_only_both_ends_are_fetched() -> None:
    data = layer(member("large", mark("large", WHOLE_FILE + (1 << 20))))

    guessed = guess({"Cmd": ["/large"]}, data)

    assert b"<large begins>" in guessed
    assert b"<large ends>" in guessed
    assert b"<large goes on>" not in guessed
    assert 2 * PART <= len(guessed) <= 2 * PART + 4 * SPAN


def test_files_are_found_in_the_layers_that_they_lie_in() -> None:
    lower, upper = image(), layer(directory("etc/"), member("etc/passwd", mark("new")))

    guessed = guess({"Cmd": ["program"]}, lower, upper)

    assert b"<new goes on>" in guessed
    assert b"<passwd goes on>" not in guessed
    assert b"<program goes on>" in guessed

"""Opening an index: contradictions between its parts are refused, whatever the checksums say."""

from __future__ import annotations

import json
import os
import random
from typing import TYPE_CHECKING, Any

import pytest

from clipshim.errors import ClipError, IndexFormatError
from clipshim.index.builder import BuildOptions, build_index
from clipshim.index.clip_format import ClipFile, write_clip
from clipshim.index.model import Index, layer_key, open_index
from clipshim.index.span_table import SpanTable
from tests.unit.index.samples import Source, deflate, every_encoding, tar, text, zstd

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from clipshim.index.clip_format import BinarySource, Compression

SMALL = BuildOptions(spacing=64 << 10)


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The raw sections of a sound index of two layers, self-contained."""
    path = tmp_path_factory.mktemp("model") / "sound.clip"
    tars = [tar(1), tar(2)]
    options = BuildOptions(spacing=64 << 10, embed=True)
    build_index(Source([deflate(tars[0]), zstd(tars[1])], tars), path, options)
    with ClipFile.open(path) as clip:
        return {
            name: clip.pread(clip.entry(name).offset, clip.entry(name).stored_size)
            if name.startswith("blob")
            else clip.section(name)
            for name in clip.names
        }


def rewrite(path: Path, sections: dict[str, bytes]) -> Path:
    """An index of these sections, with all checksums right."""
    plain = ("windows", "blob")
    listed: list[tuple[str, bytes | BinarySource, Compression]] = [
        (name, data, "none" if name.startswith(plain) else "zstd")
        for name, data in sections.items()
    ]
    write_clip(path, listed)
    return path


def refused(path: Path, sections: dict[str, bytes], match: str | None = None) -> None:
    with pytest.raises(IndexFormatError, match=match):
        open_index(rewrite(path / "bad.clip", sections))


def test_sound_sections_open(tmp_path: Path, sections: dict[str, bytes]) -> None:
    with open_index(rewrite(tmp_path / "good.clip", sections)) as index:
        assert index.has_blobs
        assert len(index.layers) == 2
        for i, layer in enumerate(index.layers):
            assert layer.key == layer_key(layer.diff_id, index.span_table(i).pack())
            fd, offset, size = index.blob(i)
            assert os.pread(fd, size, offset) == sections[f"blob.{i}"]


def test_an_fd_opens_as_well_and_stays_the_callers(
    tmp_path: Path, sections: dict[str, bytes]
) -> None:
    path = rewrite(tmp_path / "good.clip", sections)
    fd = os.open(path, os.O_RDONLY)
    try:
        with open_index(fd) as by_fd, open_index(path) as by_path:
            assert by_fd.digest == by_path.digest
        os.fstat(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", ["image", "layers", "tree", "spans", "windows", "blob.0"])
def test_a_missing_section_is_refused(
    tmp_path: Path, sections: dict[str, bytes], name: str
) -> None:
    refused(tmp_path, {key: data for key, data in sections.items() if key != name})


@pytest.mark.parametrize("name", ["image", "layers", "profile"])
@pytest.mark.parametrize("data", [b"", b"1", b"nonsense", b"[" * 200_000, b"\xff\xfe", b'"x"'])
def test_sections_that_are_not_the_right_json_are_refused(
    tmp_path: Path, sections: dict[str, bytes], name: str, data: bytes
) -> None:
    refused(tmp_path, {**sections, name: data})


IMAGE_LIES: dict[str, Any] = {
    "reference": ["", 1, None, "x\ny", "\ud800", "x" * 5000],
    "manifest_digest": ["", 1, None, "sha256:12", "../../etc", "sha256:" + "A" * 64],
    "platform": ["", 1, None, "linux", "linux/../..", "linux/amd64/v8/x"],
    "config": [1, None, {}, "", "1", "\ud800", "[" * 200_000],
}


@pytest.mark.parametrize("field", IMAGE_LIES)
def test_unusable_image_facts_are_refused(
    tmp_path: Path, sections: dict[str, bytes], field: str
) -> None:
    image = json.loads(sections["image"])
    for value in IMAGE_LIES[field]:
        if field == "reference" and value == "":
            continue
        refused(
            tmp_path, {**sections, "image": json.dumps({**image, field: value}).encode()}, "image"
        )


LAYER_LIES: dict[str, list[Any]] = {
    "diff_id": ["", 1, None, "../../../etc/passwd", "sha256:" + "g" * 64],
    "blob_digest": ["", 1, None, "md5:12"],
    "media_type": [1, None, "x" * 9000, "a\nb", "\ud800"],
    "blob_size": [-1, None, "1", 1.5, True, 1 << 63, 10**400, 0],
    "size": [-1, None, "1", 1.5, True, 1 << 63, 10**400, 0],
    "compression": ["zip", None, 1, "none", []],
    "urls": ["x", 1, None, [1], ["\n"], {}],
    "spans_size": [-1, 0, None, 1, 1 << 40],
    "windows_size": [-1, None, 1, 1 << 40],
}


@pytest.mark.parametrize("field", LAYER_LIES)
def test_unusable_layer_facts_are_refused(
    tmp_path: Path, sections: dict[str, bytes], field: str
) -> None:
    layers = json.loads(sections["layers"])
    for value in LAYER_LIES[field]:
        lies = [{**layers[0], field: value}, layers[1]]
        refused(tmp_path, {**sections, "layers": json.dumps(lies).encode()})


CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], None]] = {
    "one layer less": lambda found: found["layers"].pop(),
    "one layer more": lambda found: found["layers"].append(found["layers"][0]),
    "layers swapped": lambda found: found["layers"].reverse(),
    "layers that are no objects": lambda found: found["layers"].append(1),
}


@pytest.mark.parametrize("lie", CONTRADICTIONS)
def test_parts_of_different_images_are_refused(
    tmp_path: Path, sections: dict[str, bytes], lie: str
) -> None:
    found = {"layers": json.loads(sections["layers"])}
    CONTRADICTIONS[lie](found)
    refused(tmp_path, {**sections, "layers": json.dumps(found["layers"]).encode()})


def test_bytes_that_belong_to_nothing_are_refused(
    tmp_path: Path, sections: dict[str, bytes]
) -> None:
    for name in ("spans", "windows", "blob.1"):
        for data in (sections[name] + b"\0", sections[name][:-1]):
            refused(tmp_path, {**sections, name: data})
    refused(tmp_path, {**sections, "blob.2": b"x"})


def test_a_tree_of_another_image_is_refused(tmp_path: Path, sections: dict[str, bytes]) -> None:
    build_index(Source([deflate(tar(1))], [tar(1)]), tmp_path / "one.clip", SMALL)
    build_index(Source([tar(1), tar(3)], [tar(1), tar(3)]), tmp_path / "other.clip", SMALL)
    for name in ("one.clip", "other.clip"):
        with open_index(tmp_path / name) as index:
            refused(tmp_path, {**sections, "tree": index.tree()}, "tree")
    for tree in (b"", b"x", bytes(10_000), sections["tree"][:1200]):
        refused(tmp_path, {**sections, "tree": tree}, "tree")


def test_a_key_cannot_be_claimed(tmp_path: Path, sections: dict[str, bytes]) -> None:
    """Other span digests give the layer another file in the layer store."""
    layers = json.loads(sections["layers"])
    size = layers[0]["spans_size"]
    packed = bytearray(sections["spans"])
    packed[size - 1] ^= 1  # in the last span's digest
    layers[0]["key"] = "claimed"
    lying = {**sections, "spans": bytes(packed), "layers": json.dumps(layers).encode()}
    with (
        open_index(rewrite(tmp_path / "good.clip", sections)) as good,
        open_index(rewrite(tmp_path / "bad.clip", lying)) as bad,
    ):
        assert good.layers[0].diff_id == bad.layers[0].diff_id
        assert good.layers[0].key != bad.layers[0].key
        assert good.layers[1].key == bad.layers[1].key


def test_damaged_windows_are_errors_not_data(tmp_path: Path, sections: dict[str, bytes]) -> None:
    windows = sections["windows"]
    for data in (bytes(len(windows)), b"\xff" * len(windows), windows[::-1]):
        with open_index(rewrite(tmp_path / "bad.clip", {**sections, "windows": data})) as index:
            for span in index.span_table(0):
                if span.window:
                    with pytest.raises(ClipError):
                        index.window(0, span)


def read_everything(index: Index) -> None:
    index.tree()
    for i in range(len(index.layers)):
        table = index.span_table(i)
        assert isinstance(table, SpanTable)
        for span in table:
            assert len(index.window(i, span)) == 32768


def test_a_profile_is_a_list(tmp_path: Path, sections: dict[str, bytes]) -> None:
    profile = b'[{"layer": 0, "spans": [1, 2]}]'
    with open_index(rewrite(tmp_path / "a.clip", {**sections, "profile": profile})) as index:
        assert index.profile == json.loads(profile)
        read_everything(index)


def test_any_damage_with_right_checksums_is_refused_or_harmless(
    tmp_path: Path, sections: dict[str, bytes]
) -> None:
    rng = random.Random(3)
    for _ in range(400):
        name = rng.choice(["image", "layers", "spans", "windows", "tree"])
        data = bytearray(sections[name])
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(min(len(data), rng.choice([32, 200, 1 << 30])))
            data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        path = rewrite(tmp_path / "bad.clip", {**sections, name: bytes(data)})
        try:
            with open_index(path) as index:
                read_everything(index)
        except ClipError:
            continue


def test_any_damage_of_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.clip"
    sample = every_encoding()
    build_index(sample.source(), path, SMALL)
    good = path.read_bytes()
    rng = random.Random(4)
    for _ in range(300):
        data = bytearray(good)
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(IndexFormatError), open_index(path) as index:
            index.tree()


def test_noise_is_refused(tmp_path: Path) -> None:
    for data in (b"", text(100), b"CLIPIDX\n" + text(10_000), b"CLIPIDX\n\x01\0\0\0" + bytes(1000)):
        (tmp_path / "noise").write_bytes(data)
        with pytest.raises(IndexFormatError):
            open_index(tmp_path / "noise")

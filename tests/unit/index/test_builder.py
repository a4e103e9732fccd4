"""Building: every encoding, any number of jobs, and everything that can be wrong with an image."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import threading
import tracemalloc
from typing import TYPE_CHECKING, Any, BinaryIO

import pytest

from clipshim.errors import ClipError, DigestError, LayerError, RegistryError, UsageError
from clipshim.index.builder import BuildOptions, build_index
from clipshim.index.model import open_index
from clipshim.index.span_decode import decode_group, decode_span
from tests.support import tar_layers
from tests.unit.index.samples import Source, deflate, every_encoding, sha256, tar, text, zstd

if TYPE_CHECKING:
    from pathlib import Path

SMALL = BuildOptions(spacing=64 << 10)


def test_every_span_of_every_encoding_decodes_to_its_digest(tmp_path: Path) -> None:
    sample = every_encoding()
    source = sample.source()
    result = build_index(source, tmp_path / "a.clip", SMALL)
    assert sorted(source.opened) == list(range(len(sample.blobs)))  # each blob once
    with open_index(result.path) as index:
        assert index.digest == result.digest
        assert index.image_id == result.image_id
        assert index.layers == result.layers
        for i, (data, blob) in enumerate(zip(sample.tars, sample.blobs, strict=True)):
            table = index.span_table(i)
            assert table.size == len(data) == index.layers[i].size
            for number, span in enumerate(table):
                expected = data[span.uncompressed_offset :][: span.uncompressed_size]
                compressed = blob[span.compressed_offset :][: span.compressed_size]
                window = index.window(i, span)
                size = span.uncompressed_size
                made = decode_span(span.kind, span.bits, window, compressed, size, span.skip)
                assert made == expected
                assert hashlib.sha256(made).digest() == span.digest
                group = table.group(number)
                if len(group) > 1:
                    sizes = [table[member].uncompressed_size for member in group]
                    spans = decode_group(span.kind, span.bits, window, [compressed], sizes)
                    assert list(spans)[number - group[0]] == expected


def test_the_index_names_its_image(tmp_path: Path) -> None:
    source = Source([deflate(tar(1))], [tar(1)])
    build_index(source, tmp_path / "a.clip", SMALL)
    with open_index(tmp_path / "a.clip") as index:
        assert index.reference == source.reference
        assert index.manifest_digest == source.manifest_digest
        assert index.platform == "linux/amd64"
        assert index.config_raw == source.config_raw
        assert index.config["os"] == "linux"
        assert index.layers[0].blob_digest == source.layers[0].digest
        assert index.layers[0].diff_id == sha256(tar(1))
        assert index.layers[0].compression == "gzip"
        assert index.profile is None
        assert not index.has_blobs


def test_the_same_image_gives_the_same_bytes_for_any_jobs(tmp_path: Path) -> None:
    sample = every_encoding()
    digests = set()
    for jobs in (0, 1, 2, 50):
        options = BuildOptions(spacing=64 << 10, jobs=jobs)
        digests.add(build_index(sample.source(), tmp_path / f"{jobs}.clip", options).digest)
    assert len(digests) == 1


def test_a_layer_has_the_same_key_in_every_image(tmp_path: Path) -> None:
    one, two, three = tar(1), tar(2), tar(3)
    first = build_index(Source([deflate(one), deflate(two)], [one, two]), tmp_path / "a", SMALL)
    second = build_index(
        Source([deflate(three), deflate(one), deflate(two)], [three, one, two]),
        tmp_path / "b",
        SMALL,
    )
    assert [layer.key for layer in first.layers] == [layer.key for layer in second.layers[1:]]


def test_an_embedded_index_carries_the_blobs(tmp_path: Path) -> None:
    sample = every_encoding()
    options = BuildOptions(spacing=64 << 10, embed=True)
    result = build_index(sample.source(), tmp_path / "a.clip", options)
    with open_index(result.path) as index, open(result.path, "rb") as file:
        assert index.has_blobs
        for i, blob in enumerate(sample.blobs):
            _, offset, size = index.blob(i)
            file.seek(offset)
            assert file.read(size) == blob
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.clip"]


def test_an_image_without_layers_has_an_index(tmp_path: Path) -> None:
    build_index(Source([], []), tmp_path / "a.clip", SMALL)
    with open_index(tmp_path / "a.clip") as index:
        assert index.layers == ()
        assert not index.has_blobs


def test_empty_and_repeated_layers_are_layers(tmp_path: Path) -> None:
    tars = [tar(1), b"", bytes(1024), tar(1), b""]
    blobs = [deflate(tars[0]), deflate(b""), deflate(tars[2]), deflate(tars[0]), b""]
    build_index(Source(blobs, tars), tmp_path / "a.clip", SMALL)
    with open_index(tmp_path / "a.clip") as index:
        assert [layer.size for layer in index.layers] == [len(data) for data in tars]
        assert index.layers[0].key == index.layers[3].key
        assert len(index.span_table(1)) == len(index.span_table(4)) == 0


def test_progress_is_told(tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.started: dict[int, int] = {}
            self.done: dict[int, int] = {}
            self.finished: set[int] = set()
            self.lock = threading.Lock()

        def layer_started(self, i: int, digest: str, total_bytes: int) -> None:
            assert digest.startswith("sha256:")
            with self.lock:
                self.started[i] = total_bytes

        def layer_advanced(self, i: int, bytes_done: int) -> None:
            with self.lock:
                assert bytes_done > self.done.get(i, 0)
                self.done[i] = bytes_done

        def layer_finished(self, i: int) -> None:
            with self.lock:
                self.finished.add(i)

        def message(self, text: str) -> None:
            assert text

    sample = every_encoding()
    recorder = Recorder()
    build_index(sample.source(), tmp_path / "a.clip", SMALL, recorder)
    sizes = {i: len(blob) for i, blob in enumerate(sample.blobs)}
    assert recorder.started == recorder.done == sizes
    assert recorder.finished == set(sizes)


def failure(
    tmp_path: Path, source: Any, kind: type[ClipError], options: BuildOptions = SMALL
) -> str:
    """The message of the error that building must end with, leaving nothing."""
    message = ""
    for embed in (False, True):
        chosen = BuildOptions(options.spacing, embed, options.jobs, options.max_layer_size)
        with pytest.raises(kind) as caught:
            build_index(source, tmp_path / "a.clip", chosen)
        assert list(tmp_path.iterdir()) == []
        names = {thread.name.split("_")[0] for thread in threading.enumerate()}
        assert not names & {"layer", "digests", "tar"}
        message = str(caught.value)
    return message


def test_a_blob_that_is_another_one_is_refused(tmp_path: Path) -> None:
    good, other = deflate(tar(1)), deflate(tar(2))
    source = Source([good, good], [tar(1), tar(1)])
    source.blobs[1] = other[: len(good)].ljust(len(good), b"\0")
    assert "layer 1" in failure(tmp_path, source, LayerError)


@pytest.mark.parametrize("make", [lambda data: data, deflate, zstd])
def test_a_blob_of_another_size_is_refused(tmp_path: Path, make: Any) -> None:
    good = make(tar(1))
    for bad in (good[:-1], good + b"\0", b"", good[:1000], good + bytes(500_000)):
        source = Source([good], [tar(1)])
        source.blobs[0] = bad
        assert "layer 0" in failure(tmp_path, source, LayerError)


def test_another_diff_id_is_refused(tmp_path: Path) -> None:
    message = failure(tmp_path, Source([deflate(tar(1))], [tar(2)]), DigestError)
    assert "diff ID" in message
    assert sha256(tar(2)) in message
    assert sha256(tar(1)) in message


def test_one_bad_layer_of_many_ends_it(tmp_path: Path) -> None:
    tars = [tar(i) for i in range(6)]
    source = Source([deflate(data) for data in tars], [*tars[:5], tars[0]])
    assert "layer 5" in failure(tmp_path, source, DigestError)


def test_what_is_not_a_tar_is_refused(tmp_path: Path) -> None:
    data = text(100_000)
    assert "layer 0" in failure(tmp_path, Source([data], [data]), LayerError)
    assert "layer 0" in failure(tmp_path, Source([deflate(data)], [data]), LayerError)


def test_a_layer_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    data = tar_layers.layer(tar_layers.member("zeros", bytes(20 << 20)))
    for blob in (deflate(data), zstd(data), data):
        options = BuildOptions(spacing=64 << 10, max_layer_size=10 << 20)
        assert "layer 0" in failure(tmp_path, Source([blob], [data]), LayerError, options)


def test_an_error_of_the_source_comes_through(tmp_path: Path) -> None:
    class Gone(Source):
        def open_layer(self, i: int) -> contextlib.AbstractContextManager[BinaryIO]:
            raise RegistryError(f"layer {i} is gone")

    class Breaks(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 10_000:
                raise RegistryError("connection lost")
            return super().read(5_000)

    class Interrupted(Source):
        def open_layer(self, i: int) -> contextlib.AbstractContextManager[BinaryIO]:
            return contextlib.closing(Breaks(self.blobs[i]))

    assert "gone" in failure(tmp_path, Gone([deflate(tar(1))], [tar(1)]), RegistryError)
    for make in (deflate, zstd, bytes):
        source = Interrupted([make(tar(1))], [tar(1)])
        assert "connection lost" in failure(tmp_path, source, RegistryError)


@pytest.mark.parametrize(
    "config",
    [b"", b"null", b"[]", b"\xff", b"{}", b'{"rootfs": 1}', b'{"rootfs": {"diff_ids": {}}}',
     b'{"rootfs": {"diff_ids": []}}', b'{"rootfs": {"diff_ids": [1]}}',
     b'{"rootfs": {"diff_ids": ["sha256:12"]}}', b"[" * 100_000],
)  # fmt: skip
def test_what_is_not_an_image_is_refused(tmp_path: Path, config: bytes) -> None:
    source = Source([deflate(tar(1))], [tar(1)])
    source.config_raw = config
    failure(tmp_path, source, LayerError)


@pytest.mark.parametrize("platform", ["", "linux", "linux/a b", "linux/amd64/v1/x"])
def test_what_no_reader_would_accept_is_not_written(tmp_path: Path, platform: str) -> None:
    source = Source([deflate(tar(1))], [tar(1)])
    source.platform = platform
    assert "platform" in failure(tmp_path, source, LayerError)


def test_urls_of_foreign_layers_are_kept_if_they_are_plain(tmp_path: Path) -> None:
    source = Source([deflate(tar(1))], [tar(1)])
    urls = ("https://example.com/layer", "https://example.com/\n", "x" * 10_000)
    source.layers[0] = dataclasses.replace(source.layers[0], urls=urls)
    build_index(source, tmp_path / "a.clip", SMALL)
    with open_index(tmp_path / "a.clip") as index:
        assert index.layers[0].urls == urls[:1]


def test_images_for_other_systems_are_refused(tmp_path: Path) -> None:
    source = Source([deflate(tar(1))], [tar(1)])
    source.config_raw = json.dumps(
        {"os": "windows", "rootfs": {"diff_ids": [sha256(tar(1))]}}
    ).encode()
    assert "windows" in failure(tmp_path, source, LayerError)


def test_an_unknown_media_type_is_named(tmp_path: Path) -> None:
    source = Source([deflate(tar(1))], [tar(1)], "application/vnd.cncf.helm.chart.content.v1.tar")
    message = failure(tmp_path, source, LayerError)
    assert "layer 0" in message
    assert "helm" in message


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.v1.tar+zstd",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    ],
)
def test_a_layer_is_what_its_bytes_say(tmp_path: Path, media_type: str) -> None:
    for make, compression in ((deflate, "gzip"), (zstd, "zstd"), (bytes, "none")):
        source = Source([make(tar(1))], [tar(1)], media_type)
        result = build_index(source, tmp_path / "a.clip", SMALL)
        assert result.layers[0].compression == compression


@pytest.mark.parametrize("spacing", [0, 1, 65535, 1 << 30])
def test_spacing_has_bounds(tmp_path: Path, spacing: int) -> None:
    source = Source([deflate(tar(1))], [tar(1)])
    failure(tmp_path, source, UsageError, BuildOptions(spacing=spacing))


def test_memory_does_not_grow_with_the_layer(tmp_path: Path) -> None:
    def peak(megabytes: int) -> int:
        data = tar_layers.layer(tar_layers.member("file", text(1 << 20) * megabytes))
        source = Source([deflate(data, 1)], [data])
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        build_index(source, tmp_path / "a.clip")
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest - before

    peak(1)
    assert peak(64) < peak(8) + (16 << 20)

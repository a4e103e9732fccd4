"""Layer readers over real indexes and a real registry, which misbehaves now and then."""

from __future__ import annotations

import contextlib
import io
import random
import tarfile
from typing import TYPE_CHECKING

import pytest
import trio

from clipshim.errors import ClipError
from clipshim.index.builder import BuildOptions, build_index
from clipshim.index.model import open_index
from clipshim.lazy import layer_reader
from clipshim.lazy.fetching import Fetching
from clipshim.lazy.full_check import complete_layer
from clipshim.lazy.layer_reader import LayerReader
from clipshim.lazy.layer_store import LayerStore
from clipshim.lazy.span_source import BlobSource, EmbeddedSource, SpanSource
from clipshim.registry.access import RegistryAccess
from clipshim.registry.blobs import BlobReader, locate_blob
from clipshim.registry.sources import open_source
from clipshim.settings import Settings
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.images import TAG, write_layout

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from clipshim.index.model import Index
    from tests.support.registry import TestRegistry

MIB = 1 << 20


def make_layer(path: Path) -> bytes:
    """A tar of a few files, half of it compressible."""
    chance = random.Random(17)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(12):
            words = chance.randbytes(50_000)
            content = b"".join(words[(i * 91) % 40_000 :][:700] for i in range(800))
            content += chance.randbytes(200_000)
            info = tarfile.TarInfo(f"file-{number}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("lazy") / "layer.tar"
    return path, make_layer(path)


@pytest.fixture
def access() -> Iterator[RegistryAccess]:
    access = RegistryAccess(anonymous=True, read_timeout_s=2.0)
    yield access
    access.transport.close()


def pushed(
    registry: TestRegistry, base: Path, layer: Path, variant: str, *, name: str = "lazy"
) -> str:
    layout = base / f"layout-{variant}"
    write_layout(layout, [layer], variant, {"Cmd": ["true"]})
    return registry.push_layout(layout, f"{name}-{variant}:test", tag=TAG)


def indexed(reference: str, base: Path, access: RegistryAccess, *, embed: bool = False) -> Index:
    path = base / "image.clip"
    source = open_source(reference, platform=None, access=access)
    build_index(source, path, BuildOptions(spacing=256 << 10, embed=embed))
    return open_index(path)


@contextlib.asynccontextmanager
async def reading(
    index: Index, base: Path, source: SpanSource, *, deadline_s: float = 120.0
) -> AsyncIterator[LayerReader]:
    store = LayerStore(str(base / "layers"), limit_bytes=1 << 30)
    async with trio.open_nursery() as nursery:
        fetching = Fetching(nursery, Settings({"fetch_deadline_s": deadline_s}))
        info, table = index.layers[0], index.span_table(0)
        reader = LayerReader(info, table, store.open(info, table), fetching)
        reader.add_source(source)
        yield reader
        nursery.cancel_scope.cancel()
    store.close()


def blob_source(index: Index, blobs: BlobReader, *, host: str | None = None) -> BlobSource:
    info = index.layers[0]
    reference = index.reference
    if host is not None:  # the same blob behind the proxy
        reference = host + reference[reference.index("/") :]
    blob = locate_blob(reference, info.blob_digest, info.blob_size, info.urls)
    return BlobSource(index, 0, blobs, blob, "registry.test")


async def read_randomly(reader: LayerReader, want: bytes, *, times: int = 40) -> None:
    chance = random.Random(23)
    for _ in range(times):
        offset = chance.randrange(len(want))
        size = chance.choice([1, 5000, 131_072, 1 << 20])
        assert bytes(await reader.read(offset, size)) == want[offset : offset + size]


@pytest.mark.parametrize("variant", ["gzip", "zstd", "plain"])
def test_random_reads_and_completion_of_a_real_layer(
    registry: TestRegistry,
    tmp_path: Path,
    access: RegistryAccess,
    layer: tuple[Path, bytes],
    variant: str,
) -> None:
    path, want = layer
    reference = pushed(registry, tmp_path, path, variant)
    with indexed(reference, tmp_path, access) as index:
        blobs = BlobReader(access)

        async def main() -> None:
            async with reading(index, tmp_path, blob_source(index, blobs)) as reader:
                await read_randomly(reader, want)
                await complete_layer(reader)
                assert bytes(await reader.read(0, len(want))) == want
            with open(reader.stored.data_path, "rb") as file:
                assert file.read() == want

        trio.run(main)
        blobs.close()


def test_a_self_contained_index_needs_no_registry(
    registry: TestRegistry, tmp_path: Path, access: RegistryAccess, layer: tuple[Path, bytes]
) -> None:
    path, want = layer
    reference = pushed(registry, tmp_path, path, "gzip", name="embedded")
    with indexed(reference, tmp_path, access, embed=True) as index:

        async def main() -> None:
            async with reading(index, tmp_path, EmbeddedSource(index, 0)) as reader:
                await read_randomly(reader, want, times=10)
                assert bytes(await reader.read(0, len(want))) == want

        trio.run(main)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("reset", after=1000),
        Fault("close", after=10),
        Fault("short", after=100),
        Fault("long", after=100),
        Fault("wrong-range"),
        Fault("ignore-range"),
        Fault("status", status=503),
        Fault("stall", after=100),
    ],
    ids=lambda fault: fault.kind,
)
def test_readers_never_notice_faults_that_pass(
    registry: TestRegistry,
    tmp_path: Path,
    access: RegistryAccess,
    layer: tuple[Path, bytes],
    fault: Fault,
) -> None:
    path, want = layer
    reference = pushed(registry, tmp_path, path, "gzip", name="faulty")
    with indexed(reference, tmp_path, access) as index, FaultProxy(registry.host) as proxy:
        blobs = BlobReader(access)
        proxy.inject(fault, times=2)

        async def main() -> None:
            source = blob_source(index, blobs, host=proxy.host)
            async with reading(index, tmp_path, source) as reader:
                await read_randomly(reader, want, times=8)
                assert reader.statistics.read_errors == 0

        trio.run(main)
        blobs.close()


def test_a_registry_that_serves_other_bytes_is_never_believed(
    registry: TestRegistry,
    tmp_path: Path,
    access: RegistryAccess,
    layer: tuple[Path, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer_reader, "RETRY_PAUSE_S", 0.01)
    path, want = layer
    reference = pushed(registry, tmp_path, path, "gzip", name="liar")
    with indexed(reference, tmp_path, access) as index, FaultProxy(registry.host) as proxy:
        blobs = BlobReader(access)
        proxy.inject(Fault("wrong-bytes"), times=1000)

        async def main() -> None:
            source = blob_source(index, blobs, host=proxy.host)
            async with reading(index, tmp_path, source) as reader:
                for offset in range(0, len(want), MIB):
                    with pytest.raises(ClipError):
                        await reader.read(offset, 4096)
                assert reader.statistics.verify_failures
                assert reader.stored.present_spans == 0

        trio.run(main)
        blobs.close()

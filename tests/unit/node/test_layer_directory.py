"""Layers as the server shows them: opened when they are read, closed without holding it up."""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import threading
from typing import TYPE_CHECKING

import pytest
import trio

from clipshim.errors import AuthError, StoreError
from clipshim.index.builder import BuildOptions, build_index
from clipshim.index.model import open_index
from clipshim.lazy.fetching import Fetching
from clipshim.lazy.layer_store import LayerStore
from clipshim.lazy.span_source import EmbeddedSource
from clipshim.node import layer_directory
from clipshim.node.layer_directory import LayerDirectory
from clipshim.settings import Settings
from tests.unit.index.samples import Source, tar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from clipshim.index.model import Index
    from clipshim.lazy.span_source import SpanSource

IMAGE = "ab" * 16


class Shown:
    """A directory that shows one layer of a self-contained index."""

    def __init__(self, path: Path, nursery: trio.Nursery) -> None:
        self.tar = tar(1)
        self.clip = path / "app.clip"
        blob = gzip.compress(self.tar, mtime=0)
        build_index(Source([blob], [self.tar]), self.clip, BuildOptions(embed=True))
        with open_index(self.clip) as index:
            self.info = index.layers[0]
        self.store = LayerStore(str(path / "layers"), limit_bytes=1 << 30)
        self.trust: list[bool] = []  # of each source that was made
        fetching = Fetching(nursery, Settings({"fetch_deadline_s": 60.0}))
        self.directory = LayerDirectory(self.store, fetching, self._source)
        self.denied = False
        self.show(trusted=False)

    def show(self, *, trusted: bool) -> None:
        layers = [(self.info.key, self.info.size)]
        self.directory.show(IMAGE, str(self.clip), layers, trusted=trusted)

    def _source(self, index: Index, position: int, trusted: bool) -> SpanSource:
        self.trust.append(trusted)
        if self.denied and not trusted:
            return Denying(index, position)
        return EmbeddedSource(index, position)

    async def read(self, offset: int) -> None:
        layer = await self.directory.by_name(self.info.key)
        assert layer is not None
        assert bytes(await layer.read(offset, 100)) == self.tar[offset : offset + 100]


class Denying(EmbeddedSource):
    """A registry that wants to know who asks."""

    def fetch(self, start: int, length: int, deadline: float, *, hurried: bool = False) -> bytes:
        raise AuthError("denied")


@contextlib.asynccontextmanager
async def showing(path: Path) -> AsyncIterator[Shown]:
    async with trio.open_nursery() as nursery:
        shown = Shown(path, nursery)
        yield shown
        await trio.to_thread.run_sync(shown.directory.close)
        shown.store.close()
        nursery.cancel_scope.cancel()


def test_closing_a_layer_waits_for_the_disk_without_holding_anybody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with showing(tmp_path) as shown:
            await shown.read(0)
            slow = threading.Event()
            stored = shown.store.get(shown.info.key)
            assert stored is not None
            close = stored.close

            def wait_for_the_disk() -> None:
                assert slow.wait(60)
                close()

            monkeypatch.setattr(stored, "close", wait_for_the_disk)
            (layer,) = shown.directory._by_name.values()
            with trio.fail_after(60):
                shown.directory.close_layer(layer)
                assert shown.directory.open_count() == 0
                slow.set()
                while shown.store.get(shown.info.key) is not None:
                    await trio.sleep(0.01)
            await shown.read(50)

    trio.run(main)


def test_a_layer_can_be_closed_and_opened_at_any_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with showing(tmp_path) as shown:
            (layer,) = shown.directory._by_name.values()

            async def read_often() -> None:
                for number in range(60):
                    await shown.read(number * 10)
                    shown.directory.close_layer(layer)

            async with trio.open_nursery() as readers:
                for _ in range(4):
                    readers.start_soon(read_often)
            with trio.fail_after(60):
                while shown.store.get(shown.info.key) is not None:
                    await trio.sleep(0.01)
            assert layer.reader is None

    trio.run(main)


def test_an_image_that_is_trusted_now_gives_what_it_could_not_before(tmp_path: Path) -> None:
    """Also to a reader that is in use."""

    async def main() -> None:
        async with showing(tmp_path) as shown:
            shown.denied = True
            (layer,) = shown.directory._by_name.values()
            async with layer.opened():
                with pytest.raises(AuthError):
                    await shown.read(0)
                shown.show(trusted=True)
                shown.directory.refresh(IMAGE)
                await shown.read(0)
            assert shown.trust == [False, True]

    trio.run(main)


@pytest.mark.parametrize("where", ["index", "source"])
def test_a_lack_of_descriptors_is_waited_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    left = 4

    def fail(*_: object) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            try:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            except OSError as exc:
                raise StoreError("cannot open") from exc

    async def main() -> None:
        async with showing(tmp_path) as shown:
            open_it, make = open_index, shown._source

            def open_later(path: str) -> Index:
                if where == "index":
                    fail()
                return open_it(path)

            def make_later(index: Index, position: int, trusted: bool) -> SpanSource:
                if where == "source":
                    fail()
                return make(index, position, trusted)

            monkeypatch.setattr(layer_directory, "open_index", open_later)
            monkeypatch.setattr(shown.directory, "_make_source", make_later)
            await shown.read(0)
            assert left < 0

    trio.run(main)

"""What a server does beside its requests, and that no failure of it ends the server."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

from clipshim.errors import DaemonError, MountError, StoreError
from clipshim.lazy.profile import load_profile
from clipshim.node import keeper_link, metrics
from clipshim.node.cleanup import remove_drafts
from clipshim.node.control import control_pair, receive_message, send_message
from clipshim.node.images import ImageNames
from clipshim.node.keeper_link import KeeperLink
from clipshim.node.prefetching import Prefetching
from clipshim.node.resolver import Resolver
from clipshim.node.tree_mounts import State, Tree, TreeMounts
from clipshim.node.tree_records import TreeRecord
from clipshim.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def record(image_id: str) -> TreeRecord:
    return TreeRecord(image_id, f"sha256:{image_id}", "r.example/a:b", "erofs", (), "g")


def settings(tmp_path: Path, **values: object) -> Settings:
    return Settings({"state_dir": f"{tmp_path}/state", "run_dir": f"{tmp_path}/run", **values})


def test_a_scrape_that_fails_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """serve_http runs in the nursery of the server."""
    answers: Iterator[Exception | str] = iter([ValueError("a bug"), "all is well\n"])

    def text(_node: object) -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def get(address: tuple[str, int]) -> bytes:
        async with await trio.open_tcp_stream(*address) as stream:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\n\r\n")
            with contextlib.suppress(trio.BrokenResourceError):
                return b"".join([part async for part in stream])
        return b""

    async def main() -> None:
        listeners: list[trio.SocketListener] = []
        listen = trio.open_tcp_listeners

        async def open_listeners(port: int, *, host: str) -> list[trio.SocketListener]:
            listeners.extend(await listen(port, host=host))
            opened.set()
            return listeners

        opened = trio.Event()
        monkeypatch.setattr(trio, "open_tcp_listeners", open_listeners)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(metrics.serve_http, cast("Any", None), "127.0.0.1:0")
            await opened.wait()
            address = listeners[0].socket.getsockname()
            assert await get(address) == b""
            assert b"all is well" in await get(address)
            nursery.cancel_scope.cancel()

    monkeypatch.setattr(metrics, "metrics_text", text)
    trio.run(main)


def test_starts_that_end_at_once_are_all_learned(tmp_path: Path) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            prefetching = Prefetching(settings(tmp_path), nursery, cast("Any", None))
            for span in range(40):
                prefetching.learn(record("ab" * 16), [(0, span)])

    trio.run(main)
    profile = load_profile(f"{tmp_path}/state/profiles", "ab" * 16)
    assert profile.starts == 40
    assert os.listdir(tmp_path / "state/profiles") == ["ab" * 16 + ".json"]


def test_a_tree_that_cannot_be_unmounted_keeps_no_other(tmp_path: Path) -> None:
    gone = []

    class Worker:
        async def unmount(self, target: str) -> bool:
            await trio.lowlevel.checkpoint()
            if "bad" in target:
                raise MountError("busy")
            gone.append(target)
            return True

    class Nothing:
        """Layers, keeper and records, which have nothing to do."""

        trees: dict[str, int] = {}  # noqa: RUF012

        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    async def main() -> None:
        nothing = cast("Any", Nothing())
        trees = TreeMounts(
            settings(tmp_path), nothing, nothing, nothing, cast("Any", Worker()), nothing, "g",
            lambda _index, _position: None,
        )  # fmt: skip
        for name in ("bad", "good"):
            tree = trees.trees[name] = Tree(name, record(name))
            tree.move(State.MOUNTED)
        assert await trees.unmount_idle(0.0) == ["good"]
        assert list(trees.trees) == ["bad"]
        assert trees.trees["bad"].state is State.MOUNTED

    trio.run(main)
    assert len(gone) == 1


def test_an_answer_that_comes_too_late_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper_link, "REQUEST_TIMEOUT_S", 0.05)
    ours, keeper = control_pair()

    async def main() -> None:
        link = KeeperLink(ours.detach(), {}, {}, "g")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            with pytest.raises(DaemonError, match="no answer"):
                await link.ask({"op": "mount_tree"})
            request, _ = receive_message(keeper)
            read, write = os.pipe()
            send_message(keeper, {"ok": True, "id": request["id"]}, [write])
            os.close(write)
            # the end of the pipe comes when the link has closed its copy
            await trio.lowlevel.wait_readable(read)
            assert os.read(read, 1) == b""
            os.close(read)
            link.leaving = True
            keeper.shutdown(socket.SHUT_RDWR)
        link._socket.close()

    with keeper:
        trio.run(main)


def test_old_drafts_of_every_writer_go(tmp_path: Path) -> None:
    names = [".new-1", ".clip-2.tmp", ".pull-3"]
    for name in (*names, "sha256-x.clip", ".lock"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".new-young").touch()
    assert len(remove_drafts(str(tmp_path), True)) == 3
    assert len(remove_drafts(str(tmp_path), False)) == 3
    assert sorted(os.listdir(tmp_path)) == [".lock", ".new-young", "sha256-x.clip"]
    assert remove_drafts(str(tmp_path / "missing"), False) == []


def test_an_untrusted_index_gets_urls_of_allowed_registries_only(tmp_path: Path) -> None:
    made = settings(tmp_path, allowed_registries=["good.example", "*.good.example:5000"])
    resolver = Resolver(made, ImageNames(made))
    good = ("https://good.example/x", "https://a.good.example:5000/y")
    bad = (
        "https://evil.example/x", "https://good.example@evil.example/x", "https://[::1/x",
        "file:///etc/passwd", "https://good.example.evil.example/",
    )  # fmt: skip
    assert resolver.allowed_urls((*good, *bad)) == good


def test_an_index_that_would_fill_the_disk_is_refused(tmp_path: Path) -> None:
    made = settings(tmp_path, min_free_bytes=1 << 62)
    path = tmp_path / "index"
    path.write_bytes(b"index")
    images = ImageNames(made)
    with open(path, "rb") as file, pytest.raises(StoreError, match="no room"):
        images.add(file.fileno())
    assert os.listdir(images.directory) == []

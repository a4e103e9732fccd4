"""The protocol against well-behaved, silent and hostile clients, over a real socket."""

from __future__ import annotations

import functools
import json
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import trio

from clipshim.errors import NotFoundError
from clipshim.node.rpc import MAX_REQUEST, Handler, Request, RpcServer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


async def echo(request: Request) -> dict[str, Any]:
    for i in range(int(request.fields.get("progress", 0))):
        await request.progress({"done": i})
    for fd in request.fds:
        request.reply_fds.append(os.dup(fd))
    return {"text": request.text("text")}


async def missing(request: Request) -> dict[str, Any]:
    raise NotFoundError("nothing there", hint="look elsewhere")


async def broken(request: Request) -> dict[str, Any]:
    raise RuntimeError("a bug")


async def forever(request: Request) -> dict[str, Any]:
    await trio.sleep_forever()
    return {}


HANDLERS: dict[str, Handler] = {
    "echo": echo,
    "missing": missing,
    "broken": broken,
    "forever": forever,
}


def with_server(tmp_path: Path, client: Callable[[str], Any]) -> Any:
    """Runs a server, and `client`, blocking, in a thread beside it."""
    path = str(tmp_path / "s")

    async def main() -> Any:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(64)
            listener.setblocking(False)
            server = RpcServer(listener.detach(), HANDLERS)
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve)
                result = await trio.to_thread.run_sync(client, path)
                nursery.cancel_scope.cancel()
        server.close()
        return result

    return trio.run(main)


def ask(path: str, *lines: bytes) -> list[dict[str, Any]]:
    """Sends the lines; every line that comes back until one final answer for each."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(path)
        sock.sendall(b"".join(lines))
        answers: list[dict[str, Any]] = []
        with sock.makefile("rb") as replies:
            for line in replies:
                answers.append(json.loads(line))
                if sum("ok" in answer for answer in answers) == len(lines):
                    break
        return answers


def test_progress_comes_before_the_answer(tmp_path: Path) -> None:
    answers = with_server(
        tmp_path, functools.partial(ask_one, b'{"op":"echo","text":"x","progress":2}\n')
    )
    assert answers == [
        {"progress": {"done": 0}},
        {"progress": {"done": 1}},
        {"ok": True, "text": "x"},
    ]


def ask_one(line: bytes, path: str) -> list[dict[str, Any]]:
    return ask(path, line)


def test_several_requests_of_a_connection_are_answered_in_order(tmp_path: Path) -> None:
    lines = [b'{"op":"echo","text":"%d"}\n' % i for i in range(5)]
    answers = with_server(tmp_path, lambda path: ask(path, *lines))
    assert [answer["text"] for answer in answers] == ["0", "1", "2", "3", "4"]


def test_errors_name_class_hint_and_exit_code(tmp_path: Path) -> None:
    (answer,) = with_server(tmp_path, functools.partial(ask_one, b'{"op":"missing"}\n'))
    assert answer == {
        "ok": False,
        "error": "nothing there",
        "hint": "look elsewhere",
        "kind": "NotFoundError",
        "exit_code": 1,
    }


def test_a_bug_becomes_an_answer_and_the_connection_goes_on(tmp_path: Path) -> None:
    answers = with_server(
        tmp_path, lambda path: ask(path, b'{"op":"broken"}\n', b'{"op":"echo","text":"x"}\n')
    )
    assert answers[0]["kind"] == "DaemonError"
    assert answers[1]["ok"] is True


def test_unknown_and_malformed_requests_are_refused(tmp_path: Path) -> None:
    for line in (b'{"op":"nope"}\n', b"junk\n", b"[]\n", b"[" * 9000 + b"\n", b"\xff\xfe\n"):
        (tmp_path / "s").unlink(missing_ok=True)
        (answer,) = with_server(tmp_path, functools.partial(ask_one, line))
        assert answer["ok"] is False


def test_a_line_without_end_is_cut_off(tmp_path: Path) -> None:
    def client(path: str) -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            sock.connect(path)
            try:
                sock.sendall(b"x" * (4 * MAX_REQUEST))
                return sock.recv(1000)
            except ConnectionError:
                return b""

    reply = with_server(tmp_path, client)
    assert not reply or json.loads(reply)["ok"] is False


def test_descriptors_travel_both_ways_and_none_is_left_behind(tmp_path: Path) -> None:
    def client(path: str) -> int:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(60)
                sock.connect(path)
                read, write = os.pipe()
                socket.send_fds(sock, [b'{"op":"echo","text":"x"}\n'], [write])
                os.close(write)
                data, fds, _, _ = socket.recv_fds(sock, 1000, 4)
                assert json.loads(data)["ok"] is True
                os.write(fds[0], b"through")
                os.close(fds[0])
                # the end comes only when the server has closed its copies too
                with open(read, "rb") as pipe:
                    assert pipe.read() == b"through"
        return len(os.listdir("/proc/self/fd")) - before

    assert with_server(tmp_path, client) <= 2  # the connection that is being closed


def test_waiting_silent_and_vanished_clients_hold_up_nobody(tmp_path: Path) -> None:
    def client(path: str) -> list[dict[str, Any]]:
        others = []
        for i in range(50):
            other = socket.socket(socket.AF_UNIX)
            other.connect(path)
            other.sendall((b'{"op":"forever"}\n', b'{"op":', b"")[i % 3])
            if i % 4:
                others.append(other)
            else:
                # reset instead of an orderly end
                other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                other.close()
        try:
            return ask(path, b'{"op":"echo","text":"x"}\n')
        finally:
            for other in others:
                other.close()

    assert with_server(tmp_path, client) == [{"ok": True, "text": "x"}]

"""Messages and descriptors between keeper, server and worker; systemd's side of them."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from clipshim.node import sd_notify
from clipshim.node.control import (
    MAX_LARGE,
    control_pair,
    in_memory,
    receive_message,
    send_message,
)

if TYPE_CHECKING:
    from pathlib import Path


def test_a_message_arrives_with_its_descriptors() -> None:
    one, two = control_pair()
    with one, two:
        read, write = os.pipe()
        send_message(one, {"op": "x", "n": [1, 2]}, [write])
        os.close(write)
        message, fds = receive_message(two)
        assert message == {"op": "x", "n": [1, 2]}
        os.write(fds[0], b"hello")
        os.close(fds[0])
        assert os.read(read, 10) == b"hello"
        assert not os.get_inheritable(read)
        os.close(read)


def test_the_end_of_the_other_side_is_an_eof() -> None:
    one, two = control_pair()
    with two:
        one.close()
        with pytest.raises(EOFError):
            receive_message(two)


def test_what_is_not_an_object_is_refused() -> None:
    one, two = control_pair()
    with one, two:
        for junk in (b"junk", b"[]"):
            one.send(junk)
            with pytest.raises(ValueError, match=r"."):
                receive_message(two)


def test_a_message_that_is_too_long_for_a_packet_arrives_all_the_same() -> None:
    one, two = control_pair()
    with one, two:
        read, write = os.pipe()
        sent = {"devices": ["y" * 100] * 100_000}
        send_message(one, sent, [write])
        os.close(write)
        message, fds = receive_message(two)
        assert message == sent
        os.write(fds[0], b"hello")
        os.close(fds[0])
        assert os.read(read, 10) == b"hello"
        assert len(fds) == 1
        os.close(read)


def test_a_message_beyond_all_bounds_is_refused_before_it_is_sent() -> None:
    one, two = control_pair()
    with one, two, pytest.raises(OSError, match="at most"):
        send_message(one, {"x": "y" * MAX_LARGE})


def test_a_large_message_that_is_none_is_refused_and_leaves_nothing_open() -> None:
    one, two = control_pair()
    with one, two:
        before = os.listdir("/proc/self/fd")
        for junk in (b"junk", b"[]"):
            fd = in_memory(junk)
            send_message(one, {"large_message": 4}, [fd])
            os.close(fd)
            with pytest.raises(ValueError, match=r"."):
                receive_message(two)
        assert os.listdir("/proc/self/fd") == before


def test_notifications_reach_systemd_with_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with open("/dev/null", "rb") as null:
            assert sd_notify.store_fd("layers", null.fileno())
        data, fds, _, _ = socket.recv_fds(listener, 1000, 4)
        assert b"FDSTORE=1" in data
        assert b"FDNAME=layers" in data
        assert len(fds) == 1
        os.close(fds[0])


def test_without_systemd_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not sd_notify.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/does/not/exist")
    assert not sd_notify.notify("READY=1")


def test_descriptors_meant_for_another_process_are_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_FDNAMES", "layers")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert sd_notify.inherited_fds() == {}
    assert "LISTEN_FDS" not in os.environ

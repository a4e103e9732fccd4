"""The answer to FUSE_INIT, byte by byte (linux/fuse.h, struct fuse_init_out)."""

from __future__ import annotations

import os
import struct

import pytest

from clipshim.lazy import fuse_wire
from clipshim.node import fuse_connection
from clipshim.node.fuse_connection import init_reply

SIZE = 64  # sizeof(struct fuse_init_out) from 7.23 on


def test_a_modern_kernel_gets_what_is_wanted_and_no_more() -> None:
    reply = init_reply(7, 45, 131072, 0xFFFFFFFF)
    assert len(reply) == SIZE
    major, minor, readahead, flags = struct.unpack_from("<IIII", reply)
    assert (major, minor, readahead) == (7, fuse_connection.FUSE_MINOR, 131072)
    assert flags == fuse_connection.WANTED
    assert not flags & (1 << 14)  # READDIRPLUS_AUTO: pyfuse3 answers no plain READDIR
    (max_pages,) = struct.unpack_from("<H", reply, 28)
    assert max_pages == fuse_connection.MAX_PAGES


def test_an_old_kernel_is_offered_nothing_it_does_not_know() -> None:
    reply = init_reply(7, 26, 4096, fuse_wire.ASYNC_READ)
    _, minor, _, flags = struct.unpack_from("<IIII", reply)
    assert (minor, flags) == (26, fuse_wire.ASYNC_READ)
    assert struct.unpack_from("<H", reply, 28) == (0,)


def test_only_what_the_kernel_has_can_be_wanted() -> None:
    wanted = fuse_connection.WANTED | fuse_wire.POSIX_ACL
    reply = init_reply(7, 45, 131072, ~fuse_wire.POSIX_ACL & 0xFFFFFFFF, wanted=wanted)
    assert struct.unpack_from("<IIII", reply)[3] == fuse_connection.WANTED
    reply = init_reply(7, 45, 131072, 0xFFFFFFFF, wanted=wanted)
    assert struct.unpack_from("<IIII", reply)[3] == wanted


def test_another_protocol_is_refused() -> None:
    with pytest.raises(OSError, match="protocol 7"):
        init_reply(8, 0, 0, 0)


def test_a_connection_without_a_mount_is_not_alive() -> None:
    read, write = os.pipe()
    os.close(read)  # a writer without a reader polls as an error, as an aborted connection does
    try:
        assert not fuse_connection.is_alive(write)
    finally:
        os.close(write)

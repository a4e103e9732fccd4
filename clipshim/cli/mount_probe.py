"""Whether mounts answer, without waiting for those that do not.

A stat(2) that waits for a FUSE server cannot always be interrupted, not even by SIGKILL, and a
process with such a thread does not end. So a helper does it, which is left alone when it hangs.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LIMIT_S = 10.0
MAX_HANGING = 3  # then the rest is not tried any more

# Reads paths, ended by NUL, and writes one line for each: nothing, or what is wrong.
_HELPER = """
import os, sys
for path in sys.stdin.buffer.read().split(b"\\0")[:-1]:
    try:
        os.stat(path)
    except OSError as exc:
        print(exc.strerror, flush=True)
    else:
        print(flush=True)
"""
hanging_helpers: list[subprocess.Popen[bytes]] = []  # killed; they end when the mount does


def probe(paths: Sequence[str], *, limit_s: float = LIMIT_S) -> Iterator[tuple[str, str | None]]:
    """Each path with what is wrong there, None if nothing is."""
    rest = list(paths)
    hanging = 0
    while rest:
        if hanging >= MAX_HANGING:
            yield from ((path, "not looked at: too many others hang") for path in rest)
            return
        said = _ask_helper(rest, limit_s)
        yield from zip(rest, said, strict=False)
        done = len(said)
        if done < len(rest):
            yield rest[done], f"no answer in {limit_s:g} s"
            hanging += 1
            done += 1
        del rest[:done]


def _ask_helper(paths: Sequence[str], limit_s: float) -> list[str | None]:
    """What a helper says of the paths in order, up to the first one that hangs."""
    said: list[str | None] = []
    helper = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _HELPER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert helper.stdin is not None
    assert helper.stdout is not None
    with helper.stdout:
        with helper.stdin:
            helper.stdin.write(b"".join(os.fsencode(path) + b"\0" for path in paths))
        text = b""
        while len(said) < len(paths):
            if not select.select([helper.stdout], [], [], limit_s)[0]:
                helper.kill()
                hanging_helpers.append(helper)
                return said
            piece = os.read(helper.stdout.fileno(), 1 << 16)
            if not piece:
                raise OSError("the helper that looks at mounts has died")
            *lines, text = (text + piece).split(b"\n")
            said += [line.decode(errors="replace") or None for line in lines]
    helper.wait()
    return said

"""Causes of failures, from what the low-level runtime wrote to its log."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from clipshim.shim.runtime_log import MAX_TAIL_BYTES, RuntimeLog

if TYPE_CHECKING:
    from pathlib import Path

DELETED = (
    '{"level":"error","msg":"error mounting \\"proc\\" to rootfs: possible attack detected: '
    '/proc wandered into deleted directory","time":"2025-01-01T00:00:00Z"}\n'
)
OTHER = '{"level":"error","msg":"exec: \\"/x\\": no such file","time":"2025-01-01T00:00:00Z"}\n'
FAILED = 1 << 8  # wait status of exit(1)


@pytest.mark.parametrize(
    ("verb", "said", "status", "cause"),
    [
        ("create", DELETED, FAILED, "DeletedDirectory"),
        ("run", DELETED, FAILED, "DeletedDirectory"),
        ("create", OTHER, FAILED, "RuntimeFailed"),
        ("run", OTHER, FAILED, "RuntimeFailed"),
        ("create", "", FAILED, "RuntimeFailed"),
        ("run", "", 7 << 8, ""),  # the container's own
        ("run", "", 0, ""),
        ("create", DELETED, 0, ""),
    ],
)
def test_causes(tmp_path: Path, verb: str, said: str, status: int, cause: str) -> None:
    path = tmp_path / "log.json"
    log = RuntimeLog({"log": str(path)})
    path.write_text(said)
    assert log.failure(status, verb) == cause
    assert path.read_text() == said


def test_what_was_said_before_is_not_the_cause(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(DELETED)
    log = RuntimeLog({"log": str(path)})
    with path.open("a") as file:
        file.write(OTHER)
    assert log.failure(FAILED, "create") == "RuntimeFailed"


def test_the_end_of_a_long_log_counts(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    log = RuntimeLog({"log": str(path)})
    path.write_text("debug\n" * MAX_TAIL_BYTES + DELETED)
    assert log.failure(FAILED, "create") == "DeletedDirectory"


def test_a_log_that_cannot_be_read_is_no_trouble(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in ("", "\0", str(tmp_path / "missing"), str(tmp_path / "fifo"), str(tmp_path)):
        log = RuntimeLog({"log": path} if path else {})
        assert log.failure(FAILED, "create") == "RuntimeFailed"

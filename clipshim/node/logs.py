"""The daemon's log: the standard library's logging, one line an event, text or JSON, on stderr.

Under systemd each text line begins with the priority that journald reads (sd-daemon(3)).
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable

_PRIORITY = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
WINDOW_S = 10.0
BURST = 5
MAX_KINDS = 1000
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """What the caller passed as extra=."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


class TextFormatter(logging.Formatter):
    """`2026-01-02T03:04:05Z warning clipshim.node.keeper: message key=value`, always one line."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        parts = [record.getMessage()]
        parts += [f"{key}={value}" for key, value in fields_of(record).items()]
        if record.exc_info and record.exc_info[0]:
            parts.append(self.formatException(record.exc_info))
        text = " ".join(parts).replace("\n", " | ")
        if self._journal:
            return f"<{_PRIORITY.get(record.levelname, 6)}>{record.name}: {text}"
        return f"{_timestamp(record)} {record.levelname.lower()} {record.name}: {text}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, msg, and the extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry: dict[str, object] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        } | fields_of(record)
        if record.exc_info and record.exc_info[0]:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class Flood(logging.Filter):
    """Lets BURST warnings or errors from one line of the code through in WINDOW_S, counts the rest.

    A registry or a disk that is dead makes every reader of every layer complain. What was held back
    is said with the next one that passes. Records with an image ID are told apart by it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[tuple[str, int, object], tuple[float, int, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it. Called with the handler's lock not held."""
        if record.levelno < logging.WARNING:
            return True
        key = (record.pathname, record.lineno, getattr(record, "image_id", None))
        now = self._clock()
        start, passed, held_back = self._windows.get(key, (now, 0, 0))
        if now - start >= WINDOW_S:
            start, passed = now, 0
        if passed >= BURST:
            self._windows[key] = (start, passed, held_back + 1)
            return False
        if len(self._windows) > MAX_KINDS:
            self._windows.clear()
        self._windows[key] = (start, passed + 1, 0)
        if held_back:
            record.msg = f"{record.getMessage()} ({held_back} like it before were not logged)"
            record.args = ()
        return True


def configure(log_format: str, level: str) -> None:
    """Sends everything that is logged to stderr in the configured form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Flood())
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(TextFormatter(journal="JOURNAL_STREAM" in os.environ))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # its debug lines are about its own threads, thousands of them
    logging.getLogger("pyfuse3").setLevel(logging.WARNING)
    logging.raiseExceptions = False  # a closed stderr must not become an error of its own


def _timestamp(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"

"""Reports one error the way that engines read it from runc: in the --log file and on stderr.

Engines parse the log file (containerd line by line, podman as one object), so that nothing but the
one error is ever written there, and nothing at all to stdout, which is the container's.
"""

import os
import time

from clipshim.shim import json_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def report_error(message: str, options: "Mapping[str, str]") -> None:
    """Appends the error to the file of --log and writes the same text to stderr.

    `options` are runc's global flags. A log that cannot be written leaves stderr.
    """
    message = " ".join(message.split("\n"))
    path = options.get("log", "")
    line = _log_line(message, json_format=options.get("log-format") == "json")
    on_stderr = f"{message}\n" if path else line
    if path:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            fd = os.open(path, flags, 0o644)
            try:
                os.write(fd, line.encode("utf-8", "backslashreplace"))
            finally:
                os.close(fd)
        except OSError:
            on_stderr = line
    try:
        os.write(2, on_stderr.encode("utf-8", "backslashreplace"))
    except OSError:
        return


def rfc3339(now: "float | None" = None) -> str:
    """A time as logrus writes it, in the local zone."""
    local = time.localtime(now)
    offset = local.tm_gmtoff // 60
    zone = "Z" if offset == 0 else f"{'+' if offset > 0 else '-'}{_hours(abs(offset))}"
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', local)}{zone}"


def _hours(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"


def _log_line(message: str, *, json_format: bool) -> str:
    if json_format:
        return f'{{"level":"error","msg":{json_text.dumps(message)},"time":"{rfc3339()}"}}\n'
    return f'time="{rfc3339()}" level=error msg={json_text.dumps(message)}\n'

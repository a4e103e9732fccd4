"""The configuration as the daemon's processes read it: no edit of the file may break what runs.

The keeper reads the file when it starts and hands what it found down in its environment. A child
that is started again, or a keeper that executes itself anew, reads the file too; if that cannot be
read it goes on with what was handed down. Where state lies is never changed under a running
daemon: its mounts, and the containers on them, are there. Not for the shim and the command line,
which report a file that cannot be read.
"""

import json
import logging
import os

from clipshim.errors import ConfigError
from clipshim.node.logs import configure
from clipshim.settings import DEFAULTS, Settings, load_settings

log = logging.getLogger(__name__)

KEPT_ENV = "CLIPSHIM_KEPT_SETTINGS"
FIXED = ("run_dir", "state_dir")


def settings_of_daemon(*, fresh: bool = False) -> Settings:
    """The configuration, with logging set up. `fresh`: of a new daemon, which inherits nothing.

    Raises ConfigError if neither the file nor what was handed down can be used.
    """
    if fresh:
        os.environ.pop(KEPT_ENV, None)
    kept = _kept()
    complaints = []
    try:
        settings = load_settings()
    except ConfigError as exc:
        if kept is None:
            raise
        complaints.append(f"{exc}: going on with what was read before")
        settings = kept
    if kept is not None:
        for key in FIXED:
            before, now = getattr(kept, key), getattr(settings, key)
            if os.path.realpath(before) != os.path.realpath(now):
                complaints.append(
                    f"{key} of a running daemon cannot be changed: it stays {before}, not {now},"
                    " until the daemon is stopped and started"
                )
                setattr(settings, key, before)
    configure(settings.log_format, settings.log_level)
    for complaint in complaints:
        log.error("%s", complaint)
    return settings


def keep(settings: Settings) -> None:
    """Hands a configuration down to all processes that this one starts, or becomes."""
    values = {key: getattr(settings, key) for key in DEFAULTS}
    os.environ[KEPT_ENV] = json.dumps({"path": settings.path, "values": values})


def _kept() -> Settings | None:
    try:
        document = json.loads(os.environ[KEPT_ENV])
        # another version may have written it
        known = {key: value for key, value in document["values"].items() if key in DEFAULTS}
        return Settings(known, path=str(document["path"]))
    except (KeyError, ValueError, TypeError, AttributeError, ConfigError):
        return None

"""Trace points: named places at which a test can kill the shim, to prove what the next one cleans.

Without CLIPSHIM_TRACE_KILL in the engine's environment a trace point is one look-up. An image's
environment never gets here: it is in config.json, not in ours.
"""

import os

TRACE_ENV = "CLIPSHIM_TRACE_KILL"
STEPS = (
    "create-locked",
    "create-planned",
    "create-tree",
    "create-attached",
    "create-unmounted",
    "create-mounted",
    "create-verified",
    "create-config",
    "create-done",
    "delete-before-runc",
    "delete-after-runc",
    "teardown-unmounted",
    "teardown-upper",
    "teardown-released",
)
VOLUME_STEPS = ("volume-copied", "volume-moving", "volume-moved")  # where create fills one


def trace(step: str) -> None:
    """Dies here, as by kill -9, if the environment names this step."""
    if os.environ.get(TRACE_ENV) == step:
        os.kill(os.getpid(), 9)

"""`clipshim hook verify|cleanup`: what the OCI hooks in runc-hooks/ call.

A hook gets the container's state as JSON on stdin (OCI runtime specification, "State"). Hooks back
the shim up where an engine calls runc itself; they do not replace its `delete`: poststop does not
run when a configuration is refused.
"""

import os

from clipshim.errors import BundleError, StoreError, UsageError, VerifyError
from clipshim.mounts import verify
from clipshim.shim import bundle, json_text, teardown
from clipshim.shim.state import ContainerLock, list_states, load_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from clipshim.settings import Settings

MAX_STATE_BYTES = 1 << 20


def run(settings: "Settings", words: "Sequence[str]") -> int:
    """Carries out one hook; returns a wait status. Raises VerifyError to stop a container."""
    if list(words) == ["verify"]:
        verify_bundle(_state_from(0))
    elif list(words) == ["cleanup"]:
        clean_up(settings, _state_from(0))
    else:
        raise UsageError(f"hook {' '.join(words)}: expected verify or cleanup")
    return 0


def verify_bundle(state: "dict[str, Any]") -> None:
    """createRuntime or prestart: refuses a root file system that runc would stumble over."""
    path = state.get("bundle")
    found = bundle.read_bundle(path) if isinstance(path, str) else None
    if found is None or not found.rootfs:
        raise BundleError(f"bundle {path!r}: expected a config.json with root.path")
    root = os.path.realpath(found.rootfs)
    try:
        links = {
            name: os.readlink(f"{root}/{name}")
            for name in os.listdir(root)
            if os.path.islink(f"{root}/{name}") and name in _LINKED_BY_IMAGES
        }
        verify.verify_rootfs(root, fstype=None, has_usr=False, top_symlinks=links, readonly=True)
    except OSError as exc:
        raise VerifyError(f"rootfs {root}: {exc}") from exc


def clean_up(settings: "Settings", state: "dict[str, Any]") -> None:
    """poststop: takes down what is left of a container that the runtime has forgotten."""
    for key in list_states(settings):
        try:
            recorded = load_state(settings, key)
            if recorded is None or recorded.text("id") != state.get("id"):
                continue
            if recorded.is_checkpointed:
                continue  # what it wrote is for a restore
            # in use: the verb that brought the container's end about is taking it down itself
            with ContainerLock(settings, key, wait_s=0):
                recorded = load_state(settings, key)
                if recorded and recorded.is_gone() and not recorded.is_checkpointed:
                    teardown.tear_down(settings, recorded)
        except StoreError:
            continue


# top-level links of merged-/usr distributions; others may dangle as their image's author likes
_LINKED_BY_IMAGES = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


def _state_from(fd: int) -> "dict[str, Any]":
    chunks = []
    size = 0
    while chunk := os.read(fd, 1 << 16):
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_STATE_BYTES:
            raise UsageError("hook: the container's state on stdin is too long")
    try:
        state = json_text.loads(b"".join(chunks))
    except ValueError as exc:
        raise UsageError(f"hook: expected the container's state on stdin: {exc}") from exc
    if not isinstance(state, dict):
        raise UsageError("hook: expected the container's state on stdin, found no object")
    return state

"""create, run and restore of a container that names an index: everything or nothing.

Order: lock, plan on disk, tree from the daemon, overlay, verification, config.json, runtime. A
failure at any step unwinds the ones before; a crash is cleaned up from the plan.
"""

import os

from clipshim.errors import ClipError, StoreError
from clipshim.shim import bundle, daemon_client, daemon_start, rootfs, teardown
from clipshim.shim.bundle_lock import BundleLock
from clipshim.shim.runtime_log import RuntimeLog
from clipshim.shim.state import (
    STATE_VERSION,
    ContainerLock,
    ContainerState,
    container_key,
    load_for_removal,
    load_state,
)
from clipshim.shim.trace import trace
from clipshim.shim.undo import Undo

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from clipshim.mounts.graft import EngineOverlay
    from clipshim.settings import Settings
    from clipshim.shim.bundle import Bundle
    from clipshim.shim.source import Source
    from clipshim.shim.verbs import Call
    from clipshim.shim.volumes import NewVolumes

_LOCK_WAIT_S = 30.0
_OPTIONAL_PATIENCE_S = 10.0  # for an image that the engine has pulled anyway


def create_with_index(call: "Call", found: "Bundle", named: "Source") -> "int | None":
    """Makes the rootfs and runs the runtime; returns its wait status.

    None: the index was optional and there is none, or the container exists; nothing has changed.
    """
    settings = call.settings
    key = container_key(call.line.container_id, call.root)
    with ContainerLock(settings, key, wait_s=_LOCK_WAIT_S):
        trace("create-locked")
        if os.path.lexists(f"{call.root}/{call.line.container_id}"):
            if load_for_removal(settings, key, call.line.container_id, call.root) is None:
                teardown.forget(settings, settings.container_dir(key))
            return None  # made by whom we have waited for: the runtime says that the ID exists
        kept = _remove_stale(call, key)
        try:
            return _create_locked(call, found, named, key, kept)
        except ClipError as exc:
            _tell_outcome(settings, key, type(exc).__name__)
            raise


def _tell_outcome(settings: "Settings", key: str, failure: str) -> None:
    event = {"op": "event", "name": "container_started", "container": key}
    if failure:
        event |= {"name": "container_failed", "cause": failure}
    daemon_client.tell(settings.daemon_socket, event)


def _create_locked(
    call: "Call", found: "Bundle", named: "Source", key: str, kept: "ContainerState | None"
) -> "int | None":
    settings = call.settings
    directory = settings.container_dir(key)
    with Undo() as undo:
        if kept is None:
            undo.push(teardown.forget, settings, directory)
        else:
            undo.push(kept.save)
        engine = _engine_overlay(call, found, named, kept)
        state = _planned(call, found, named, key, engine)
        new_volumes = _new_volumes(call, found, named, engine)
        if new_volumes is not None:
            undo.push(new_volumes.close)
            state.values["volumes"] = new_volumes.paths
        state.save()
        trace("create-planned")
        tree = _request_tree(settings, key, named)
        if tree is None:
            return None
        trace("create-tree")
        with BundleLock(found.path if engine is None else "") as bundle_lock:
            rewrites = engine is None and not state.values.get("in_place")
            if rewrites:  # another container may have rewritten it since it was read
                found = bundle.read_bundle(found.path) or found
                state.values["original_root"] = _original_root(settings, found)
            try:
                state.save(
                    image_id=tree.facts.get("image_id"),
                    index_digest=tree.facts.get("index_digest"),
                    mode=tree.facts.get("mode"),
                    reference=tree.facts.get("reference"),
                )
                target = rootfs.mount_rootfs(
                    settings,
                    state,
                    tree,
                    engine,
                    undo,
                    reuse_upper=kept is not None,
                    userns_fd=_user_namespace(found, undo),
                )
            finally:
                os.close(tree.fd)
            if new_volumes is not None:
                new_volumes.fill(target)
                state.values.pop("volumes", None)
                state.save()
            if rewrites:
                bundle.keep_original(state.kept_config, _original_config(settings, found))
                undo.push(teardown.put_config_back, state)
                found.set_root_path(target)
            trace("create-config")
            said = RuntimeLog(call.line.options)

            def config_was_read() -> bool:
                """The runtime makes its directory after that: the next container may have it."""
                if state.is_gone():
                    return False
                bundle_lock.release()
                return True

            status = call.run_runtime(done_with=config_was_read if rewrites else None)
        if not state.is_gone():
            undo.commit()
            trace("create-done")
            cause = ""
        elif kept is None and _was_checkpointed(call, key):
            undo.commit()  # it ran in the foreground until a checkpoint ended it
            teardown.tear_down(settings, state, keep_upper=True)
            cause = ""
        else:  # it failed, or ran in the foreground and ended: leaving the block unwinds
            cause = said.failure(status, call.line.verb)
        _tell_outcome(settings, key, cause)
        return status


def _engine_overlay(
    call: "Call", found: "Bundle", named: "Source", kept: "ContainerState | None"
) -> "EngineOverlay | None":
    """The engine's overlay, if the tree can be grafted there; None for an own rootfs.

    Containers that only name an image get a graft too, without the layers of the engine's image: so
    restarts, commits and the engine's accounting of disk space find what they have written. Not
    with `run`, which is people's: what they have mounted stays as it is.
    """
    run_dir = call.settings.run_dir
    if named.is_stub:
        return rootfs.engine_overlay(found.rootfs, run_dir)
    restores_own = kept is not None and kept.text("kind") == "own"
    if call.line.verb == "run" or restores_own or found.rootfs in ("", "/"):
        return None
    if found.rootfs.startswith(f"{run_dir}/"):
        return None  # the own rootfs of another container of this bundle
    try:
        engine = rootfs.engine_overlay(found.rootfs, run_dir)
    except (ClipError, OSError):
        return None  # no rootfs, or none that an engine mounted in a way that is known
    if engine is None or not engine.upper:
        return None
    if engine.upper.startswith(call.settings.upper_dir("")):
        return None  # the same, mounted in place
    engine.hides_layers = True
    return engine


def _new_volumes(
    call: "Call", found: "Bundle", named: "Source", engine: "EngineOverlay | None"
) -> "NewVolumes | None":
    """The volumes that the engine has filled from what it sees, which is not the tree."""
    if call.line.verb != "create" or not found.may_have_volumes:
        return None
    if not named.is_stub and engine is None:
        return None
    from clipshim.shim import volumes  # only where there may be some

    wanted = volumes.find_volumes(found, call.line.container_id)
    if not wanted:
        return None
    return volumes.NewVolumes(found, wanted, has_engines_copy=named.is_stub)


def _planned(
    call: "Call",
    found: "Bundle",
    named: "Source",
    key: str,
    engine: "EngineOverlay | None",
) -> ContainerState:
    settings = call.settings
    directory = settings.container_dir(key)
    values: dict[str, Any] = {
        "version": STATE_VERSION,
        "id": call.line.container_id,
        "cid": key,
        "root": call.root,
        "bundle": found.path,
        "kind": "own" if engine is None else "graft",
        "rootfs": f"{directory}/rootfs" if engine is None else engine.target,
        "lowers": [],
        "upper": settings.upper_dir(key) if engine is None else engine.upper,
        "work": settings.work_dir(key) if engine is None else engine.work,
        "runtime": call.runtime,
    }
    if engine is None:
        if named.is_stub:  # no kernel overlay of the engine's: its rootfs goes above the tree
            values["lowers"] = [found.rootfs]
        if found.maps_users and os.path.isdir(found.rootfs):
            # the container's root, an ordinary user of the host, cannot enter run_dir; whoever made
            # the bundle has seen to it that it can enter root.path
            values["in_place"] = True
            values["rootfs"] = os.path.realpath(found.rootfs)
    else:
        values["lowers"] = [] if engine.hides_layers else list(engine.lowers)
        values["engine_options"] = list(engine.options)
    return ContainerState(directory, values)


def _request_tree(settings: "Settings", key: str, named: "Source") -> "rootfs.Tree | None":
    request = {"op": "mount", "container": key, "cid": key, "source": named.request}
    fds = [named.fd] if named.fd >= 0 else []
    patience_s = _OPTIONAL_PATIENCE_S if named.is_optional else settings.daemon_timeout_s
    try:
        reply = daemon_start.ask_daemon(
            settings,
            request,
            fds=fds,
            at_most_s=patience_s,
            container_dir=settings.container_dir(key),
        )
    except ClipError:
        if named.is_optional:  # an ordinary container must not fail for what is wrong with clipshim
            return None
        raise
    finally:
        named.close()  # a stub's index lies on the overlay that is about to be replaced
    try:
        return rootfs.Tree(reply.values, reply.take_fd())
    finally:
        reply.close()


def _user_namespace(found: "Bundle", undo: Undo) -> int:
    """A descriptor that the roll-back may need too; -1 without a user namespace."""
    if not found.maps_users:
        return -1
    from clipshim.shim import idmap  # only with a user namespace

    fd = idmap.user_namespace(found)
    if fd >= 0:
        undo.push(os.close, fd)
    return fd


def _remove_stale(call: "Call", key: str) -> "ContainerState | None":
    """Takes down what a crash left under this key; returns the state that a restore uses."""
    stale = load_for_removal(call.settings, key, call.line.container_id, call.root)
    if stale is None:
        return None
    if call.line.verb == "restore" and stale.is_checkpointed:
        return stale
    teardown.tear_down(call.settings, stale, keep_directory=True)
    return None


def _was_checkpointed(call: "Call", key: str) -> bool:
    state = load_for_removal(call.settings, key, call.line.container_id, call.root)
    return state is not None and state.is_checkpointed


def _other_state(settings: "Settings", found: "Bundle") -> "ContainerState | None":
    """The container that root.path has been rewritten for, if it is another's rootfs."""
    path = found.root_path
    prefix, suffix = f"{settings.run_dir}/", "/rootfs"
    if not path.startswith(prefix) or not path.endswith(suffix):
        return None
    other = path[len(prefix) : -len(suffix)]
    if not other or "/" in other:
        return None
    try:
        return load_state(settings, other)
    except StoreError:
        return None


def _original_root(settings: "Settings", found: "Bundle") -> str:
    """root.path as the bundle's author wrote it, even if another container rewrote it."""
    path = found.root_path
    if not path.startswith(f"{settings.run_dir}/") or not path.endswith("/rootfs"):
        return path
    other = _other_state(settings, found)
    return (other.text("original_root") if other else "") or "rootfs"


def _original_config(settings: "Settings", found: "Bundle") -> bytes:
    """config.json as the bundle's author wrote it, as far as that is known."""
    other = _other_state(settings, found)
    kept = bundle.kept_original(other.kept_config, found) if other else b""
    return kept or found.raw

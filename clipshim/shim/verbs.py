"""The runtime's verbs that are not simply handed over: what happens around the low-level runtime.

Everything for a container that names no index is decided here with as few modules as possible; a
test compares what is loaded with a literal list.
"""

import os

from clipshim.errors import ClipError, PolicyError, remedy
from clipshim.shim import argv, bundle, reporting, runtimes, source
from clipshim.shim.trace import trace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

    from clipshim.settings import Settings
    from clipshim.shim.state import ContainerState

_LOCK_WAIT_S = 30.0


class Call:
    """One call of the runtime by an engine."""

    __slots__ = ("_runtime", "_settings", "arguments", "line", "own_program")

    def __init__(self, arguments: "Sequence[str]", *, runtime: str, own_program: str) -> None:
        self.arguments = list(arguments)
        self.line = argv.parse(self.arguments)
        self.own_program = own_program
        self._runtime = runtime
        self._settings: Settings | None = None

    @property
    def settings(self) -> "Settings":
        """The configuration, read when it is first needed."""
        if self._settings is None:
            from clipshim.settings import load_settings

            self._settings = load_settings()
        return self._settings

    @property
    def runtime(self) -> str:
        """The low-level runtime; what the launcher found, or else by the configuration."""
        if not self._runtime:
            self._runtime = runtimes.find_runtime(self.settings.runtimes, self.own_program)
        return self._runtime

    @property
    def root(self) -> str:
        """The low-level runtime's state directory, links resolved."""
        from clipshim.shim.state import default_root

        return os.path.realpath(self.line.options.get("root") or default_root(self.runtime))

    def hand_over(self) -> "NoReturn":
        """Becomes the low-level runtime, as if the engine had called it."""
        from clipshim.shim import child

        child.replace(self.runtime, self.arguments)

    def run_runtime(self, *, done_with: "Callable[[], bool] | None" = None) -> int:
        """Runs the low-level runtime as a child; returns its wait status. See child.run."""
        from clipshim.shim import child

        return child.run(self.runtime, self.arguments, done_with=done_with)


def main(arguments: "Sequence[str]", *, runtime: str, own_program: str) -> "NoReturn":
    """Carries out one call and ends the process as the low-level runtime would have."""
    call = Call(arguments, runtime=runtime, own_program=own_program)
    try:
        status = _dispatch(call)
    except ClipError as exc:
        reporting.report_error(str(exc), call.line.options)
        os._exit(1)  # engines know 1; exit codes of our own are for our own commands
    except Exception as exc:  # a bug must reach the engine as an error, not as a traceback
        hint = remedy(exc) if isinstance(exc, OSError) else None
        text = f"clipshim: {type(exc).__name__}: {exc}{f' ({hint})' if hint else ''}"
        reporting.report_error(text, call.line.options)
        if os.environ.get("CLIPSHIM_DEBUG"):
            raise
        os._exit(1)
    from clipshim.shim import child

    child.leave_with(status)


def _dispatch(call: Call) -> int:
    from clipshim.shim.state import is_valid_id

    line = call.line
    verb = line.verb
    if verb == "hook":
        from clipshim.shim import hook

        return hook.run(call.settings, call.arguments[line.verb_index + 1 :])
    asks_help = line.switches & {"help", "version"}
    if not line.understood or asks_help or not is_valid_id(line.container_id):
        call.hand_over()
    if verb in ("create", "run", "restore"):
        return create(call)
    if verb == "delete":
        return delete(call)
    if verb == "checkpoint":
        return checkpoint(call)
    return call.hand_over()


def create(call: Call) -> int:
    """create, run and restore: the rootfs first, then the runtime; everything or nothing."""
    found = bundle.read_bundle(call.line.options.get("bundle") or ".")
    if found is None or not source.names_index(found):
        call.hand_over()
    settings = call.settings
    named = source.find_source(found, settings)
    if named is None or os.path.lexists(f"{call.root}/{call.line.container_id}"):
        call.hand_over()  # in the second case it says that the ID exists
    if os.geteuid() != 0:
        raise PolicyError(
            f"container {call.line.container_id}: a lazily loaded root needs to be mounted by root"
        )
    from clipshim.shim import create as creation  # only with an index

    try:
        status = creation.create_with_index(call, found, named)
    finally:
        named.close()
    if status is None:
        call.hand_over()
    return status


def delete(call: Call) -> int:
    """delete: the runtime first; then what it has forgotten is taken down."""
    state = _recorded(call)
    if state is None:
        return _delete_unrecorded(call)
    trace("delete-before-runc")
    status = call.run_runtime()
    trace("delete-after-runc")
    _clean_up(call, state, keep_upper=False)
    return status


def _delete_unrecorded(call: Call) -> int:
    """delete of a container without a plan: at most, a create was killed right at its start."""
    from clipshim.shim.state import ContainerLock, container_key, load_state
    from clipshim.shim.teardown import forget

    key = container_key(call.line.container_id, call.root)
    directory = call.settings.container_dir(key)
    if os.geteuid() != 0 or not os.path.lexists(f"{directory}/lock"):
        call.hand_over()
    status = call.run_runtime()
    with ContainerLock(call.settings, key, wait_s=_LOCK_WAIT_S):
        if load_state(call.settings, key) is None:
            forget(call.settings, directory)
    return status


def checkpoint(call: Call) -> int:
    """checkpoint: unless the container goes on running, its mounts go; restore needs the rest."""
    state = _recorded(call)
    if state is None or call.line.switches & {"leave-running", "pre-dump"}:
        call.hand_over()
    # before the runtime ends the container: from then on its hooks and the daemon clean up
    state.save(checkpointed=True)
    status = call.run_runtime()
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        _clean_up(call, state, keep_upper=True)
    elif not state.is_gone():
        state.save(checkpointed=False)
    return status


def _recorded(call: Call) -> "ContainerState | None":
    from clipshim.shim.state import container_key, load_for_removal

    if os.geteuid() != 0:
        return None
    key = container_key(call.line.container_id, call.root)
    return load_for_removal(call.settings, key, call.line.container_id, call.root)


def _clean_up(call: Call, state: "ContainerState", *, keep_upper: bool) -> None:
    """Takes a container down if the runtime has forgotten it.

    The lock is taken only now: a `run` in the foreground holds it until the runtime ends, which a
    delete from elsewhere brings about.
    """
    from clipshim.shim.state import ContainerLock, load_for_removal
    from clipshim.shim.teardown import tear_down

    if not state.is_gone():
        return
    with ContainerLock(call.settings, state.key, wait_s=_LOCK_WAIT_S):
        current = load_for_removal(call.settings, state.key, call.line.container_id, call.root)
        if current is None:
            from clipshim.shim.teardown import forget

            forget(call.settings, state.directory)  # whoever held the lock has done it
        elif current.is_gone():
            tear_down(call.settings, current, keep_upper=keep_upper)
            if keep_upper:
                current.save(checkpointed=True)

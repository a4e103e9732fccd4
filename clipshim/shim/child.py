"""Runs the low-level runtime: in our place, or as a child whose end we wait for.

As a child it gets everything that it would have got from the engine: stdio, every inherited
descriptor (ours are close-on-exec), the caller's environment, signal mask and process group.
"""

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence
    from typing import NoReturn
else:
    import _signal as signal  # the C half only: `signal` builds enums, 3 ms

_SI_USER = 0  # asm-generic/siginfo.h: from here down a process sent it, above the kernel did
# As runc, which passes every signal that it can catch on to the container. Not what ends us by our
# own fault, and not SIGURG, which Go sends to itself.
_NOT_FORWARDED = {
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGCHLD,
    signal.SIGURG,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGTRAP,
    signal.SIGSYS,
    signal.SIGABRT,
}
_LOOK_EVERY_S = 0.005
_ignores_children = False  # the caller's setting of SIGCHLD, once keep_children() has changed it


def run(
    program: str, arguments: "Sequence[str]", *, done_with: "Callable[[], bool] | None" = None
) -> int:
    """Runs the runtime and waits; returns the wait status (os.WIFEXITED and so on).

    `done_with` is asked again and again while the runtime runs, until it says yes.
    """
    keep_children()
    watched = signal.valid_signals() - _NOT_FORWARDED | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    own_pid = os.getpid()
    try:
        child = os.fork()
        if child == 0:
            _pass_sockets_on(own_pid)
            _exec_in_child(program, arguments, before)
        while True:
            if done_with is None:
                info = signal.sigwaitinfo(watched)
            else:
                if done_with():
                    done_with = None
                    continue
                found = signal.sigtimedwait(watched, _LOOK_EVERY_S)
                if found is None:
                    continue
                info = found
            if info.si_signo == signal.SIGCHLD:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended == child:
                    return status
            elif info.si_code <= _SI_USER:
                # a terminal's Ctrl-C (kernel) reaches the child by itself: same process group
                os.kill(child, info.si_signo)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_quietly(command: "Sequence[str]") -> "tuple[int, str]":
    """Runs a helper that may stay in the background; returns its exit code and what it wrote.

    It inherits nothing of the engine's: no descriptor, no environment, no session.
    """
    keep_children()
    output = os.memfd_create("clipshim-helper", os.MFD_CLOEXEC)
    try:
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                null = os.open("/dev/null", os.O_RDWR)
                for number, fd in ((0, null), (1, output), (2, output)):
                    os.dup2(fd, number)
                os.closerange(3, 65536)
                _restore_signals()
                os.execve(command[0], list(command), {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})  # noqa: S606
            finally:
                os._exit(127)
        _, status = os.waitpid(child, 0)
        text = os.fsdecode(os.pread(output, 4096, 0)).strip()
        return os.waitstatus_to_exitcode(status), text
    finally:
        os.close(output)


def keep_children() -> None:
    """Lets children be waited for, whatever the caller has set.

    A caller may ignore SIGCHLD, which survives execve: children would then end without a status
    and without a signal (wait(2), "NOTES"). The runtime gets the caller's setting back.
    """
    global _ignores_children
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _ignores_children = True


def leave_with(status: int) -> "NoReturn":
    """Ends as the child did: with its exit code, or by its signal."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        os._exit(128 + number)
    os._exit(os.waitstatus_to_exitcode(status))


def replace(program: str, arguments: "Sequence[str]") -> "NoReturn":
    """Becomes the runtime."""
    _restore_signals()
    if _ignores_children:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.execve(program, [program, *arguments], os.environ)  # noqa: S606 - no shell is meant


def _pass_sockets_on(for_pid: int) -> None:
    """In the child: sockets that were passed to us are the runtime's (sd_listen_fds(3)).

    Who passes them names the process that may take them; runc would not take them for its own.
    """
    if os.environ.get("LISTEN_PID") == str(for_pid):
        os.environ["LISTEN_PID"] = str(os.getpid())


def _exec_in_child(
    program: str, arguments: "Sequence[str]", mask: "set[int | signal.Signals]"
) -> None:
    try:
        # an engine that dies takes the runtime with it (containerd sets PDEATHSIG on us)
        from clipshim.mounts import syscalls  # loaded already where there is an index

        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        replace(program, arguments)
    except BaseException as exc:
        os.write(2, f"clipshim: {program}: {exc}\n".encode("utf-8", "backslashreplace"))
    finally:
        os._exit(127)


def _restore_signals() -> None:
    """Undoes what Python did at its start: it ignores SIGXFSZ and SIGPIPE, and handles SIGINT.

    A SIGINT that the caller ignores (a shell's background job) Python leaves so, and so do we.
    """
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

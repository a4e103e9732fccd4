"""The command line: finds the command, runs it, turns errors into a message and an exit code.

Not for the verbs of runc: those never come this way, the launcher hands them to the shim.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import re
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from clipshim import __version__
from clipshim.cli.terminal import print_error, printable
from clipshim.errors import ClipError, remedy

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "clipshim"

# In the order of --help: name, module below clipshim.cli. A module has one function, `command`,
# whose docstring is the command's help.
COMMANDS = {
    "index": "index_command",
    "inspect": "inspect_command",
    "bundle": "bundle_command",
    "mount": "mount_command",
    "umount": "umount_command",
    "push": "push_command",
    "pull": "pull_command",
    "stub": "stub_command",
    "daemon": "daemon_command",
    "status": "status_command",
    "doctor": "doctor_command",
    "gc": "gc_command",
    "complete": "complete_command",
    "report": "report_command",
    "install": "install_command",
    "uninstall": "uninstall_command",
}
LOG_LEVELS = ("debug", "info", "warning", "error")


class _Debug:
    """Whether an unexpected error shows its traceback; one a process, set by --debug."""

    enabled = False


def _common_options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Log everything; show tracebacks of errors.")
    ] = False,
    log_level: Annotated[
        str | None,
        typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error."),
    ] = None,
) -> None:
    """Options that every command takes."""


def _set_common(_context: Any, parameter: Any, value: Any) -> Any:
    if parameter.name == "debug" and value:
        _Debug.enabled = True
        logging.getLogger().setLevel(logging.DEBUG)
    elif parameter.name == "log_level" and value is not None:
        if value not in LOG_LEVELS:
            raise typer.BadParameter(f"expected one of {', '.join(LOG_LEVELS)}, got {value!r}")
        logging.getLogger().setLevel(value.upper())
    return value


class LazyGroup(TyperGroup):
    """A command group that imports a command's module when it is asked for that command."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, with the options that all commands share; None for an unknown name."""
        module_name = COMMANDS.get(cmd_name)
        if module_name is None:
            return None
        module = importlib.import_module(f"clipshim.cli.{module_name}")
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        settings = {"ignore_unknown_options": False}
        app.command(cmd_name, context_settings=settings)(module.command)
        command: Any = typer.main.get_command(app)
        template = typer.Typer(add_completion=False)
        template.command()(_common_options)
        for parameter in typer.main.get_command(template).params:
            if parameter.name in ("debug", "log_level"):
                parameter.expose_value = False
                parameter.callback = _set_common
                command.params.append(parameter)
        return command


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        raise typer.Exit


def _group_options(
    version: Annotated[
        bool,
        # Not in --help: the launcher answers `clipshim --version` with the runtime's version.
        typer.Option("--version", callback=_version, is_eager=True, hidden=True),
    ] = False,
) -> None:
    """Start containers before their image has arrived.

    \b
    clipshim index IMAGE              makes an index of an image, once
    clipshim bundle IMAGE DIR         writes a bundle that runs from that index
    clipshim run --bundle DIR ID      runs it: bytes are fetched as they are read

    As a runtime (create, start, run, delete, ... with runc's own options) clipshim is called by
    engines: see `clipshim install --help`.
    """


def build_app() -> Any:
    """The whole command line as one click command."""
    app = typer.Typer(cls=LazyGroup, add_completion=False, rich_markup_mode=None)
    app.callback(
        epilog=f"This is version {__version__}; --version is answered by the low-level runtime."
    )(_group_options)
    return typer.main.get_command(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code and prints the error, if there is one."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(levelname)s: %(message)s"
    )
    _Debug.enabled = False
    argv = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if argv[0] == "help":
        argv = [*argv[1:2], "--help"]
    try:
        code = build_app().main(args=argv, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # The reader of our output is gone; Python's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("\n")
        return 130
    except Exception as exc:
        return _report(exc)


def _report(exc: Exception) -> int:
    if isinstance(exc, ClipError):
        message, hint, code = exc.message, exc.hint, exc.exit_code
    elif hasattr(exc, "format_message"):  # click's, which typer has under two module names
        message, hint, code = exc.format_message(), _usage_hint(exc), 2
    elif isinstance(exc, OSError):
        where = f"{os.fsdecode(exc.filename)}: " if exc.filename else ""
        message, hint, code = f"{where}{exc.strerror or exc}", remedy(exc), 1
        if isinstance(exc, PermissionError) and os.geteuid() != 0:
            hint = "run it as root"
    else:
        message = f"internal error: {type(exc).__name__}: {exc}"
        hint, code = "run it again with --debug and report what it prints", 1
    if _Debug.enabled:
        traceback.print_exception(exc, file=sys.stderr)
    print_error(printable(message), printable(hint) if hint else None)
    return code


def _usage_hint(exc: Any) -> str:
    wrong = re.match(r"No such command '(.*)'", exc.format_message())
    near = difflib.get_close_matches(wrong[1], COMMANDS, n=1) if wrong else []
    if near:
        return f"did you mean `{PROGRAM} {near[0]}`?"
    context = getattr(exc, "ctx", None)
    return f"see `{context.command_path if context else PROGRAM} --help`"

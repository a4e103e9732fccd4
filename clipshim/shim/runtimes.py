"""Finds the low-level runtime. launcher.c does the same for the verbs that it hands over itself."""

import os

from clipshim.errors import RuntimeNotFoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# podman calls runtimes with no PATH, and runc lives in sbin
FIXED_DIRECTORIES = (
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
)


def find_runtime(names: "Sequence[str]", own_program: str) -> str:
    """The path of the first runtime that exists and is not clipshim itself.

    Names are looked up in PATH and then in fixed directories. Raises RuntimeNotFoundError.
    """
    own = _identity(own_program)
    path = os.environ.get("PATH", "").split(":")
    directories = [entry for entry in path if entry.startswith("/")] + list(FIXED_DIRECTORIES)
    for name in names:
        candidates = [name] if "/" in name else [f"{entry}/{name}" for entry in directories]
        for candidate in candidates:
            if not candidate.startswith("/") or not os.access(candidate, os.X_OK):
                continue
            if os.path.isfile(candidate) and (own is None or _identity(candidate) != own):
                return candidate
    raise RuntimeNotFoundError(
        f"no low-level runtime: looked for {', '.join(names) or 'none'} "
        f"in PATH and {':'.join(FIXED_DIRECTORIES)}",
        hint="install runc, or set runtimes in the configuration",
    )


def find_program(name: str) -> str:
    """The path of a program in the fixed directories, empty if there is none."""
    for directory in FIXED_DIRECTORIES:
        if os.access(f"{directory}/{name}", os.X_OK):
            return f"{directory}/{name}"
    return ""


def _identity(path: str) -> "tuple[int, int] | None":
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino

"""Start of the shim: `python3 -I -S main.py RUNTIME LAUNCHER ARGUMENTS…`, run by launcher.c.

Python starts without site-packages and without anything of the caller's environment: the launcher
puts a prefix before each variable, and this takes it off again for the low-level runtime, which
gets exactly what the engine passed. It is compiled anew at each start, so it is short.
"""

import os
import sys

_PREFIX = b"CLIPSHIM_CALLER:"


def _restore_environment() -> None:
    """Makes os.environ the caller's, without what Python added (LC_CTYPE)."""
    with open("/proc/self/environ", "rb") as file:
        entries = file.read().split(b"\0")
    if not any(entry.startswith(_PREFIX) for entry in entries):
        return  # started by hand
    os.environ.clear()
    for entry in entries:
        name, equals, value = entry.removeprefix(_PREFIX).partition(b"=")
        # of doubled names the first counts, as for getenv(3)
        if entry.startswith(_PREFIX) and name and equals and name not in os.environb:
            os.environb[name] = value


if __name__ == "__main__":
    _restore_environment()
    sys.path.insert(0, __file__.removesuffix("/clipshim/shim/main.py"))
    from clipshim.shim.verbs import main

    main(sys.argv[3:], runtime=sys.argv[1], own_program=sys.argv[2])

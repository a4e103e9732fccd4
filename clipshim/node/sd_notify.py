"""systemd's protocols: sd_notify(3), the file descriptor store, and LISTEN_FDS.

Standard library only, and silent where systemd is not.
"""

import array
import os
import socket
from collections.abc import Sequence

LISTEN_FDS_START = 3


def notify(state: str, fds: Sequence[int] = ()) -> bool:
    """Sends a state such as READY=1; False if nobody listens or it could not be sent."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    ancillary = []
    if fds:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(address)
            sock.sendmsg([state.encode()], ancillary)
        except OSError:
            return False
    return True


def store_fd(name: str, fd: int) -> bool:
    """Gives systemd a copy of `fd`, to be handed back when the unit starts again."""
    # FDPOLL=0: systemd must not drop the fd when it polls readable or hung up.
    return notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [fd])


def forget_fd(name: str) -> bool:
    """Takes a stored descriptor back out of systemd's store."""
    return notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def inherited_fds() -> dict[str, int]:
    """The descriptors that systemd handed over, by name; unset in the environment afterwards."""
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    count = os.environ.pop("LISTEN_FDS", "")
    pid = os.environ.pop("LISTEN_PID", "")
    if not count.isdigit() or pid != str(os.getpid()):
        return {}
    found = {}
    for i in range(int(count)):
        fd = LISTEN_FDS_START + i
        os.set_inheritable(fd, False)
        found[names[i] if i < len(names) and names[i] else f"fd{fd}"] = fd
    return found

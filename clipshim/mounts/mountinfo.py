r"""Reads /proc/PID/mountinfo (proc(5)): what is mounted where, with which options.

Names are str with surrogate escapes, as os.fsdecode gives them. The kernel writes space, tab,
newline and backslash in names as `\ooo`, and commas inside of super options too; overlayfs has an
escaping of its own beneath that, which graft.py undoes, not this module.
"""

import os


class Mount:
    """One line of mountinfo."""

    __slots__ = (
        "device",
        "fstype",
        "mount_id",
        "mount_point",
        "options",
        "parent_id",
        "propagation",
        "root",
        "source",
        "super_options",
    )

    mount_id: int
    parent_id: int
    device: int  # st_dev of what is mounted, but for btrfs and the like
    root: str
    mount_point: str
    options: str  # of this mount, comma-separated
    propagation: str  # "shared:1 master:2", empty when private
    fstype: str
    source: str
    super_options: "tuple[str, ...]"  # of the superblock: `name` or `name=value`

    def __init__(self, line: bytes) -> None:
        fields = line.split(b" ")
        # after the sixth field any number of propagation fields, then "-"; field 6 cannot hold a
        # bare "-" itself because the kernel writes spaces in names as \040
        dash = fields.index(b"-", 6)
        self.mount_id, self.parent_id = int(fields[0]), int(fields[1])
        major, _, minor = fields[2].partition(b":")
        self.device = os.makedev(int(major), int(minor))
        self.root, self.mount_point = unescape(fields[3]), unescape(fields[4])
        self.options = os.fsdecode(fields[5])
        self.propagation = os.fsdecode(b" ".join(fields[6:dash]))
        self.fstype = unescape(fields[dash + 1])
        self.source = unescape(fields[dash + 2])
        raw_options = b" ".join(fields[dash + 3 :]).split(b",")
        self.super_options = tuple(unescape(option) for option in raw_options)

    def __repr__(self) -> str:
        return f"<Mount {self.mount_id} {self.fstype} at {self.mount_point!r}>"


def unescape(raw: bytes) -> str:
    r"""Undoes the kernel's `\ooo`; anything else after a backslash stays as it is."""
    if b"\\" not in raw:
        return os.fsdecode(raw)
    first, *rest = raw.split(b"\\")
    parts = [first]
    for piece in rest:
        digits = piece[:3]
        if len(digits) == 3 and all(0x30 <= digit <= 0x37 for digit in digits):
            parts.append(bytes((int(digits, 8) & 0xFF,)) + piece[3:])
        else:
            parts.append(b"\\" + piece)
    return os.fsdecode(b"".join(parts))


def read_mounts(process: "int | str" = "self") -> list[Mount]:
    """Every mount that a process sees, in the order of mountinfo (later ones cover earlier)."""
    return [Mount(line) for line in _lines(process)]


def mount_of_fd(fd: int) -> Mount:
    """The mount that an open file lies on, by its mount ID; raises LookupError when detached."""
    wanted = mount_id_of_fd(fd)
    prefix = b"%d " % wanted
    for line in _lines("self"):
        if line.startswith(prefix):
            return Mount(line)
    raise LookupError(f"mount {wanted} is not in this mount namespace")


def mount_id_of_fd(fd: int) -> int:
    """The mount ID of an open file, from fdinfo (proc(5))."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        for line in file:
            if line.startswith(b"mnt_id:"):
                return int(line[7:])
    raise LookupError(f"no mnt_id in fdinfo of fd {fd}")


def mount_at(path: str) -> "Mount | None":
    """The topmost mount whose mount point is exactly `path` (absolute, resolved)."""
    found = b""
    for line in _lines("self"):  # on a node with many containers most lines are not worth a Mount
        if unescape(line.split(b" ", 5)[4]) == path:
            found = line
    return Mount(found) if found else None


def is_mount_point(path: str) -> bool:
    """Whether something is mounted at `path`, at a cost that other mounts do not add to.

    Does not ask the file system that is mounted there. Raises OSError if there is no directory.
    """
    here = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        parent = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return mount_id_of_fd(here) != mount_id_of_fd(parent)
        finally:
            os.close(parent)
    finally:
        os.close(here)


def mounts_beneath(path: str, mounts: "list[Mount] | None" = None) -> list[Mount]:
    """Mounts at `path` and below it, in the order of mountinfo."""
    inside = path.rstrip("/") + "/"
    return [
        mount
        for mount in (read_mounts() if mounts is None else mounts)
        if mount.mount_point == path or mount.mount_point.startswith(inside)
    ]


def _lines(process: "int | str") -> list[bytes]:
    with open(f"/proc/{process}/mountinfo", "rb") as file:
        return file.read().split(b"\n")[:-1]

"""Checks one large index of the local store, in a process of its own.

An index is hostile input, and checking what a small file unpacks to may take much memory: here it
is bounded, and the server's stays what it is. The verdict is kept beside the index (images.py).
"""

import argparse
import resource
import sys

from clipshim.errors import ClipError
from clipshim.node.images import ImageNames
from clipshim.node.kept_settings import settings_of_daemon
from clipshim.node.resolver import check_index

MEMORY_BYTES = 4 << 30  # an image of a million files takes 0.4 GiB


def main() -> int:
    """Entry point of `python -I -m clipshim.node.check_worker DIGEST`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("digest")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        check_index(ImageNames(settings_of_daemon()), options.digest)
    except (ClipError, OSError) as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    except MemoryError:
        sys.stderr.write(f"index {options.digest}: too large to be checked\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Indexes one image for the daemon, in a process of its own: `index_on_demand`."""

import argparse
import sys
from pathlib import Path

from clipshim.errors import ClipError
from clipshim.index.builder import BuildOptions, build_index
from clipshim.node.kept_settings import settings_of_daemon
from clipshim.registry.access import RegistryAccess
from clipshim.registry.sources import open_source


def main() -> int:
    """Entry point of `python -I -m clipshim.node.index_worker IMAGE OUTPUT [--anonymous]`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("image")
    parser.add_argument("output", type=Path)
    parser.add_argument("--anonymous", action="store_true")
    options = parser.parse_args()
    try:
        access = RegistryAccess.from_settings(settings_of_daemon(), anonymous=options.anonymous)
        source = open_source(options.image, platform=None, access=access)
        build_index(source, options.output, BuildOptions(), None)
    except (ClipError, OSError) as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

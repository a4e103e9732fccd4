"""`python -m clipshim.cli`: what the launcher executes for every command that is not runc's."""

import sys

from clipshim.cli.app import main

if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env bash
# The long test: random starts, reads, deaths and registry faults, every byte verified.
#
#   sudo ./tests/soak.sh --minutes 60 --seed 1
#   sudo ./tests/soak.sh --minutes 10 --server-kills 1000 --containers 40 --readers 50 --images 4
#
# The seed is printed: the same seed makes the same decisions. The exit status is 0 only if no
# container failed to start, no read failed, no byte was wrong and nothing was left behind.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ "$(id -u)" -eq 0 ] || { echo "needs root" >&2; exit 1; }
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
unset PYTHONPATH PYTHONHOME CLIPSHIM_CONFIG
CLIPSHIM_TEST_SETUP_ONLY=1 ./tests/run.sh
/usr/bin/python3 tests/support/leftovers.py sweep
exec tini -s -- .venv/bin/python -P -B tests/support/soak.py "$@"

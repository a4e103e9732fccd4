#!/usr/bin/env bash
# The long test: random container starts, reads, evictions, kills of every process of the node
# daemon, orderly replacements and registry faults, each byte that is read compared with what the
# image holds. Does the set-up of tests/run.sh first. Everything it makes lies below
# /var/tmp/clipshim-test-<id> and is removed at the end.
#
#   sudo ./tests/soak.sh                          an hour of everything
#   sudo ./tests/soak.sh --minutes 10 --seed 3    a shorter one, repeatable in its choices
#   sudo ./tests/soak.sh --server-kills 1000      kill the server so often, under reading
#   sudo ./tests/soak.sh --containers 500         so many containers of one image at once
#   sudo ./tests/soak.sh --images 100             so many images mounted at once
#   sudo ./tests/soak.sh --readers 1000           so many readers of uncached data at once
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for word in "$@"; do
    case "$word" in
    -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
        exit 0
        ;;
    esac
done
CLIPSHIM_TEST_SETUP_ONLY=1 ./tests/run.sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin
unset PYTHONPATH CLIPSHIM_CONFIG
/usr/bin/python3 tests/support/leftovers.py sweep
exec .venv/bin/python -P -B tests/support/soak.py "$@"

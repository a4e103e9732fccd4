#!/usr/bin/env bash
# Runs the benches, or those named, and prints tables: medians, and ratios within the same run.
#
#   sudo ./integration/bench/run.sh                 start reads index docker
#   sudo ./integration/bench/run.sh start reads     only these
#   sudo ./integration/bench/run.sh start --runs 5  options go to a single bench
#
# Set-up is that of tests/run.sh. Other load on the machine spoils the figures.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

[ "$(id -u)" -eq 0 ] || { echo "needs root" >&2; exit 1; }
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
CLIPSHIM_TEST_SETUP_ONLY=1 ./tests/run.sh
/usr/bin/python3 tests/support/leftovers.py sweep

benches=()
while [ $# -gt 0 ] && [[ $1 != -* ]]; do
    [ -f "integration/bench/bench_$1.py" ] || { echo "no bench named $1" >&2; exit 2; }
    benches+=("$1")
    shift
done
[ ${#benches[@]} -gt 0 ] || benches=(start reads index docker)
for bench in "${benches[@]}"; do
    printf '\n== %s\n' "$bench"
    tini -s -- .venv/bin/python -B "integration/bench/bench_$bench.py" "$@"
done

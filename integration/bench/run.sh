#!/usr/bin/env bash
# Runs the benches, or those named, and prints Markdown tables: medians, ratios within the same
# run, budgets and whether they are met. It never fails because of a figure.
#
#   sudo ./integration/bench/run.sh                  verbs start burst reads memory docker index
#   sudo ./integration/bench/run.sh start reads      only these
#   sudo ./integration/bench/run.sh --quick          fewer measurements
#   sudo ./integration/bench/run.sh verbs --runs 99  options go to every bench
#
# Set-up is that of tests/run.sh. Everything lies below /var/tmp/clipshim-test-<id> and is gone in
# the end. Other load on the machine spoils times, and ratios less so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

[ "$(id -u)" -eq 0 ] || { echo "integration/bench/run.sh: needs root" >&2; exit 1; }
benches=()
options=()
while [ $# -gt 0 ]; do
    case $1 in
        -*) options=("$@"); break ;;
    esac
    [ -f "integration/bench/bench_$1.py" ] || { echo "no bench named $1" >&2; exit 2; }
    benches+=("$1")
    shift
done
[ ${#benches[@]} -gt 0 ] || benches=(verbs start burst reads memory docker index)

export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
unset PYTHONPATH PYTHONHOME CLIPSHIM_CONFIG DOCKER_HOST DOCKER_CONFIG
CLIPSHIM_TEST_SETUP_ONLY=1 ./tests/run.sh >&2
/usr/bin/python3 tests/support/leftovers.py sweep

failed=()
for bench in "${benches[@]}"; do
    printf '\n## %s\n\n' "$bench"
    tini -s -- .venv/bin/python -B "integration/bench/bench_$bench.py" "${options[@]}" ||
        failed+=("$bench")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }

#!/usr/bin/env bash
# Runs lint, types, unit and system tests on a machine with Debian 12, Ubuntu 24.04 or newer, and
# does all the set-up: apt packages that are missing, a virtual environment in .venv from the lock
# files, and the product installed in it from a wheel, so that the tests import what a user would
# install.
#
#   sudo ./tests/run.sh                       everything
#   sudo ./tests/run.sh tests/unit -k tar     arguments go to pytest
#   CLIPSHIM_TEST_SETUP_ONLY=1                stop after the set-up
#   CLIPSHIM_TEST_SKIP_LINT=1                 only pytest
#
# Every step runs, whatever failed before it. The exit status is 0 only if all of them passed.
# Everything that a run makes lies below /var/tmp/clipshim-test-<id>; what a killed run left
# there is removed by the next one.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# a|b is whichever comes first of what the distribution has: Debian 13 has split the client from
# docker.io, and the docker-compose of Ubuntu 24.04 is too old for its Docker.
TEST_PACKAGES=(
    attr buildah build-essential busybox-static ca-certificates conmon containerd crun curl
    debootstrap 'docker-cli|docker.io' 'docker-compose-v2|docker-compose' docker-registry
    docker.io e2fsprogs erofs-utils fuse-overlayfs fuse3 git iproute2 isal jq libarchive-tools
    libcap2-bin libfuse3-dev pigz pkg-config podman procps psmisc python3-dev python3-venv
    python3-yaml runc skopeo strace tini umoci zstd
)
VENV="$PWD/.venv"

say() { printf '== %s\n' "$*"; }

die() {
    printf 'tests/run.sh: %s\n' "$*" >&2
    exit 1
}

# Networks fail for a moment: tries a command up to five times.
retry() {
    local attempt
    for attempt in 1 2 3 4 5; do
        "$@" && return 0
        say "attempt $attempt failed: $*" >&2
        sleep $((attempt * 3))
    done
    return 1
}

installed() {
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# The first of the names a|b|c that is installed or that apt knows, or else the last one.
choose_package() {
    local package
    for package in ${1//|/ }; do
        ! installed "$package" && [ -z "$(apt-cache show "$package" 2>/dev/null)" ] || break
    done
    printf '%s\n' "$package"
}

missing_packages() {
    local names package
    for names in "${TEST_PACKAGES[@]}"; do
        package=$(choose_package "$names")
        installed "$package" || printf '%s\n' "$package"
    done
}

install_packages() {
    local missing
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -eq 0 ] && return 0
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    retry apt-get -q -o DPkg::Lock::Timeout=300 update ||
        die "apt-get update failed"
    mapfile -t missing < <(missing_packages)
    retry apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends \
        "${missing[@]}" </dev/null || die "apt-get install failed"
}

# The environment is made anew when a lock file or the interpreter has changed; the product is
# installed again at every run, because the code may have changed.
make_environment() {
    local stamp wheel_dir
    stamp=$(cat requirements-build.lock requirements-dev.lock <(/usr/bin/python3 -VV) |
        sha256sum | cut -d' ' -f1)
    if [ "$(cat "$VENV/stamp" 2>/dev/null)" != "$stamp" ] || ! "$VENV/bin/python" -c ''; then
        say "making the virtual environment"
        rm -rf "$VENV"
        /usr/bin/python3 -m venv "$VENV" || die "python3 -m venv failed"
        local requirements
        for requirements in requirements-build.lock requirements-dev.lock; do
            retry "$VENV/bin/pip" install -q --disable-pip-version-check --no-build-isolation \
                --require-hashes -r "$requirements" </dev/null ||
                die "installing $requirements failed"
        done
        echo "$stamp" >"$VENV/stamp"
    fi
    say "installing the product from a wheel"
    wheel_dir=$(mktemp -d) || die "mktemp failed"
    "$VENV/bin/pip" wheel -q --disable-pip-version-check --no-build-isolation --no-deps \
        --wheel-dir "$wheel_dir" . </dev/null &&
        "$VENV/bin/pip" install -q --disable-pip-version-check --no-deps --no-index \
            --force-reinstall "$wheel_dir"/clipshim-*.whl </dev/null
    local status=$?
    rm -rf "$wheel_dir"
    [ $status -eq 0 ] || die "the product's wheel could not be built and installed"
}

failed=()

step() {
    local name=$1
    shift
    say "$name"
    if ! "$@" </dev/null; then
        failed+=("$name")
        printf '%s: failed\n' "$name" >&2
    fi
}

[ "$(id -u)" -eq 0 ] || die "needs root: mounts, containers and engines are real"
[ -x /usr/bin/python3 ] || TEST_PACKAGES+=(python3)

umask 022
# runc and dockerd live in sbin; a caller's other interpreters and clients stay out of the way.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin
export LC_ALL=C.UTF-8
unset PYTHONPATH PYTHONHOME PYTHONSAFEPATH VIRTUAL_ENV CLIPSHIM_CONFIG DOCKER_HOST DOCKER_CONFIG \
    CONTAINERS_CONF REGISTRY_AUTH_FILE NOTIFY_SOCKET LISTEN_FDS LISTEN_PID

install_packages
make_environment
[ "${CLIPSHIM_TEST_SETUP_ONLY:-}" = 1 ] && exit 0

# A compiler that root calls with -o /dev/null may leave it 0644: then no container with a user
# namespace starts, under runc neither.
if [ "$(stat -c %F:%a /dev/null)" != "character special file:666" ]; then
    say "/dev/null is $(stat -c '%F, %A' /dev/null): giving everybody the right to write to it"
    chmod 666 /dev/null
fi

timeout -k 10 180 /usr/bin/python3 tests/support/leftovers.py sweep ||
    say "leftovers of an earlier run could not be removed; they do not disturb this one"

CLIPSHIM_TEST_RUN=$(od -An -N4 -tx4 /dev/urandom | tr -d ' ')
export CLIPSHIM_TEST_RUN
export CLIPSHIM_TEST_ROOT="/var/tmp/clipshim-test-$CLIPSHIM_TEST_RUN"
export CLIPSHIM_TEST_INSTALLED=1  # conftest.py: importing the checkout's package is an error
mkdir -m 0711 "$CLIPSHIM_TEST_ROOT" || die "cannot make $CLIPSHIM_TEST_ROOT"
printf '%s %s\n' $$ "$(cut -d' ' -f22 "/proc/$$/stat")" >"$CLIPSHIM_TEST_ROOT/owner"
export TMPDIR="$CLIPSHIM_TEST_ROOT/tmp"
mkdir -m 1777 "$TMPDIR"
trap '/usr/bin/python3 tests/support/leftovers.py remove "$CLIPSHIM_TEST_ROOT"' EXIT

if [ "${CLIPSHIM_TEST_SKIP_LINT:-}" != 1 ]; then
    step "ruff check" "$VENV/bin/ruff" check --no-cache .
    step "ruff format" "$VENV/bin/ruff" format --no-cache --check .
    step "mypy" "$VENV/bin/mypy" --cache-dir "$TMPDIR/mypy"
    step "import linter" "$VENV/bin/lint-imports" --no-cache
fi

[ $# -gt 0 ] || set -- tests/unit tests/system
# tini -s adopts and reaps what engines orphan: podman waits 20 s for a dead conmon that the
# machine's first process has not reaped yet.
step "pytest" tini -s -- "$VENV/bin/python" -P -B -m pytest -q -p no:cacheprovider \
    --durations=15 --durations-min=5 --basetemp="$CLIPSHIM_TEST_ROOT/t" "$@"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "$(IFS=,; echo "${failed[*]}")" >&2
    exit 1
fi

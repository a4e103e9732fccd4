#!/usr/bin/env bash
# From a fresh machine (Debian 12, Ubuntu 24.04 or newer) to a container that starts before its
# image is there.
#
#   sudo ./integration/quickstart.sh            a small real image from a registry of its own
#   sudo ./integration/quickstart.sh IMAGE      the same with an image of yours
#
#   --keep      leave the container's bundle and the demonstration's registry data for a look
#   --clean     take away everything that this script has made, but for apt packages
#   -- ARGS     what to run in the container
#
# It installs what is missing, installs clipshim into /opt/clipshim with a link in /usr/local/bin,
# starts the node daemon, and runs a program. It may be run again at any time.
#
# For tests and packagers: CLIPSHIM_DEMO_PREFIX (instead of /; bin, venv and data lie below it),
# CLIPSHIM_DEMO_VENV (an environment that has clipshim: nothing is installed), CLIPSHIM_DEMO_ROOT
# (a Debian root with python3 instead of debootstrap's), CLIPSHIM_DEMO_MIRROR (a mirror for
# debootstrap; `none`: the image is made from this machine's packages), CLIPSHIM_CONFIG.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(dirname "$here")
prefix=${CLIPSHIM_DEMO_PREFIX:-}
venv=${CLIPSHIM_DEMO_VENV:-$prefix/opt/clipshim}
cache=$prefix/var/cache/clipshim-demo
bundle=$cache/bundle
container=clipshim-demo-$$
packages=(ca-certificates debootstrap fuse3 gcc libc6-dev libfuse3-dev pkg-config python3
    python3-dev python3-venv runc)

keep= clean= image=
while [ $# -gt 0 ]; do
    case $1 in
    --keep) keep=1 ;;
    --clean) clean=1 ;;
    -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    --)
        shift
        break
        ;;
    -*)
        printf 'quickstart: unknown option %s; see --help\n' "$1" >&2
        exit 2
        ;;
    *) image=$1 ;;
    esac
    shift
done
program=("$@")

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
[ -t 1 ] || say() { printf '\n== %s\n' "$*"; }
die() {
    printf 'quickstart: error: %s\n' "$*" >&2
    exit 1
}
# Not by `date +%s%3N`: that of Ubuntu 26.04 prints nanoseconds.
now_ms() { printf '%s\n' $((${EPOCHREALTIME//[!0-9]/} / 1000)); }

[ "$(id -u)" -eq 0 ] || die "needs root: sudo $0"
export PATH=$PATH:/usr/sbin:/sbin
unset PYTHONPATH PYTHONHOME
umask 022

registry_pid= mounted=
finish() {
    local status=$?
    trap - EXIT
    [ -z "$mounted" ] || "$clipshim" umount "$mounted" 2>/dev/null || true
    if [ -n "${clipshim:-}" ] && [ -z "$clean" ] && [ -x "$clipshim" ]; then
        "$clipshim" delete --force "$container" >/dev/null 2>&1 || true
    fi
    if [ -n "$registry_pid" ]; then
        kill "$registry_pid" 2>/dev/null || true
        wait "$registry_pid" 2>/dev/null || true
    fi
    [ -n "$keep" ] || rm -rf "$bundle" "$cache/look" "$cache/registry.log" "$cache/address"
    exit $status
}

clipshim=$venv/bin/clipshim
python=$venv/bin/python

# What a run that was killed has left mounted.
release_look() { ! mountpoint -q "$cache/look" || "$clipshim" umount "$cache/look"; }

if [ -n "$clean" ]; then
    release_look
    [ ! -x "$clipshim" ] || "$clipshim" daemon --stop -q || die "the daemon needs its program"
    rm -rf "$cache"
    if [ -z "${CLIPSHIM_DEMO_VENV:-}" ] && [ -e "$venv/stamp" ]; then
        link=$prefix/usr/local/bin/clipshim
        [ "$(readlink "$link" 2>/dev/null)" != "$clipshim" ] || rm -f "$link"
        rm -rf "$venv"
    fi
    say "clean; indexes and cached data stay in the state directory (/var/lib/clip)"
    exit 0
fi
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

retry() {
    local attempt
    for attempt in 1 2 3 4 5; do
        "$@" && return 0
        printf 'attempt %s failed: %s\n' "$attempt" "$*" >&2
        sleep $((attempt * 2))
    done
    return 1
}

# Retries a package manager; what it prints is shown only if it fails to the end.
quietly() {
    retry "$@" >"$cache/apt.log" 2>&1 </dev/null && return 0
    cat "$cache/apt.log" >&2
    die "$1 failed; the machine needs its package sources and a network"
}

install_packages() {
    local missing=() package
    for package in "${packages[@]}"; do
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "install these and run it again: ${missing[*]}"
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    mkdir -p "$cache"
    quietly apt-get -q -o DPkg::Lock::Timeout=300 update
    quietly apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends "${missing[@]}"
}

install_clipshim() {
    /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "needs Python 3.11 or newer, as in Debian 12 and Ubuntu 24.04; this machine has" \
            "$(/usr/bin/python3 -V)"
    # Again only when the code has changed.
    local stamp
    stamp=$(cd "$checkout" && find clipshim hatch_build.py pyproject.toml -type f \
        ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum | sha256sum)
    if [ "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ]; then
        say "installing clipshim into $venv"
        [ -x "$python" ] || /usr/bin/python3 -m venv "$venv"
        # The versions that the tests run with; the lock file's hashes are for tests/run.sh.
        sed -n 's/^\([A-Za-z0-9._-]*==[^ \\]*\).*/\1/p' "$checkout/requirements-dev.lock" \
            >"$venv/constraints.txt"
        retry "$python" -m pip install -q --disable-pip-version-check --upgrade \
            --constraint "$venv/constraints.txt" "$checkout"
        printf '%s\n' "$stamp" >"$venv/stamp"
        # A daemon of the old code gives way to the new under running containers.
        "$clipshim" daemon --replace -q 2>/dev/null </dev/null || true
    fi
    mkdir -p "$prefix/usr/local/bin"
    ln -sfn "$clipshim" "$prefix/usr/local/bin/clipshim"
}

make_image() {
    [ ! -e "$cache/image/index.json" ] || return 0
    local root=${CLIPSHIM_DEMO_ROOT:-$cache/root}
    if [ ! -e "$root/usr/bin/python3" ]; then
        say "making a small real image (Debian or Ubuntu with Python)"
        rm -rf "$root.new"
        if ! bootstrap "$root.new" >"$cache/debootstrap.log" 2>&1; then
            printf 'debootstrap failed (%s): taking the packages of this machine\n' \
                "$cache/debootstrap.log"
            rm -rf "$root.new"
            copy_of_packages "$root.new"
        fi
        mv "$root.new" "$root"
    fi
    "$python" "$here/demo_image.py" "$root" "$cache/image" latest
    [ "$root" != "$cache/root" ] || rm -rf "$root"
}

bootstrap() {
    local suite mirror
    suite=$(. /etc/os-release && printf %s "${VERSION_CODENAME:-}")
    mirror=${CLIPSHIM_DEMO_MIRROR:-$(apt-get indextargets --format '$(CODENAME) $(REPO_URI)' \
        'Created-By: Packages' | sed -n "s/^$suite //p" | sed -n 1p)}
    [ "$mirror" != none ] || return 1
    retry debootstrap --variant=minbase --include=python3-minimal,libpython3-stdlib \
        "$suite" "$1" ${mirror:+"$mirror"}
}

# The files of python3, sh and coreutils and of all that they depend on, from this machine.
copy_of_packages() {
    local list
    list=$(apt-cache depends --recurse --installed --no-recommends --no-suggests \
        --no-conflicts --no-breaks --no-replaces --no-enhances \
        python3-minimal libpython3-stdlib dash coreutils base-files | grep -v '^[ <|]' | sort -u)
    mkdir -p "$1"
    # Merged /usr: packages still name files below /bin and /lib, which are links.
    for name in bin sbin lib lib32 lib64 libx32; do
        [ ! -L "/$name" ] || ln -s "usr/$name" "$1/$name"
        [ ! -d "/usr/$name" ] || mkdir -p "$1/usr/$name"
    done
    mkdir -p "$1"/{dev,etc,proc,run,srv,sys,tmp,var}
    # shellcheck disable=SC2086
    dpkg -L $list 2>/dev/null | sed 's#^/##; s#^\(s\?bin\|lib[0-9x]*\)/#usr/\1/#' | sort -u |
        while read -r path; do [ -d "/$path" ] && [ ! -L "/$path" ] || printf '%s\n' "$path"; done |
        tar --create --directory / --ignore-failed-read --files-from - 2>/dev/null |
        tar --extract --directory "$1"
    echo root:x:0:0:root:/root:/bin/sh >"$1/etc/passwd"
    echo root:x:0: >"$1/etc/group"
    [ -e "$1/usr/bin/python3" ] || die "this machine has no python3 package to take"
}

serve_image() {
    rm -f "$cache/address"
    "$python" -m clipshim.registry.embedded_server --port-file "$cache/address" \
        "$cache/image" demo >"$cache/registry.log" 2>&1 </dev/null &
    registry_pid=$!
    local deadline=$((SECONDS + 60))
    until [ -s "$cache/address" ]; do
        kill -0 "$registry_pid" 2>/dev/null || die "the registry ended, see $cache/registry.log"
        [ $SECONDS -lt $deadline ] || die "the registry did not start, see $cache/registry.log"
        sleep 0.1
    done
    image=$(cat "$cache/address")/demo:latest
}

if [ -z "${CLIPSHIM_DEMO_VENV:-}" ]; then
    install_packages
    install_clipshim
fi
[ -x "$clipshim" ] || die "$clipshim: not there"
mkdir -p "$cache"

if [ -z "$image" ]; then
    make_image
    serve_image
elif [ ${#program[@]} -eq 0 ]; then
    program=(sh -c 'echo "hello from $(. /etc/os-release && echo "$PRETTY_NAME")"')
fi

say "1. index: $image"
begin=$(now_ms)
"$clipshim" index "$image" --format json >"$cache/index.json"
index_ms=$(($(now_ms) - begin))
index=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["index"])' "$cache/index.json")

say "2. look: the tree, mounted by hand"
mkdir -p "$cache/look"
release_look
"$clipshim" mount "$index" "$cache/look" -q
mounted=$cache/look
links() { stat -c %h "$cache/look/$1" 2>/dev/null || printf 'none'; }
proc_links=$(links proc) usr_links=$(links usr)
entries=$(find "$cache/look" -xdev | wc -l)
"$clipshim" umount "$cache/look"
mounted=
printf '%s files and directories, links: /proc %s, /usr %s\n' "$entries" "$proc_links" "$usr_links"

say "3. bundle"
rm -rf "$bundle"
begin=$(now_ms)
"$clipshim" bundle "$index" "$bundle" -q -- ${program[@]+"${program[@]}"}
bundle_ms=$(($(now_ms) - begin))

say "4. run"
before=$("$clipshim" status --format json)
begin=$(now_ms)
"$clipshim" run --bundle "$bundle" "$container" </dev/null
run_ms=$(($(now_ms) - begin))
after=$("$clipshim" status --format json)
begin=$(now_ms)
"$clipshim" run --bundle "$bundle" "$container" </dev/null >/dev/null
warm_ms=$(($(now_ms) - begin))

say "what happened"
"$python" - "$cache/index.json" "$before" "$after" <<'PYTHON'
import json
import sys

index = json.load(open(sys.argv[1]))
before, after = (json.loads(text) for text in sys.argv[2:])


def fetched(status):
    return status.get("fetch", {}).get("fetched_bytes", 0)


image = index["compressed_size"]
print(f"image:    {image / 1e6:8.1f} MB compressed, {index['layers']} layers")
print(f"index:    {index['index_size'] / 1e6:8.2f} MB ({index['index_size'] / image:.1%})")
got = fetched(after) - fetched(before)
print(f"fetched:  {got / 1e6:8.2f} MB ({got / image:.1%} of the image) to run the program")
if not got:
    print("          an earlier run had fetched everything: it is in the node's cache")
PYTHON
printf 'index     %6d ms\nbundle    %6d ms\nrun       %6d ms, from the command to the program'"'"'s end\nrun again %6d ms\n' \
    "$index_ms" "$bundle_ms" "$run_ms" "$warm_ms"
for found in "$proc_links" "$usr_links"; do
    [ "$found" = none ] || [ "$found" -ge 2 ] || die "expected 2 links or more, got $found"
done
printf 'checks    /proc and /usr are sound\n'
[ -z "$keep" ] || printf 'kept      clipshim run --bundle %s ID\n' "$bundle"
if [ -z "${CLIPSHIM_DEMO_VENV:-}" ]; then
    printf '\nnext      sudo clipshim status          what is mounted, cached and was fetched\n'
    printf '          sudo clipshim doctor          whether this machine is fit for it\n'
    printf '          sudo clipshim install docker  or containerd, podman, crio\n'
    printf '          sudo %s --clean\n' "$0"
fi

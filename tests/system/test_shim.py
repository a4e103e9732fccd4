"""The life of containers that name an index, with the real daemon and runc."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from clipshim.mounts import erofs
from clipshim.shim import state, trace
from tests.support import images
from tests.support.node import CLIPSHIM, Node, wait_for
from tests.support.runtimes import Runtime, write_bundle
from tests.support.skips import kernel_cannot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LOOP = ["/bin/sh", "-c", "trap 'exit 7' TERM; echo ready >/ready; while :; do sleep 0.1; done"]
DELETE_STEPS = [step for step in trace.STEPS if not step.startswith("create")]
CREATE_STEPS = [
    step
    for step in trace.STEPS
    if step.startswith("create") and step != "create-unmounted"  # that one is of grafts
]
INDEX = {"io.clipshim.index": "index.clip"}


@pytest.fixture(scope="session")
def tiny_clip(run_root: Path) -> Path:
    """A self-contained index of the small image: no registry is needed."""
    path = run_root / "tiny.clip"
    with Node(run_root / "tiny-indexer") as node:
        layout = f"oci:{images.tiny_image().layout}:{images.TAG}"
        node.clipshim("index", layout, path, "--embed", "--quiet")
    return path


@pytest.fixture(scope="module")
def node(run_root: Path) -> Iterator[Node]:
    """One node for the tests that do not disturb it."""
    with Node(run_root / "shim") as made:
        yield made


@pytest.fixture
def runtime(node: Node, tmp_path: Path) -> Iterator[Runtime]:
    """clipshim with a --root of this test's own; afterwards nothing of any container is left."""
    with Runtime.clipshim(tmp_path / "root", node) as made:
        yield made
    assert_clean(node)


@pytest.fixture
def bundle(tmp_path: Path, tiny_clip: Path) -> Callable[..., Path]:
    """Makes bundles that name the small image's index."""

    def make(arguments: list[str], name: str = "bundle") -> Path:
        path = write_bundle(tmp_path / name, arguments, annotations=INDEX)
        shutil.copy(tiny_clip, path / "index.clip")
        return path

    return make


def assert_clean(node: Node) -> None:
    """No container of the node has left a mount, a directory or a file."""
    assert node.container_mounts() == []
    left = list(node.run_dir.glob("*/lock"))
    assert left == []
    for name in ("upper", "work"):
        directory = node.state_dir / name
        assert not directory.exists() or os.listdir(directory) == []


def error_of(log: Path) -> str:
    """The one line of a --log file, as containerd and podman read it."""
    lines = log.read_text().splitlines()
    assert len(lines) == 1, lines
    entry = json.loads(lines[0])
    assert set(entry) == {"level", "msg", "time"}
    assert entry["level"] == "error"
    return str(entry["msg"])


def test_a_life(node: Node, runtime: Runtime, bundle: Callable[..., Path]) -> None:
    path = bundle(LOOP)
    before = (path / "config.json").read_text()
    runtime.quietly("create", "--bundle", path, "box")
    assert runtime.status("box") == "created"
    runtime("start", "box")
    wait_for("it runs", lambda: runtime("exec", "box", "/bin/ls", "/ready", check=False).stdout)
    key = state.container_key("box", str(runtime.root))
    assert (node.state_dir / "upper" / key / "ready").read_text() == "ready\n"
    found = runtime("exec", "box", "/bin/stat", "-c", "%h %F", "/proc", "/usr").stdout.splitlines()
    assert all(int(line.split()[0]) >= 2 for line in found)
    again = runtime("create", "--bundle", path, "box", check=False)
    assert again.returncode == 1
    assert "exists" in again.stderr
    assert runtime("delete", "box", check=False).returncode == 1, "it is running"
    assert runtime.status("box") == "running"
    runtime("kill", "box", "TERM")
    wait_for("it stops", lambda: runtime.status("box") == "stopped")
    runtime("delete", "box")
    assert_clean(node)
    assert (path / "config.json").read_text() == before
    assert runtime("delete", "--force", "box").stderr == ""
    assert runtime("delete", "box", check=False).returncode == 1


def test_run_in_the_foreground(node: Node, runtime: Runtime, bundle: Callable[..., Path]) -> None:
    done = runtime(
        "run", "--bundle", bundle(["/bin/sh", "-c", "id -u; exit 9"]), "box", check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (9, "0\n", "")
    assert_clean(node)


def test_run_detached_and_kept(node: Node, runtime: Runtime, bundle: Callable[..., Path]) -> None:
    runtime.quietly("run", "--detach", "--bundle", bundle(LOOP, "one"), "one")
    runtime.quietly("run", "--keep", "--bundle", bundle(["/bin/true"], "two"), "two")
    assert (runtime.status("one"), runtime.status("two")) == ("running", "stopped")
    assert len(node.container_mounts()) == 2
    runtime("delete", "two")
    assert len(node.container_mounts()) == 1
    runtime("delete", "--force", "one")
    assert_clean(node)


def test_a_failed_create_leaves_nothing(
    node: Node, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    path = bundle(["/nowhere"])
    before = (path / "config.json").read_text()
    log = path / "log.json"
    done = runtime(
        "--log", log, "--log-format", "json", "create", "-b", path, "box", check=False
    )  # fmt: skip
    assert done.returncode == 1
    assert "/nowhere" in error_of(log)
    assert done.stdout == ""
    assert_clean(node)
    assert (path / "config.json").read_text() == before


REFUSING_RUNTIME = """#!/bin/sh
while [ "$1" != create ]; do
    [ "$1" = --log ] && log=$2
    shift
done
echo "$SAID" >>"$log"
echo "$SAID" >&2
exit 1
"""


def test_deleted_directories_are_counted(
    make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    """With a runtime that says what runc says of a mount target without links."""
    fake = tmp_path / "fake-runtime"
    fake.write_text(REFUSING_RUNTIME)
    fake.chmod(0o755)
    node = make_node(runtimes=[str(fake)])
    log = tmp_path / "log"
    with Runtime.clipshim(tmp_path / "root", node) as runtime:
        for said in ("/proc wandered into deleted directory", "something else"):
            runtime.env = {**node.env, "SAID": said}
            done = runtime("--log", log, "create", "-b", bundle(LOOP), "box", check=False)
            assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{said}\n")
        assert log.read_text().count("deleted directory") == 1

        def counted() -> bool:  # the shim does not wait for the daemon to count
            text = str(node.call("metrics")["text"])
            return 'cause="DeletedDirectory"' in text and 'cause="RuntimeFailed"' in text

        wait_for("the failures are counted", counted)
        assert "clipshim_deleted_directory_total 1.0" in node.call("metrics")["text"]
    assert_clean(node)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("missing.clip", "no such file"),
        ("../index.clip", "expected a digest"),
        ("", "expected a digest"),
        ("/etc/passwd", "index_dirs"),
        ("sha256:" + "0" * 64, "0000"),
        ("sha256:../../etc/passwd", "sha256"),
        ("link.clip", "cannot be opened beneath"),
        ("fifo.clip", "expected a regular file"),
        ("directory.clip", "expected a regular file"),
        ("garbage.clip", "garbage.clip"),
    ],
)
def test_a_bad_index_is_one_clear_error(
    annotation: str, message: str, node: Node, runtime: Runtime, tmp_path: Path, tiny_clip: Path
) -> None:
    path = write_bundle(
        tmp_path / "bundle", ["/bin/true"], annotations={"io.clipshim.index": annotation}
    )
    (path / "link.clip").symlink_to(tiny_clip)
    os.mkfifo(path / "fifo.clip")
    (path / "directory.clip").mkdir()
    (path / "garbage.clip").write_bytes(b"garbage" * 1000)
    log = tmp_path / "log.json"
    for verb in ("create", "run"):
        log.unlink(missing_ok=True)
        done = runtime("--log", log, "--log-format", "json", verb, "-b", path, "box", check=False)
        assert done.returncode == 1
        assert done.stdout == ""
        assert message in error_of(log) or message == "garbage.clip"
        assert error_of(log) in done.stderr
    assert_clean(node)


def test_indexes_of_the_local_store(make_node: Callable[..., Node], tmp_path: Path) -> None:
    node = make_node()
    layout = f"oci:{images.tiny_image().layout}:{images.TAG}"
    node.clipshim("index", layout, "--embed", "--quiet")
    (clip,) = (node.state_dir / "indexes").glob("sha256-*.clip")
    digest = clip.stem.replace("-", ":")
    ordinary = tmp_path / "ordinary"
    for name in ("bin", "proc", "dev", "sys"):
        (ordinary / name).mkdir(parents=True)
    shutil.copy("/usr/bin/busybox", ordinary / "bin/sh")
    with Runtime.clipshim(tmp_path / "root", node) as runtime:
        for annotations, rootfs, expected in (
            ({"io.clipshim.index": digest}, None, "/etc/passwd"),
            ({"io.kubernetes.cri.image-name": "registry.invalid/other:1"}, ordinary, "bin"),
        ):
            path = write_bundle(
                tmp_path / "bundle",
                ["/bin/sh", "-c", "echo /etc/passwd* /bin"],
                annotations=annotations,
                rootfs=rootfs,
            )
            log = tmp_path / "log"
            done = runtime("--log", log, "run", "-b", path, "box")
            assert expected in done.stdout
            assert ("*" in done.stdout) == (rootfs is not None), "the ordinary root has no passwd"
            assert log.read_text() == ""
    assert_clean(node)


def test_a_runtime_that_is_missing(make_node: Callable[..., Node], tmp_path: Path) -> None:
    node = make_node(runtimes=["no-such-runtime"])
    log = tmp_path / "log.json"
    for arguments in (["state", "x"], ["--version"], ["run", "x"], ["delete", "--force", "x"]):
        log.unlink(missing_ok=True)
        done = node.clipshim("--log", log, "--log-format", "json", *arguments, check=False)
        assert done.returncode == 1
        assert "no-such-runtime" in error_of(log)


def test_state_on_tmpfs_is_refused(
    make_node: Callable[..., Node], tmp_path: Path, tiny_clip: Path, run_root: Path
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", memory], check=True)
    try:
        node = make_node(state_dir=str(memory / "state"))
        path = write_bundle(tmp_path / "bundle", ["/bin/true"], annotations=INDEX)
        shutil.copy(tiny_clip, path / "index.clip")
        with Runtime.clipshim(tmp_path / "root", node) as runtime:
            done = runtime("run", "-b", path, "box", check=False)
        assert done.returncode == 1
        assert "tmpfs" in done.stderr
        node.stop()
    finally:
        subprocess.run(["umount", "-l", memory], check=True)


def test_fuse_overlayfs_when_configured(
    make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    node = make_node(overlay="fuse-overlayfs")
    with Runtime.clipshim(tmp_path / "root", node) as runtime:
        path = bundle(["/bin/sh", "-c", "echo new >/new; cat /new; id -u; ls /bin/busybox"])
        done = runtime("run", "-b", path, "box")
        assert done.stdout.split() == ["new", "0", "/bin/busybox"]
    assert_clean(node)


@pytest.mark.parametrize("mode", ["erofs", "fuse"])
def test_both_modes(
    mode: str, make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    if mode == "erofs" and (reason := erofs.probe_erofs(str(tmp_path))):
        kernel_cannot(reason)
    node = make_node(mode=mode)
    with Runtime.clipshim(tmp_path / "root", node) as runtime:
        path = bundle(["/bin/sh", "-c", "ls /bin/busybox; stat -c %h /proc /usr; echo x >/etc/new"])
        runtime.quietly("create", "-b", path, "box")
        key = state.container_key("box", str(runtime.root))
        recorded = json.loads((node.run_dir / key / "state.json").read_text())
        assert recorded["mode"] == mode
        runtime("delete", "--force", "box")
        done = runtime("run", "-b", path, "box")
        name, *links = done.stdout.split()
        assert name == "/bin/busybox"
        assert all(int(count) >= 2 for count in links)
    assert_clean(node)


def test_the_tree_is_right_where_the_daemons_mounts_are_not_seen(
    make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    node = make_node()
    node.start()
    path = bundle(["/bin/ls", "/bin/busybox"])
    words = [CLIPSHIM, "--root", tmp_path / "root", "run", "-b", path, "box"]
    done = subprocess.run(  # what buildah does; the daemon mounts the tree only after this
        ["unshare", "--mount", "--propagation", "private", *map(str, words)],
        env=node.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "/bin/busybox\n", "")
    assert_clean(node)


def test_signals_reach_the_container(
    node: Node, runtime: Runtime, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    words = runtime.command("run", "-b", bundle(LOOP), "box")
    running = subprocess.Popen(
        words, env=runtime.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    wait_for("it runs", lambda: runtime("exec", "box", "/bin/ls", "/ready", check=False).stdout)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 7
    assert_clean(node)


def test_delete_from_elsewhere_ends_a_run_in_the_foreground(
    node: Node, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    words = runtime.command("run", "-b", bundle(LOOP), "box")
    running = subprocess.Popen(
        words, env=runtime.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    wait_for("it runs", lambda: runtime("exec", "box", "/bin/ls", "/ready", check=False).stdout)
    runtime("delete", "--force", "box")
    running.wait(timeout=60)
    wait_for("all is clean", lambda: not node.container_mounts())


def test_the_daemon_holds_none_of_the_callers_descriptors(
    make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    node = make_node()
    path = bundle(["/bin/sh", "-c", "echo through >&3"])
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    words = [CLIPSHIM, "--root", tmp_path / "root", "run", "--preserve-fds", "1", "-b", path, "box"]
    try:
        done = subprocess.run(
            ["bash", "-c", f'exec "$@" 3>&{write_end} {write_end}>&-', "bash", *map(str, words)],
            env=node.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
            pass_fds=[write_end],
            check=False,
        )
    finally:
        os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        assert pipe.read() == b"through\n"  # to its end: nobody else has it open
    assert (done.returncode, done.stderr) == (0, b"")
    assert node.ping() is not None, "the first create has started a daemon"


def test_many_at_once_start_one_daemon(
    make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    node = make_node()
    paths = [bundle(["/bin/echo", f"number {i}"], f"b{i}") for i in range(12)]
    with Runtime.clipshim(tmp_path / "root", node) as runtime:

        def run(number: int) -> str:
            return runtime("run", "-b", paths[number], f"box{number}").stdout

        with ThreadPoolExecutor(len(paths)) as pool:
            assert list(pool.map(run, range(len(paths)))) == [
                f"number {number}\n" for number in range(len(paths))
            ]
    assert_clean(node)


@pytest.mark.parametrize("step", CREATE_STEPS)
def test_killed_in_create_the_next_one_cleans(
    step: str, node: Node, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    path = bundle(LOOP)
    before = (path / "config.json").read_text()
    runtime.env = {**node.env, trace.TRACE_ENV: step}
    assert runtime.quietly("create", "-b", path, "box", check=False).returncode == -signal.SIGKILL
    runtime.env = node.env
    runtime("delete", "--force", "box")
    assert_clean(node)
    assert (path / "config.json").read_text() == before
    runtime.env = {**node.env, trace.TRACE_ENV: step}
    assert runtime.quietly("create", "-b", path, "box", check=False).returncode == -signal.SIGKILL
    runtime.env = node.env
    if runtime.status("box"):
        runtime("delete", "--force", "box")
    runtime.quietly("create", "-b", path, "box")
    runtime("delete", "--force", "box")
    assert_clean(node)


@pytest.mark.parametrize("step", DELETE_STEPS)
def test_killed_in_delete_the_next_one_finishes(
    step: str, node: Node, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    path = bundle(LOOP)
    runtime.quietly("create", "-b", path, "box")
    runtime.env = {**node.env, trace.TRACE_ENV: step}
    done = runtime("delete", "--force", "box", check=False)
    assert done.returncode == -signal.SIGKILL
    runtime.env = node.env
    runtime("delete", "--force", "box")
    assert_clean(node)


def test_a_user_namespace(node: Node, runtime: Runtime, bundle: Callable[..., Path]) -> None:
    """Its root, an ordinary user of the host, cannot enter run_dir."""
    path = bundle(["/bin/sh", "-c", "ls /bin/busybox; id -u"])
    config = json.loads((path / "config.json").read_text())
    mapping = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]
    config["linux"].update(uidMappings=mapping, gidMappings=mapping)
    config["linux"]["namespaces"].append({"type": "user"})
    kept = ("proc", "tmpfs", "devpts")  # others need a network namespace or more
    config["mounts"] = [mount for mount in config["mounts"] if mount["type"] in kept]
    (path / "config.json").write_text(json.dumps(config))
    for above in (path, *path.parents):
        if above == runtime.root.parents[2]:
            break
        os.chmod(above, above.stat().st_mode | 0o011)
    assert runtime("run", "-b", path, "box").stdout == "/bin/busybox\n0\n"
    assert json.loads((path / "config.json").read_text()) == config
    runtime.quietly("create", "-b", path, "box")
    runtime("delete", "--force", "box")
    assert_clean(node)
    assert os.listdir(path / "rootfs") == []


def test_two_containers_of_one_bundle(
    node: Node, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    path = bundle(LOOP)
    before = (path / "config.json").read_text()
    for name in ("one", "two"):
        runtime.quietly("create", "-b", path, name)
    for name in ("one", "two"):
        runtime("delete", "--force", name)
    assert (path / "config.json").read_text() == before


def test_checkpoint_keeps_what_restore_needs(
    make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    """With a runtime that plays CRIU: it only keeps its state directory as runc does."""
    fake = tmp_path / "fake-runtime"
    fake.write_text(FAKE_RUNTIME)
    fake.chmod(0o755)
    node = make_node(runtimes=[str(fake)])
    path = bundle(LOOP)
    with Runtime.clipshim(tmp_path / "root", node) as runtime:
        key = state.container_key("box", str(runtime.root))
        upper = node.state_dir / "upper" / key
        runtime("create", "-b", path, "box")
        (upper / "written").write_text("x")
        runtime("checkpoint", "--leave-running", "box")
        assert node.container_mounts() != []
        runtime("checkpoint", "box")
        assert node.container_mounts() == []
        assert (upper / "written").exists()
        runtime("restore", "-b", path, "box")
        assert (node.run_dir / key / "rootfs" / "written").read_text() == "x"
        assert (node.run_dir / key / "rootfs" / "bin/busybox").exists()
        runtime("delete", "box")
        assert_clean(node)
        runtime("create", "-b", path, "box")
        runtime("checkpoint", "box")
        runtime("delete", "--force", "box", check=False)
        assert_clean(node)


def test_a_checkpoint_outlives_hooks_and_the_run_in_the_foreground(
    make_node: Callable[..., Node], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    """runc runs the poststop hooks before its checkpoint returns."""
    fake = tmp_path / "fake-runtime"
    fake.write_text(FAKE_RUNTIME)
    fake.chmod(0o755)
    node = make_node(runtimes=[str(fake)])
    path = bundle(LOOP)
    with Runtime.clipshim(tmp_path / "root", node) as runtime, ThreadPoolExecutor() as pool:
        (tmp_path / "root.hook").symlink_to(CLIPSHIM)
        key = state.container_key("box", str(runtime.root))
        written = node.state_dir / "upper" / key / "written"
        runtime("create", "-b", path, "box")
        written.write_text("x")
        runtime("checkpoint", "box")
        assert node.container_mounts() == []
        assert written.exists()
        runtime("delete", "--force", "box", check=False)
        assert_clean(node)
        (tmp_path / "root.hook").unlink()
        running = pool.submit(runtime, "run", "-b", path, "box")
        wait_for("it runs", (runtime.root / "box").exists)
        written.write_text("x")
        runtime("checkpoint", "box")
        running.result(120)
        assert node.container_mounts() == []
        assert written.exists()
        runtime("delete", "--force", "box", check=False)
        assert_clean(node)


def test_a_damaged_state_does_not_keep_a_container(
    node: Node, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    runtime.quietly("create", "-b", bundle(LOOP), "box")
    key = state.container_key("box", str(runtime.root))
    (node.run_dir / key / "state.json").write_text('{"version": 1, "id"')
    runtime("delete", "--force", "box")
    assert_clean(node)


FAKE_RUNTIME = """#!/bin/sh
root=$2; shift 2
verb=$1; shift
for id; do :; done
case "$verb $*" in
    create*|restore*) mkdir -p "$root/$id" ;;
    "checkpoint --leave-running"*) ;;
    run*) mkdir -p "$root/$id"; while [ -d "$root/$id" ]; do sleep 0.1; done ;;
    checkpoint*) rmdir "$root/$id"
        [ ! -e "$root.hook" ] || echo "{\\"id\\": \\"$id\\"}" | "$root.hook" hook cleanup ;;
    delete*) rmdir "$root/$id" ;;
esac
"""

DUMP_RUNTIME = """#!/usr/bin/python3 -IS
import json, os, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
json.dump({
    "argv": sys.argv[1:],
    "environ": sorted(open("/proc/self/environ", errors="surrogateescape").read().split(chr(0))),
    "fds": sorted(fd for fd in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + fd)
                  and not os.readlink("/proc/self/fd/" + fd).endswith(("/fd", "fake-runtime"))),
    "signals": [status[key] for key in ("SigBlk", "SigIgn", "SigCgt")],
    "cwd": os.getcwd(),
    "umask": status.get("Umask"),
    "session": os.getsid(0),
}, open(os.environ["DUMP"], "w"))
"""


@pytest.mark.parametrize("interrupt", [signal.SIG_DFL, signal.SIG_IGN], ids=["heeded", "ignored"])
@pytest.mark.parametrize("way", ["launcher", "python", "child"])
def test_the_runtime_gets_what_the_engine_gave(
    way: str,
    interrupt: signal.Handlers,
    make_node: Callable[..., Node],
    tmp_path: Path,
    bundle: Callable[..., Path],
) -> None:
    fake = tmp_path / "fake-runtime"
    fake.write_text(DUMP_RUNTIME)
    fake.chmod(0o755)
    node = make_node(runtimes=[str(fake)])
    path = bundle(["/bin/true"])
    if way == "launcher":
        (path / "index.clip").unlink()
        write_bundle(path, ["/bin/true"])
    elif way == "python":  # an escape in config.json is for Python to understand
        write_bundle(path, ["/bin/true"], annotations={"org.example": "\u20ac"})
    words = ["--root", str(tmp_path / "root"), "create", "--bundle", str(path), "odd id\udcff"]
    words[-1] = "box"
    env = {
        **node.env,
        "DUMP": str(tmp_path / "dump"),
        "LD_LIBRARY_PATH": "/nonexistent",
        "PYTHONPATH": "/nonexistent",
        "PYTHONHOME": "",
        "LC_ALL": "",
        "EMPTY": "",
        "BYTES": "\udcff",
    }
    for name in ("LANG", "LC_CTYPE"):
        env.pop(name, None)
    found = []
    for program in (fake, CLIPSHIM):
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "dump").unlink()
        done = subprocess.run(
            [program, *words],
            env=env,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: signal.signal(signal.SIGINT, interrupt) and None,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        found.append(json.loads((tmp_path / "dump").read_text()))
    assert found[1] == found[0]
    node.stop()

"""From an image in a registry to running containers and back to nothing, in both modes."""

from __future__ import annotations

import functools
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.support import images, leftovers
from tests.support.node import Node, wait_for
from tests.support.registry import running_registry
from tests.support.runtimes import Runtime, write_bundle

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path

IN_A_ROW = 50  # by run, and as many by create, start and delete; in each mode
AT_ONCE = 20
SLEEP = ["sleep", "100000"]
_NUMBERS = itertools.count()


@pytest.fixture(scope="module", params=["erofs", "fuse"])
def node(request: pytest.FixtureRequest, run_root: Path, debian_clip: Path) -> Iterator[Node]:
    """A node in one of the two modes, shared by the tests here."""
    directory = run_root / f"e2e-{request.param}"
    with Node(directory, mode=request.param, index_dirs=[str(debian_clip.parent)]) as made:
        yield made


@pytest.fixture
def runtime(node: Node, tmp_path: Path) -> Iterator[Runtime]:
    """clipshim with a --root of this test; afterwards nothing of any container is left."""
    with Runtime.clipshim(tmp_path / "root", node) as made:
        yield made
    assert_nothing_left(node)


@pytest.fixture
def bundle(tmp_path: Path, debian_clip: Path) -> Callable[..., Path]:
    """Makes bundles of the Debian image."""

    def make(arguments: list[str], **options: object) -> Path:
        annotations = {"io.clipshim.index": str(debian_clip)}
        return write_bundle(
            tmp_path / f"b{next(_NUMBERS)}",
            arguments,
            **{"annotations": annotations, **options},  # type: ignore[arg-type]
        )

    return make


def assert_nothing_left(node: Node) -> None:
    """No mount, state or writable directory of a container."""

    def clean() -> bool:
        return not what_is_left(node)

    try:
        wait_for("everything of the containers is gone", clean, 60)
    except AssertionError:
        assert what_is_left(node) == []


def what_is_left(node: Node) -> list[str]:
    left = node.container_mounts()
    for parent in (node.state_dir / "upper", node.state_dir / "work"):
        left += [str(path) for path in parent.glob("*")]
    left += [str(path.parent) for path in node.run_dir.glob("*/state.json")]
    return left


def has_stopped(runtime: Runtime, name: str) -> bool:
    return runtime.status(name) == "stopped"


def test_the_program_runs(runtime: Runtime, bundle: Callable[..., Path]) -> None:
    done = runtime("run", "--bundle", bundle(["python3", "/app/hello.py"]), "one")
    assert (done.stdout, done.stderr) == ("lazy [1]\n", "")


def test_run_exec_state_kill_and_delete(runtime: Runtime, bundle: Callable[..., Path]) -> None:
    runtime.quietly("run", "--detach", "--bundle", bundle(SLEEP), "life")
    state = json.loads(runtime("state", "life").stdout)
    assert state["status"] == "running"
    out = runtime("exec", "life", "python3", "-c", images.PYTHON_LINE).stdout
    assert out == "lazy [1]\n"
    assert runtime("exec", "life", "sh", "-c", "exit 3", check=False).returncode == 3
    assert runtime("delete", "life", check=False).returncode != 0  # it is running
    assert runtime("exec", "life", "cat", "/etc/issue").stdout == "replaced by the top layer\n"
    runtime("kill", "life", "KILL")
    wait_for("it has stopped", lambda: has_stopped(runtime, "life"))
    runtime("delete", "life")
    assert runtime("state", "life", check=False).returncode != 0
    runtime("delete", "--force", "life")


def test_the_root_file_system_is_the_images(runtime: Runtime, bundle: Callable[..., Path]) -> None:
    script = """
import os, stat, json
s = os.lstat
print(json.dumps({
    "nlinks": [s(d).st_nlink >= 2 for d in ("/proc", "/usr", "/usr/bin", "/app/data", "/etc")],
    "bin": os.readlink("/bin"),
    "links": [os.readlink("/app/link"), os.readlink("/app/absolute")],
    "hard": [s("/app/data/linked-a").st_nlink, os.path.samefile("/app/data/linked-a",
             "/app/data/linked-b")],
    "setuid": oct(s("/app/setuid").st_mode),
    "fifo": stat.S_ISFIFO(s("/app/fifo").st_mode),
    "capability": os.getxattr("/app/capable", "security.capability").hex(),
    "owner": [s("/home/tester").st_uid, s("/home/tester").st_gid],
    "gone": [os.path.lexists(p) for p in
             ("/etc/debian_version", "/app/removed-later", "/app/.wh.removed-later")],
    "doc": os.listdir("/usr/share/doc"),
    "odd": open("/app/data/größe name\\\\x").read(),
    "mtime": s("/app/big").st_mtime_ns,
}))
"""
    done = runtime("run", "--bundle", bundle(["python3", "-c", script]), "look")
    seen = json.loads(done.stdout)
    assert seen == {
        "nlinks": [True] * 5,
        "bin": "usr/bin",
        "links": ["data/linked-a", "/app/data"],
        "hard": [2, True],
        "setuid": "0o104755",
        "fifo": True,
        "capability": "0100000200040000000000000000000000000000",
        "owner": [1234, 1235],
        "gone": [False] * 3,
        "doc": ["README"],
        "odd": "odd name\n",
        "mtime": (images.EPOCH - 60) * 10**9,
    }


def test_every_byte_is_the_images(
    runtime: Runtime, bundle: Callable[..., Path], debian: images.Image, tmp_path: Path
) -> None:
    command = "cd / && find usr etc app bin/ lib/ -xdev -type f -print0 | LC_ALL=C sort -z " \
        "| xargs -0 sha256sum | grep -v -e etc/hosts -e etc/resolv.conf"  # fmt: skip
    done = runtime("run", "--bundle", bundle(["bash", "-c", command]), "sums")
    unpacked = images.unpack(debian, tmp_path / "unpacked")
    expected = images.run("bash", "-c", command.replace("cd /", f"cd {unpacked}"))
    assert done.stdout.count("\n") > 3000
    assert done.stdout == expected


def test_writes_land_in_the_upper_directory_only(
    runtime: Runtime, node: Node, bundle: Callable[..., Path]
) -> None:
    runtime.quietly("run", "--detach", "--bundle", bundle(SLEEP), "first")
    runtime.quietly("run", "--detach", "--bundle", bundle(SLEEP), "second")
    runtime("exec", "first", "sh", "-c", "echo mine > /etc/issue; rm /app/hello.py; mkdir /new")
    assert runtime("exec", "first", "cat", "/etc/issue").stdout == "mine\n"
    other = runtime("exec", "second", "sh", "-c", "cat /etc/issue /app/hello.py; test ! -e /new")
    assert other.stdout.startswith("replaced by the top layer\n")
    uppers = [path for path in (node.state_dir / "upper").rglob("issue") if path.is_file()]
    assert [path.read_text() for path in uppers] == ["mine\n"]
    for name in ("first", "second"):
        runtime("delete", "--force", name)


def test_starts_and_deletes_in_a_row(runtime: Runtime, bundle: Callable[..., Path]) -> None:
    directory = bundle(["/bin/sh", "-c", "test -d /proc/self && exec cat /app/hello.py"])
    for number in range(IN_A_ROW):
        done = runtime("run", "--bundle", directory, f"run-{number}")
        assert "import json" in done.stdout
        assert "deleted directory" not in done.stderr
    for number in range(IN_A_ROW):
        name = f"create-{number}"
        created = runtime.quietly("create", "--bundle", directory, name)
        assert "deleted directory" not in created.stdout
        runtime("start", name)
        wait_for("it has ended", functools.partial(has_stopped, runtime, name))
        runtime("delete", name)
    assert runtime.containers() == []


def test_many_at_once(runtime: Runtime, bundle: Callable[..., Path]) -> None:
    bundles = [
        bundle(["python3", "-c", f"import json, asyncio; print({number} * 2)"])
        for number in range(AT_ONCE)
    ]

    def one(number: int) -> subprocess.CompletedProcess[str]:
        return runtime("run", "--bundle", bundles[number], f"many-{number}")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(one, range(AT_ONCE)))
    assert [done.stdout for done in results] == [f"{number * 2}\n" for number in range(AT_ONCE)]


def test_a_killed_server_is_not_noticed(
    runtime: Runtime, node: Node, bundle: Callable[..., Path]
) -> None:
    script = "sha256sum /app/big /usr/bin/python3.11 /usr/lib/x86_64-linux-gnu/libc.so.6"
    runtime.quietly("run", "--detach", "--bundle", bundle(SLEEP), "reader")
    expected = runtime("exec", "reader", "sh", "-c", script).stdout
    for _ in range(3):
        node.kill_server()
        drop = "/proc/sys/vm/drop_caches"
        with open(drop, "w") as file:
            file.write("1")
        assert runtime("exec", "reader", "sh", "-c", script).stdout == expected
    runtime("delete", "--force", "reader")


def failed(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """It failed with one clear message: no traceback, and these words in it."""
    text = done.stdout + done.stderr
    assert done.returncode != 0, text
    assert "Traceback" not in text
    for word in words:
        assert word in text


def test_a_missing_index_is_a_clear_error(
    runtime: Runtime, debian_clip: Path, bundle: Callable[..., Path]
) -> None:
    missing = debian_clip.parent / "no-such.clip"
    directory = bundle(SLEEP, annotations={"io.clipshim.index": str(missing)})
    failed(runtime("run", "--bundle", directory, "x", check=False), str(missing))


def test_an_index_outside_the_allowed_directories_is_refused(
    runtime: Runtime, tmp_path: Path, debian_clip: Path, bundle: Callable[..., Path]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "i.clip").hardlink_to(debian_clip)
    directory = bundle(SLEEP, annotations={"io.clipshim.index": str(elsewhere / "i.clip")})
    failed(runtime("run", "--bundle", directory, "x", check=False), "i.clip")


def test_a_bad_config_is_runcs_error(runtime: Runtime, bundle: Callable[..., Path]) -> None:
    directory = bundle(SLEEP)
    (directory / "config.json").write_text('{"ociVersion": ')
    failed(runtime("run", "--bundle", directory, "x", check=False))
    (directory / "config.json").unlink()
    failed(runtime("run", "--bundle", directory, "x", check=False), "config.json")


def test_an_existing_id_is_an_error_and_the_container_lives(
    runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    runtime.quietly("run", "--detach", "--bundle", bundle(SLEEP), "same")
    failed(runtime.quietly("create", "--bundle", bundle(SLEEP), "same", check=False), "exist")
    assert runtime("exec", "same", "cat", "/etc/issue").stdout == "replaced by the top layer\n"
    runtime("delete", "--force", "same")


def test_a_program_that_is_not_there_is_an_error(
    runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    failed(runtime("run", "--bundle", bundle(["/no/such"]), "x", check=False), "/no/such")


def test_a_missing_runc_is_a_clear_error(
    make_node: Callable[..., Node], tmp_path: Path, debian_clip: Path, bundle: Callable[..., Path]
) -> None:
    node = make_node(runtimes=["/no/such/runc"], index_dirs=[str(debian_clip.parent)])
    runtime = Runtime.clipshim(tmp_path / "root", node)
    failed(runtime("run", "--bundle", bundle(SLEEP), "x", check=False), "/no/such/runc")
    assert_nothing_left(node)


def test_a_dead_registry_is_an_error_in_time_and_leaves_nothing(
    make_node: Callable[..., Node], tmp_path: Path, tiny: images.Image, bundle: Callable[..., Path]
) -> None:
    node = make_node(
        connect_timeout_s=1.0, read_timeout_s=2.0, fetch_deadline_s=4.0, index_dirs=[str(tmp_path)]
    )
    with running_registry(tmp_path / "registry") as registry:
        reference = registry.push_layout(tiny.layout, "gone:1", tag=images.TAG)
        node.clipshim("index", reference, tmp_path / "gone.clip")
    with Runtime.clipshim(tmp_path / "root", node) as runtime:
        named = bundle(["true"], annotations={"io.clipshim.index": str(tmp_path / "gone.clip")})
        failed(runtime("run", "--bundle", named, "x", check=False))
        named = bundle(["true"], annotations={"io.clipshim.image": reference})
        failed(runtime("run", "--bundle", named, "y", check=False), reference.partition("/")[0])
    assert_nothing_left(node)


def test_state_on_memory_backed_storage_is_refused(
    make_node: Callable[..., Node], tmp_path: Path, debian_clip: Path, bundle: Callable[..., Path]
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    images.run("mount", "-t", "tmpfs", "clipshim-test", memory)
    node = make_node(state_dir=str(memory), index_dirs=[str(debian_clip.parent)])
    try:
        with Runtime.clipshim(tmp_path / "root", node) as runtime:
            failed(runtime("run", "--bundle", bundle(SLEEP), "x", check=False), str(memory))
    finally:
        node.stop()
        leftovers.unmount_below(memory)

"""podman: the same questions as for Docker, and builds in a mount namespace of their own."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.support.engine import ULIMITS
from tests.support.images import PYTHON_LINE
from tests.support.node import wait_for
from tests.support.podman_engine import Podman
from tests.system.engines.conftest import IMAGE, ORDINARY, loaded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.engine import Target

pytestmark = pytest.mark.engine
AT_ONCE = 10


@pytest.fixture(scope="session")
def podman(run_root: Path, target: Target, archives: list[Path]) -> Iterator[Podman]:
    """podman with the images loaded; its runtime is the one under test."""
    with loaded(Podman(run_root / f"pod-{target.name}", target), archives) as engine:
        yield engine


@pytest.fixture
def sleeper(podman: Podman) -> Iterator[str]:
    """A running container."""
    name = podman.start_container("-d", IMAGE, "sleep", "100000")
    yield name
    podman("rm", "-f", "-t", "0", name)


def run(podman: Podman, *arguments: str) -> str:
    return podman.start_container("--rm", *arguments)


def test_a_build_is_the_first_to_use_the_tree(podman: Podman, tmp_path: Path) -> None:
    """Builds run in a mount namespace of their own, where the tree's mount never shows up."""
    if podman.target.node is not None:
        podman.target.node.stop()  # no daemon, no tree mounted
    (tmp_path / "Containerfile").write_text(
        f"FROM {IMAGE}\n"
        "RUN python3 -c \"print('built', file=open('/app/built', 'w'))\" && rm /app/hello.py\n"
        "COPY added /app/added\n"
        "USER tester\n"
        'CMD ["cat", "/app/built", "/app/added"]\n'
    )
    (tmp_path / "added").write_text("added\n")
    podman("build", "-q", "--network=none", "--isolation=oci", "--runtime", podman.target.runtime,
           *ULIMITS, "-t", "localhost/built:1", tmp_path)  # fmt: skip
    assert run(podman, "localhost/built:1") == "built\nadded"
    assert run(podman, "localhost/built:1", "sh", "-c", "id -un; ls /app/hello.py || echo gone")\
        .splitlines() == ["tester", "gone"]  # fmt: skip
    podman("rmi", "localhost/built:1")


def test_the_images_own_command_runs(podman: Podman) -> None:
    assert run(podman, IMAGE) == "lazy [1]"


def test_exit_code_and_streams_come_through(podman: Podman) -> None:
    done = podman.run("run", "--rm", *podman.common(), IMAGE, "sh", "-c",
                      "echo out; echo err >&2; exit 7", check=False)  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 7)


def test_a_missing_program_is_an_error_and_leaves_nothing(podman: Podman) -> None:
    done = podman.run("run", "--rm", *podman.common(), IMAGE, "/no/such/program", check=False)
    assert done.returncode == 127
    assert "/no/such/program" in done.stderr
    wait_for("it is removed", lambda: not podman("ps", "-aq"))


def test_environment_directory_and_user_by_name(podman: Podman) -> None:
    script = "import os; print(os.environ['APP'], os.environ['X'], os.getcwd(), os.getuid())"
    out = run(podman, "-e", "X=2", "--user", "tester", IMAGE, "python3", "-c", script)
    assert out == "1 2 /app 1234"


def test_exec_and_logs(podman: Podman) -> None:
    name = podman.start_container("-d", IMAGE, "sh", "-c", "echo hello; exec sleep 100000")
    try:
        assert podman("exec", name, "python3", "-c", PYTHON_LINE) == "lazy [1]"
        assert podman("exec", "-u", "1234", "-w", "/", name, "id", "-u") == "1234"
        wait_for("the log", lambda: podman("logs", name) == "hello")
    finally:
        podman("rm", "-f", "-t", "0", name)


def test_copy_in_and_out(podman: Podman, sleeper: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("copied in\n")
    podman("cp", tmp_path / "in", f"{sleeper}:/app/in")
    assert podman("exec", sleeper, "cat", "/app/in") == "copied in"
    podman("cp", f"{sleeper}:/app/data/linked-a", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "one file, two names\n"


def test_diff_names_only_what_changed(podman: Podman, sleeper: str) -> None:
    podman("exec", sleeper, "sh", "-c", "echo x > /app/new; rm /app/hello.py; echo y >> /etc/issue")
    changes = set(podman("diff", sleeper).splitlines())
    # podman compares with its own layers: the tree's files are not among them
    changed = "A /etc/issue" if podman.target.lazy else "C /etc/issue"
    assert {"A /app/new", changed} <= changes
    assert not [line for line in changes if "/usr" in line]


def test_commit_and_run_the_result(podman: Podman, sleeper: str) -> None:
    podman("exec", sleeper, "sh", "-c", "echo committed > /app/new")
    podman("commit", "-q", sleeper, "localhost/committed:1")
    try:
        out = run(podman, "localhost/committed:1", "cat", "/app/new", "/etc/issue")
        assert out == "committed\nreplaced by the top layer"
    finally:
        podman("rmi", "localhost/committed:1")


def test_export_of_a_running_container_is_the_whole_tree(
    podman: Podman, sleeper: str, tmp_path: Path
) -> None:
    podman("export", "-o", tmp_path / "export.tar", sleeper)
    listing = subprocess.run(
        ["tar", "-tf", tmp_path / "export.tar"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "app/hello.py" in listing
    assert any(name.startswith("usr/bin/python3") for name in listing)


def test_restart_keeps_what_was_written(podman: Podman, sleeper: str) -> None:
    podman("exec", sleeper, "sh", "-c", "echo kept > /app/kept")
    podman("restart", "-t", "0", sleeper)
    assert podman("exec", sleeper, "cat", "/app/kept", "/etc/issue").startswith("kept\n")
    podman("stop", "-t", "0", sleeper)
    podman("start", sleeper)
    assert podman("exec", sleeper, "cat", "/app/kept") == "kept"


def test_read_only(podman: Podman) -> None:
    out = run(podman, "--read-only", IMAGE, "sh", "-c",
              "echo x >/tmp/x && cat /tmp/x; echo y 2>/dev/null >/app/y || echo no")  # fmt: skip
    assert out == "x\nno"


def test_volumes_and_bind_mounts_into_the_tree(podman: Podman, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("bound\n")
    out = run(podman, "-v", f"{tmp_path}:/usr/share/bound", IMAGE, "sh", "-c",
              "cat /usr/share/bound/f; echo z > /usr/share/bound/z")  # fmt: skip
    assert out == "bound"
    assert (tmp_path / "z").read_text() == "z\n"


def test_several_at_once(podman: Podman) -> None:
    def one(number: int) -> str:
        return run(podman, IMAGE, "python3", "-c", f"print({number} * 2)")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert list(pool.map(one, range(AT_ONCE))) == [str(2 * i) for i in range(AT_ONCE)]


def test_an_ordinary_image_runs_as_ever(podman: Podman) -> None:
    out = run(podman, ORDINARY, "sh", "-c", "id -u; echo x > /x; cat /x; ls -a /")
    assert out.split()[:2] == ["0", "x"]
    assert ".clip" not in out


def test_a_user_namespace_of_its_own(podman: Podman) -> None:
    """The image's files belong to the container's root, who may change them."""
    maps = ["--uidmap=0:100000:65536", "--gidmap=0:100000:65536"]
    script = (
        "stat -c %u:%g /usr/bin/python3 /etc/issue /app; echo x >>/etc/issue; rm /app/hello.py; "
        "stat -c %u:%g /etc/issue; tail -1 /etc/issue; python3 -c 'print(1)'"
    )
    name = podman("create", *podman.common(), *maps, IMAGE, "sh", "-c", script)
    try:
        assert podman("start", "--attach", name).split() == ["0:0"] * 4 + ["x", "1"]
    finally:
        podman.remove(name)

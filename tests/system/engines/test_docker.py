"""Docker: everything that people do with a container works as with the full image."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.support.docker_engine import Docker
from tests.support.images import PYTHON_LINE
from tests.support.node import wait_for
from tests.system.engines.conftest import IMAGE, ORDINARY, loaded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.engine import Target

pytestmark = pytest.mark.engine
AT_ONCE = 30


@pytest.fixture(scope="session")
def docker(run_root: Path, target: Target, archives: list[Path]) -> Iterator[Docker]:
    """dockerd with the images loaded; its default runtime is the one under test."""
    with loaded(Docker(run_root / f"docker-{target.name}", target), archives) as engine:
        yield engine


@pytest.fixture
def sleeper(docker: Docker) -> Iterator[str]:
    """A running container."""
    name = docker("run", "-d", IMAGE, "sleep", "100000")
    yield name
    docker("rm", "-f", name)


def run(docker: Docker, *arguments: str | Path) -> str:
    return docker("run", "--rm", *arguments)


def test_the_images_own_command_runs(docker: Docker) -> None:
    assert run(docker, IMAGE) == "lazy [1]"


def test_exit_code_and_streams_come_through(docker: Docker) -> None:
    done = docker.run(
        "run", "--rm", IMAGE, "sh", "-c", "echo out; echo err >&2; exit 7", check=False
    )
    assert (done.stdout, done.returncode) == ("out\n", 7)
    assert done.stderr.endswith("err\n")  # the client may warn before


def test_a_missing_program_is_an_error_and_leaves_nothing(docker: Docker) -> None:
    done = docker.run("run", "--rm", IMAGE, "/no/such/program", check=False)
    assert done.returncode == 127
    assert "/no/such/program" in done.stderr
    wait_for("it is removed", lambda: not docker("ps", "-aq", "--filter", "status=created"))


def test_environment_directory_and_user_by_name(docker: Docker) -> None:
    script = "import os; print(os.environ['APP'], os.environ['X'], os.getcwd(), os.getuid())"
    out = run(docker, "-e", "X=2", "--user", "tester", IMAGE, "python3", "-c", script)
    assert out == "1 2 /app 1234"
    assert run(docker, "--user", "tester", IMAGE, "id", "-gn") == "testers"


def test_exec_logs_and_top(docker: Docker) -> None:
    name = docker("run", "-d", IMAGE, "sh", "-c", "echo hello; exec sleep 100000")
    try:
        assert docker("exec", name, "python3", "-c", PYTHON_LINE) == "lazy [1]"
        assert docker("exec", "-u", "1234", "-w", "/", name, "id", "-u") == "1234"
        wait_for("the log", lambda: docker("logs", name) == "hello")
        assert "sleep 100000" in docker("top", name)
    finally:
        docker("rm", "-f", name)


def test_copy_in_and_out(docker: Docker, sleeper: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("copied in\n")
    docker("cp", tmp_path / "in", f"{sleeper}:/app/in")
    assert docker("exec", sleeper, "cat", "/app/in") == "copied in"
    docker("cp", f"{sleeper}:/app/data/linked-a", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "one file, two names\n"


def test_diff_names_what_changed(docker: Docker, sleeper: str) -> None:
    docker("exec", sleeper, "sh", "-c", "echo x > /app/new; rm /app/hello.py; echo y >> /etc/issue")
    if docker.target.lazy:
        # dockerd compares what it sees with its own layers: while a container of a stub runs it
        # sees the tree as added, afterwards only what was written.
        assert "A /app/new" in docker("diff", sleeper).splitlines()
        docker("kill", sleeper)
        wait_for("the tree is unmounted", lambda: "/usr" not in docker("diff", sleeper))
        expected = {"A /app/new", "A /etc/issue"}
    else:
        expected = {"A /app/new", "D /app/hello.py", "C /etc/issue"}
    changes = set(docker("diff", sleeper).splitlines())
    assert expected <= changes
    assert not [line for line in changes if "/usr" in line]


def test_commit_and_run_the_result(docker: Docker, sleeper: str) -> None:
    docker("exec", sleeper, "sh", "-c", "echo committed > /app/new; rm /app/link")
    docker("commit", sleeper, "committed:1")
    try:
        out = run(docker, "committed:1", "sh", "-c", "cat /app/new; ls /app; cat /etc/issue")
        assert out.startswith("committed\n")
        assert ("link" in out.split()) == docker.forgets_deletions
        assert out.endswith("replaced by the top layer")
    finally:
        docker("rmi", "committed:1")


def test_export_of_a_running_container_is_the_whole_tree(
    docker: Docker, sleeper: str, tmp_path: Path
) -> None:
    docker("export", "-o", tmp_path / "export.tar", sleeper)
    listing = subprocess.run(
        ["tar", "-tf", tmp_path / "export.tar"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "app/hello.py" in listing
    assert any(name.startswith("usr/bin/python3") for name in listing)
    assert "app/removed-later" not in listing


def test_build_on_top(docker: Docker, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(
        f"FROM {IMAGE}\n"
        "RUN python3 -c \"print('built', file=open('/app/built', 'w'))\" && rm /app/hello.py\n"
        "COPY added /app/added\n"
        "USER tester\n"
        'CMD ["cat", "/app/built", "/app/added"]\n'
    )
    (tmp_path / "added").write_text("added\n")
    docker("build", "-q", "--network=none", "-t", "built:1", tmp_path)
    try:
        assert run(docker, "built:1") == "built\nadded"
        out = run(docker, "built:1", "sh", "-c", "id -un; ls /app")
        assert out.startswith("tester\n")
        assert ("hello.py" in out.split()) == docker.forgets_deletions
    finally:
        docker("rmi", "built:1")


def test_stop_start_restart_and_kill(docker: Docker, sleeper: str) -> None:
    docker("exec", sleeper, "sh", "-c", "echo kept > /app/kept")
    docker("restart", "-t", "0", sleeper)
    assert docker("exec", sleeper, "cat", "/app/kept") == "kept"
    docker("stop", "-t", "0", sleeper)
    docker("start", sleeper)
    assert docker("exec", sleeper, "cat", "/app/kept", "/etc/issue").startswith("kept\n")
    docker("kill", sleeper)
    running = ["inspect", "-f", "{{.State.Running}}", sleeper]
    wait_for("it is dead", lambda: docker(*running) == "false")


def test_init(docker: Docker) -> None:
    assert run(docker, "--init", IMAGE, "cat", "/proc/1/comm") == "docker-init"


def test_pause_and_unpause(docker: Docker, sleeper: str) -> None:
    docker("pause", sleeper)
    docker("unpause", sleeper)
    assert docker("exec", sleeper, "echo", "on") == "on"


def test_read_only(docker: Docker) -> None:
    out = run(docker, "--read-only", "--tmpfs", "/tmp", IMAGE, "sh", "-c",
              "echo x > /tmp/x && cat /tmp/x; echo y > /app/y || echo refused")  # fmt: skip
    assert out == "x\nrefused"


def test_volumes_and_bind_mounts_into_the_tree(docker: Docker, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("bound\n")
    options = ["-v", f"{tmp_path}:/usr/share/bound", "-v", "/app/data", "-v", "/usr/share/new"]
    script = "cat /usr/share/bound/f; echo z | tee /usr/share/bound/z /app/data/z /usr/share/new/z"
    assert run(docker, *options, IMAGE, "sh", "-c", script) == "bound\nz"
    assert (tmp_path / "z").read_text() == "z\n"


def test_terminal(docker: Docker) -> None:
    leader, follower = pty.openpty()
    try:
        command = [*docker.prefix, "run", "--rm", "-it", IMAGE, "python3", "-c",
                   "import os; print('tty', os.isatty(0))"]  # fmt: skip
        process = subprocess.Popen(
            command, env=docker.env, stdin=follower, stdout=follower, stderr=follower
        )
        os.close(follower)
        follower = -1
        seen = b""
        try:
            while chunk := os.read(leader, 4096):
                seen += chunk
        except OSError:  # EIO: the other end is closed
            pass
        assert process.wait(120) == 0
        assert b"tty True" in seen
    finally:
        os.close(leader)
        if follower >= 0:
            os.close(follower)


def test_health_checks_are_run(docker: Docker) -> None:
    name = docker("run", "-d", "--init", "--health-cmd", "python3 -c 'import json'",
                  "--health-interval", "1s", IMAGE, "sleep", "100000")  # fmt: skip
    try:
        wait_for(
            "healthy",
            lambda: docker("inspect", "-f", "{{.State.Health.Status}}", name) == "healthy",
        )
    finally:
        docker("rm", "-f", name)


def test_many_at_once(docker: Docker) -> None:
    def one(number: int) -> str:
        return run(docker, IMAGE, "python3", "-c", f"print({number} * 2)")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert list(pool.map(one, range(AT_ONCE))) == [str(2 * i) for i in range(AT_ONCE)]


def test_an_ordinary_image_runs_as_ever(docker: Docker) -> None:
    script = "echo $0; id -u; echo x > /x; cat /x; ls /"
    lines = run(docker, ORDINARY, "sh", "-c", script).split()
    assert lines[:3] == ["sh", "0", "x"]
    assert {"bin", "etc", "x"} <= set(lines)
    assert ".clip" not in lines


def test_an_annotation_names_the_image(docker: Docker, debian_reference: str) -> None:
    """Docker 24 and newer. What was written is in the engine's layer, as with a stub."""
    if docker.target.node is None or "--annotation" not in docker("run", "--help"):
        return  # runc knows no such annotation, an older docker no such flag
    docker.target.node.clipshim("index", debian_reference)
    annotation = f"io.clipshim.image={debian_reference}"
    name = docker("run", "-d", "--annotation", annotation, ORDINARY, "sleep", "100000")
    try:
        assert docker("exec", name, "python3", "-c", PYTHON_LINE) == "lazy [1]"
        docker("exec", name, "sh", "-c", "echo kept > /app/kept")
        docker("restart", "-t", "0", name)
        assert docker("exec", name, "cat", "/app/kept") == "kept"
        assert "A /app/kept" in docker("diff", name).splitlines()
    finally:
        docker("rm", "-f", name)


def test_inspect_names_the_images_configuration(docker: Docker) -> None:
    config = json.loads(docker("image", "inspect", IMAGE))[0]["Config"]
    assert config["WorkingDir"] == "/app"
    assert config["Labels"]["org.example.purpose"] == "tests"
    assert config["Cmd"] == ["/usr/bin/python3", "/app/hello.py"]


def test_containers_live_through_a_crash_of_the_engine(docker: Docker) -> None:
    name = docker("run", "-d", "--init", IMAGE, "sleep", "100000")
    try:
        docker.daemon.kill()
        docker.start()
        assert docker("inspect", "-f", "{{.State.Running}}", name) == "true"
        assert docker("exec", name, "python3", "-c", PYTHON_LINE) == "lazy [1]"
    finally:
        docker("rm", "-f", name)


def test_compose_names_the_runtime(docker: Docker, tmp_path: Path) -> None:
    (tmp_path / "docker-compose.yml").write_text(
        "version: '2.4'\nservices:\n  app:\n"
        f"    image: {IMAGE}\n    runtime: {docker.target.name}\n    network_mode: none\n"
        "    command: ['python3', '/app/hello.py']\n"
    )
    plugin = docker.run("compose", "version", check=False).returncode == 0
    compose = [*docker.prefix, "compose"] if plugin else ["/usr/bin/docker-compose"]
    compose += ["-p", "clipshimtest", "-f", str(tmp_path / "docker-compose.yml")]
    try:
        done = subprocess.run(
            [*compose, "up", "--no-color"], env=docker.env, capture_output=True, text=True,
            timeout=300, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "lazy [1]" in done.stdout
    finally:
        subprocess.run(
            [*compose, "down", "-t", "0"], env=docker.env, capture_output=True, timeout=300,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

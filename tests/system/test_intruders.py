"""What tenants, other users and hostile files try, and what they get: SECURITY.md, row by row.

Real daemon, real runc, real mounts. Not for hostile bytes in tar, gzip and .clip: those are unit
tests with damage and hypothesis, and the registry's lies are in test_registry_faults.
"""

from __future__ import annotations

import json
import os
import random
import socket
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.registry import running_registry
from tests.support.runtimes import Runtime, write_bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.images import Image
    from tests.support.node import Node

NOBODY = 65534
HELLO = ["/bin/busybox", "echo", "hello"]


@pytest.fixture(scope="module")
def tiny_clip(run_root: Path, tiny_reference: str) -> Path:
    """The index of the tiny image."""
    from tests.support.node import Node

    path = run_root / "intruders.clip"
    with Node(run_root / "intruders-indexer") as node:
        node.clipshim("index", tiny_reference, path)
    return path


@pytest.fixture
def runtime(node: Node, tmp_path: Path) -> Iterator[Runtime]:
    """clipshim of the private node."""
    with Runtime.clipshim(tmp_path / "root", node) as made:
        yield made


def _bundle(directory: Path, annotations: dict[str, str], **options: object) -> Path:
    return write_bundle(directory, HELLO, annotations=annotations, **options)  # type: ignore[arg-type]


def _refused(runtime: Runtime, bundle: Path, node: Node, container: str = "c") -> str:
    """Runs what must be refused; the message. Nothing of the container may be left."""
    before = (bundle / "config.json").read_bytes()
    result = runtime("run", "--bundle", bundle, container, check=False)
    assert result.returncode == 1, result.stdout
    assert "hello" not in result.stdout
    assert "Traceback" not in result.stderr
    assert (bundle / "config.json").read_bytes() == before
    assert node.container_mounts() == []
    for directory in (node.state_dir / "upper", node.state_dir / "work"):
        assert not directory.exists() or list(directory.iterdir()) == []
    return result.stderr


# --- other users of the node ---------------------------------------------------------------


def test_nothing_of_ours_can_be_entered_or_read_by_others(
    node: Node, runtime: Runtime, tiny_clip: Path, tmp_path: Path
) -> None:
    bundle = _bundle(tmp_path / "b", {"io.clipshim.index": "index.clip"})
    (bundle / "index.clip").write_bytes(tiny_clip.read_bytes())
    assert runtime("run", "--bundle", bundle, "c").stdout == "hello\n"

    for directory in (node.run_dir, node.state_dir):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    sock = (node.run_dir / "daemon.sock").stat()
    assert (stat.S_IMODE(sock.st_mode), sock.st_uid) == (0o600, 0)
    loose = [
        path
        for base in (node.run_dir, node.state_dir)
        for path in base.iterdir()
        if not path.is_symlink() and path.stat().st_mode & 0o022
    ]
    assert loose == []


def test_the_daemon_answers_root_only(node: Node) -> None:
    """Even where somebody has opened the directories and the socket for everybody."""
    node.start()
    sock = node.run_dir / "daemon.sock"
    node.directory.chmod(0o755)
    node.run_dir.chmod(0o755)
    sock.chmod(0o666)
    code = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.settimeout(60); s.connect(sys.argv[1])\n"
        "try:\n"
        '    s.sendall(b\'{"op":"stop"}\\n\'); print(s.recv(1000).decode())\n'
        "except (ConnectionError, BrokenPipeError): print('closed')\n"
    )

    answer = subprocess.run(
        ["/usr/bin/python3", "-I", "-c", code, sock],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout

    assert '"ok": true' not in answer
    assert '"ok":true' not in answer
    assert node.ping() is not None


@pytest.mark.parametrize(
    "noise",
    [b"\0" * 64, b"{" * 5000 + b"\n", b'{"op":', b"[]\n", b'{"op":"mount"}\n', b'{"op":1}\n'],
    ids=["zeros", "braces", "cut", "list", "mount-of-nothing", "op-of-no-string"],
)
def test_noise_on_the_socket_harms_nobody(node: Node, noise: bytes) -> None:
    node.start()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(node.run_dir / "daemon.sock"))
        client.sendall(noise)
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as replies:
            lines = [json.loads(line) for line in replies]

    assert all(line.get("ok") is False for line in lines)
    assert node.ping() is not None


def test_a_request_without_an_end_is_cut_off(node: Node) -> None:
    node.start()
    sent = 0
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(node.run_dir / "daemon.sock"))
        try:
            while sent < 64 << 20:
                sent += client.send(b"x" * (1 << 20))
        except OSError:
            pass

    assert sent < 64 << 20
    assert node.ping() is not None


# --- annotations ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("/etc/passwd", "index_dirs"),
        ("../index.clip", "expected a digest, a file name"),
        ("rootfs/index.clip", "expected a digest, a file name"),
        ("", "expected a digest, a file name"),
        ("..", "expected a digest, a file name"),
        ("missing.clip", "no such file"),
        ("rootfs", "expected a regular file"),
        ("config.json", ""),
        ("sha256:" + "0" * 64, ""),
        ("sha256:../../etc/passwd", ""),
    ],
)
def test_an_index_annotation_cannot_name_other_files(
    node: Node, runtime: Runtime, tmp_path: Path, value: str, message: str
) -> None:
    bundle = _bundle(tmp_path / "b", {"io.clipshim.index": value})
    (tmp_path / "index.clip").write_bytes(b"")

    assert message in _refused(runtime, bundle, node)


def test_a_link_or_a_pipe_in_the_bundle_is_no_index(
    node: Node, runtime: Runtime, tiny_clip: Path, tmp_path: Path
) -> None:
    bundle = _bundle(tmp_path / "b", {"io.clipshim.index": "index.clip"})
    (bundle / "index.clip").symlink_to(tiny_clip)
    assert "index.clip" in _refused(runtime, bundle, node)

    (bundle / "index.clip").unlink()
    os.mkfifo(bundle / "index.clip")
    assert "regular file" in _refused(runtime, bundle, node)


def test_index_dirs_opens_its_files_and_no_others(
    node: Node, runtime: Runtime, tiny_clip: Path, tmp_path: Path
) -> None:
    shelf = tmp_path / "shelf"
    (shelf / "deep").mkdir(parents=True)
    (shelf / "deep/tiny.clip").write_bytes(tiny_clip.read_bytes())
    (shelf / "link.clip").symlink_to(tiny_clip)
    (shelf / "out").symlink_to(tiny_clip.parent)
    (tmp_path / "shelf-next").mkdir()
    (tmp_path / "shelf-next/tiny.clip").write_bytes(tiny_clip.read_bytes())
    node.configure(index_dirs=[str(shelf)])

    good = _bundle(tmp_path / "good", {"io.clipshim.index": f"{shelf}/deep/tiny.clip"})
    assert runtime("run", "--bundle", good, "good").stdout == "hello\n"
    for number, name in enumerate(
        (
            f"{shelf}/link.clip",
            f"{shelf}/out/{tiny_clip.name}",
            f"{shelf}/../shelf-next/tiny.clip",
            f"{shelf}-next/tiny.clip",
        )
    ):
        bundle = _bundle(tmp_path / f"bad{number}", {"io.clipshim.index": name})
        assert "io.clipshim.index" in _refused(runtime, bundle, node, f"bad{number}")


def test_an_image_annotation_names_allowed_registries_only(
    make_node: Callable[..., Node], tiny_reference: str, tmp_path: Path
) -> None:
    node = make_node(allowed_registries=["registry.example"], index_on_demand=True)
    with Runtime.clipshim(tmp_path / "root", node) as runtime:
        bundle = _bundle(tmp_path / "b", {"io.clipshim.image": tiny_reference})
        assert "allowed_registries" in _refused(runtime, bundle, node)
        for number, name in enumerate(
            ("oci:/var/lib", "docker-archive:/etc/passwd", "/etc", "a b")
        ):
            bundle = _bundle(tmp_path / f"b{number}", {"io.clipshim.image": name})
            assert "Traceback" not in _refused(runtime, bundle, node, f"c{number}")


def test_the_nodes_credentials_are_not_the_tenants(
    make_node: Callable[..., Node], tiny: Image, tmp_path: Path, run_root: Path
) -> None:
    with running_registry(run_root / "private", username="owner", password="secret") as private:
        reference = private.push_layout(tiny.layout, "tiny:private", tag="test")
        closed = make_node(index_on_demand=True)
        opened = make_node(index_on_demand=True, node_credentials=True)
        for node in (closed, opened):
            login = node.directory / "docker-config"
            login.mkdir()
            (login / "config.json").write_text(
                json.dumps({"auths": {private.host: {"username": "owner", "password": "secret"}}})
            )
            node.clipshim("index", reference, node.directory / "by-hand.clip")
        with Runtime.clipshim(tmp_path / "closed", closed) as runtime:
            bundle = _bundle(tmp_path / "b", {"io.clipshim.image": reference})
            refused = _refused(runtime, bundle, closed)
            assert "secret" not in refused
        with Runtime.clipshim(tmp_path / "opened", opened) as runtime:
            bundle = _bundle(tmp_path / "b2", {"io.clipshim.image": reference})
            assert runtime("run", "--bundle", bundle, "c").stdout == "hello\n"


# --- container ids and planted links -------------------------------------------------------


@pytest.mark.parametrize("name", ["layers", "daemon.sock", "daemon.lock", "keeper.json"])
def test_an_id_that_is_one_of_our_names_is_just_an_id(
    node: Node, runtime: Runtime, tiny_clip: Path, tmp_path: Path, name: str
) -> None:
    bundle = _bundle(tmp_path / "b", {"io.clipshim.index": "index.clip"})
    (bundle / "index.clip").write_bytes(tiny_clip.read_bytes())

    assert runtime("run", "--bundle", bundle, name).stdout == "hello\n"
    assert node.ping() is not None
    assert node.container_mounts() == []


def test_no_file_of_the_daemon_is_in_the_way_of_an_id_under_runcs_default_root(
    node: Node, tiny_clip: Path, tmp_path: Path
) -> None:
    from clipshim.settings import load_settings
    from clipshim.shim.state import DEFAULT_ROOT, ContainerLock, container_key

    by_hand = tmp_path / "by-hand"
    by_hand.mkdir()
    node.clipshim("mount", tiny_clip, by_hand)
    settings = load_settings(str(node.config))
    names = set(os.listdir(settings.run_dir))
    assert {"daemon.sock", "daemon.lock", "keeper.json", "hand-mounts.json", "layers"} <= names
    for name in sorted(names):
        key = container_key(name, DEFAULT_ROOT)
        assert key not in names
        with ContainerLock(settings, key, wait_s=0.0):
            pass
    node.clipshim("umount", by_hand)
    assert node.ping() is not None


@pytest.mark.parametrize("name", ["../escape", "..", ".", "a/b", "", "a\nb"])
def test_an_id_cannot_leave_its_directory(
    node: Node, runtime: Runtime, tiny_clip: Path, tmp_path: Path, name: str
) -> None:
    bundle = _bundle(tmp_path / "b", {"io.clipshim.index": "index.clip"})
    (bundle / "index.clip").write_bytes(tiny_clip.read_bytes())

    result = runtime("run", "--bundle", bundle, "--", name, check=False)

    assert result.returncode != 0
    assert not (node.directory / "escape").exists()
    assert node.container_mounts() == []


@pytest.mark.parametrize("where", ["run", "state/upper", "state/work"])
def test_a_planted_link_redirects_no_mount_and_no_delete(
    node: Node, runtime: Runtime, tiny_clip: Path, tmp_path: Path, where: str
) -> None:
    bundle = _bundle(tmp_path / "b", {"io.clipshim.index": "index.clip"})
    (bundle / "index.clip").write_bytes(tiny_clip.read_bytes())
    runtime("run", "--bundle", bundle, "first")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("precious")
    planted = node.directory / where
    names = ["c"]
    # the key of a container with a private --root has a suffix: plant both
    from clipshim.shim.state import container_key

    names.append(container_key("c", str(runtime.root)))
    for name in names:
        (planted / name).symlink_to(victim)

    runtime("run", "--bundle", bundle, "c", check=False)
    runtime("delete", "--force", "c", check=False)
    node.clipshim("gc", check=False)

    assert (victim / "precious").read_text() == "precious"
    assert sorted(path.name for path in victim.iterdir()) == ["precious"]
    assert not any(str(victim) in point for point in node.mounts())


def test_links_in_an_image_lead_nowhere_outside_it(
    node: Node, runtime: Runtime, tiny_clip: Path, tmp_path: Path
) -> None:
    """A stub's rootfs with a link for .clip, or for the index: an ordinary container for us."""
    for number, target in enumerate((str(tiny_clip), "/etc/passwd", "/dev/zero")):
        rootfs = tmp_path / f"rootfs{number}"
        (rootfs / ".clip").mkdir(parents=True)
        (rootfs / ".clip/index.clip").symlink_to(target)
        bundle = _bundle(tmp_path / f"b{number}", {}, rootfs=rootfs)
        result = runtime("run", "--bundle", bundle, f"c{number}", check=False)
        assert result.returncode != 0  # runc finds no busybox in the empty rootfs
        assert "hello" not in result.stdout
        assert node.container_mounts() == []


# --- environments and indexes --------------------------------------------------------------


def test_no_environment_reaches_our_python(
    node: Node, runtime: Runtime, tiny_clip: Path, tmp_path: Path
) -> None:
    evil = tmp_path / "evil"
    evil.mkdir()
    mark = tmp_path / "was-here"
    for module in ("sitecustomize", "usercustomize", "json", "clipshim", "trio"):
        (evil / f"{module}.py").write_text(f"open({str(mark)!r}, 'w')\n")
    hostile = {
        "PYTHONPATH": str(evil),
        "PYTHONHOME": str(evil),
        "PYTHONSTARTUP": str(evil / "json.py"),
        "PYTHONINSPECT": "1",
        "PYTHONPLATLIBDIR": str(evil),
    }
    bundle = _bundle(tmp_path / "b", {"io.clipshim.index": "index.clip"}, env=hostile)
    (bundle / "index.clip").write_bytes(tiny_clip.read_bytes())
    runtime.env = {**runtime.env, **hostile}

    assert runtime("run", "--bundle", bundle, "c", cwd=evil).stdout == "hello\n"
    assert runtime("delete", "--force", "c", cwd=evil).returncode == 0
    assert not mark.exists()


def test_a_damaged_index_starts_nothing(
    node: Node, runtime: Runtime, tiny_clip: Path, tmp_path: Path
) -> None:
    good = tiny_clip.read_bytes()
    chance = random.Random(7)
    for number in range(12):
        bad = bytearray(good)
        if number % 3 == 0:
            del bad[chance.randrange(1, len(bad)) :]
        else:
            bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        bundle = _bundle(tmp_path / f"b{number}", {"io.clipshim.index": "index.clip"})
        (bundle / "index.clip").write_bytes(bad)
        assert _refused(runtime, bundle, node, f"c{number}")
    assert node.ping() is not None


def test_the_caller_of_a_hook_cannot_change_its_python(checkout: Path, tmp_path: Path) -> None:
    """Hooks run with the container's idea of an environment in some engines."""
    evil = tmp_path / "evil"
    evil.mkdir()
    mark = tmp_path / "was-here"
    (evil / "json.py").write_text(f"open({str(mark)!r}, 'w')\n")
    for hook in sorted((checkout / "runc-hooks").glob("clipshim-*")):
        if hook.suffix in ("", ".py"):
            subprocess.run(
                [hook],
                input=b"{}",
                env={"PYTHONPATH": str(evil), "PATH": os.path.dirname(sys.executable)},
                cwd=evil,
                capture_output=True,
                timeout=120,
                check=False,
            )
    assert not mark.exists()

"""The commands on real images: index, inspect, mount, push, pull, stub, status, doctor."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from clipshim.mounts.erofs import probe_erofs
from clipshim.registry.access import RegistryAccess
from clipshim.registry.artifacts import push_index
from tests.support.images import debian_root
from tests.support.node import CLIPSHIM, Node, wait_for
from tests.support.registry import TestRegistry, running_registry
from tests.support.skips import kernel_cannot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.images import Image

PYTHON = "/usr/bin/python3.11"


def document(node: Node, *arguments: str | Path) -> dict[str, Any]:
    """The JSON that a command prints; nothing else may be on stdout."""
    found: dict[str, Any] = json.loads(node.clipshim(*arguments, "--format", "json").stdout)
    return found


def failure(node: Node, *arguments: str | Path, code: int = 1) -> str:
    """What a failing command says: one error line, perhaps a hint, never a traceback."""
    done = node.clipshim(*arguments, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith("clipshim: error: "), done.stderr
    assert [line for line in lines[1:] if not line.startswith("hint: ")] == [], done.stderr
    return done.stderr


def test_an_index_without_output_goes_into_the_store_by_name(
    node: Node, tiny_reference: str
) -> None:
    made = document(node, "index", tiny_reference)
    assert made["reference"] == tiny_reference
    assert made["index"].startswith(str(node.state_dir))
    by_name = document(node, "inspect", tiny_reference)
    by_digest = document(node, "inspect", made["digest"])
    assert by_name == by_digest
    assert by_name["digest"] == made["digest"]
    assert os.listdir(node.state_dir / "indexes").count("names.json") == 1


def test_the_same_image_gives_the_same_index(node: Node, tiny_reference: str) -> None:
    one, two = node.directory / "one.clip", node.directory / "two.clip"
    node.clipshim("index", tiny_reference, one)
    node.clipshim("index", tiny_reference, two)
    assert one.read_bytes() == two.read_bytes()


def test_an_index_can_prove_itself_against_a_real_unpack(node: Node, tiny: Image) -> None:
    path = node.directory / "proved.clip"
    made = document(node, "index", tiny.reference, path, "--verify-unpack")
    assert made["verified_against_unpack"] is True


def test_inspect_shows_a_file_as_it_is(node: Node, debian_clip: Path) -> None:
    facts = document(node, "inspect", debian_clip, "--path", PYTHON)
    real = os.lstat(f"{debian_root()}{PYTHON}")
    assert facts["type"] == "file"
    assert facts["mode"] == f"{real.st_mode & 0o7777:04o}"
    assert (facts["uid"], facts["gid"], facts["size"]) == (0, 0, real.st_size)
    assert sum(extent["length"] for extent in facts["extents"]) == real.st_size
    assert facts["extents"][0]["spans"]
    text = node.clipshim("inspect", debian_clip, "--path", PYTHON).stdout
    assert str(real.st_size) in text
    assert "LAYER" in text


def test_inspect_shows_links_and_directories(node: Node, debian_clip: Path) -> None:
    link = document(node, "inspect", debian_clip, "--path", "/bin")
    assert (link["type"], link["target"]) == ("symlink", "usr/bin")
    directory = document(node, "inspect", debian_clip, "--path", "/usr")
    assert "bin" in directory["entries"]
    assert directory["links"] >= 2
    assert "not in" in failure(node, "inspect", debian_clip, "--path", "/no/such")


def test_inspect_lists_the_layers(node: Node, debian_clip: Path, debian: Image) -> None:
    facts = document(node, "inspect", debian_clip)
    digests = [layer["digest"] for layer in debian.manifest["layers"]]
    assert [layer["blob_digest"] for layer in facts["layers"]] == digests
    text = node.clipshim("inspect", debian_clip).stdout
    assert len([line for line in text.splitlines() if " gzip " in line]) == len(digests)


@pytest.mark.parametrize("mode", ["erofs", "fuse"])
def test_a_tree_is_mounted_by_hand_and_taken_away(
    make_node: Callable[..., Node], debian_clip: Path, mode: str
) -> None:
    node = make_node()
    if mode == "erofs" and (reason := probe_erofs(str(node.directory))):
        kernel_cannot(reason)
    target = node.directory / "tree"
    target.mkdir()
    facts = document(node, "mount", debian_clip, target, "--mode", mode)
    assert facts["mode"] == mode
    assert (target / "proc").stat().st_nlink == 2
    assert (target / "usr").stat().st_nlink > 2
    assert os.readlink(target / "bin") == "usr/bin"
    expected = (debian_root() / PYTHON.lstrip("/")).read_bytes()
    assert (target / PYTHON.lstrip("/")).read_bytes() == expected
    node.clipshim("umount", target)
    assert os.listdir(target) == []
    assert str(target) not in node.mounts()
    assert "nothing is mounted" in failure(node, "umount", target)


def test_nothing_is_mounted_over_another_mount(node: Node, debian_clip: Path) -> None:
    target = node.directory / "tree"
    target.mkdir()
    node.clipshim("mount", debian_clip, target, "-q")
    assert "already" in failure(node, "mount", debian_clip, target, code=2)
    node.clipshim("umount", target)
    assert os.listdir(target) == []


def test_a_tree_in_use_stays_mounted(node: Node, debian_clip: Path) -> None:
    target = node.directory / "tree"
    target.mkdir()
    node.clipshim("mount", debian_clip, target, "-q")
    with open(target / "etc/passwd"):
        assert "fuser" in failure(node, "umount", target)
    assert (target / "proc").is_dir()
    node.clipshim("umount", target)


def test_wrong_mounts_say_why_and_leave_nothing(node: Node, debian_clip: Path) -> None:
    assert "existing directory" in failure(
        node, "mount", debian_clip, node.directory / "no", code=2
    )
    assert "no such file" in failure(node, "mount", node.directory / "no.clip", node.directory)
    damaged = node.directory / "damaged.clip"
    damaged.write_bytes(debian_clip.read_bytes()[:-100])
    target = node.directory / "tree"
    target.mkdir()
    failure(node, "mount", damaged, target)
    assert str(target) not in node.mounts()


@pytest.mark.parametrize("kind", ["layout", "archive", "missing"])
def test_a_bare_path_gets_the_explaining_error(node: Node, tiny: Image, kind: str) -> None:
    if kind == "layout":
        path = tiny.layout
    else:
        path = node.directory / "image.tar"
        if kind == "archive":
            with tarfile.open(path, "w") as archive:
                archive.add(tiny.layout, arcname=".")
    text = failure(node, "index", path, code=2)
    assert "hint: " in text
    assert {"layout": "oci:", "archive": "oci-archive:", "missing": "oci-archive"}[kind] in text


def test_a_registry_that_is_not_there_is_an_error_in_time(make_node: Callable[..., Node]) -> None:
    node = make_node(fetch_deadline_s=2, connect_timeout_s=2)
    assert "127.0.0.1:1" in failure(node, "index", "127.0.0.1:1/app:1", node.directory / "a.clip")
    assert sorted(path.name for path in node.directory.iterdir()) == ["config.toml"]


def test_credentials_come_in_pairs(node: Node) -> None:
    text = failure(node, "index", "127.0.0.1:1/app:1", "-u", "me", code=2)
    assert "--password-stdin" in text


def test_progress_is_shown_on_a_terminal_only(node: Node, tiny_reference: str) -> None:
    target = node.directory / "quiet.clip"
    assert "\x1b" not in node.clipshim("index", tiny_reference, target).stderr
    reader, writer = os.openpty()
    shown = b""
    with subprocess.Popen(
        [CLIPSHIM, "index", tiny_reference, node.directory / "shown.clip"],
        env={**node.env, "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=writer,
    ) as process:
        os.close(writer)
        while True:
            try:
                piece = os.read(reader, 4096)
            except OSError:  # EIO: the other side is closed
                break
            if not piece:
                break
            shown += piece
        assert process.stdout is not None
        assert b"digest:" in process.stdout.read()
        assert process.wait(timeout=60) == 0
    os.close(reader)
    assert b"layer 1" in shown


def test_an_index_travels_through_the_registry(
    make_node: Callable[..., Node], registry: TestRegistry, tiny: Image
) -> None:
    reference = registry.push_layout(tiny.layout, "travels:1", tag="test")
    sender, receiver = make_node(), make_node()
    made = document(sender, "index", reference)
    pushed = document(sender, "push", reference, reference)
    assert pushed["manifest_digest"].startswith("sha256:")
    pulled = document(receiver, "pull", reference)
    assert pulled["digest"] == made["digest"]
    assert document(receiver, "inspect", reference)["digest"] == made["digest"]


def test_an_index_of_another_image_is_not_pulled(
    node: Node, registry: TestRegistry, tiny: Image
) -> None:
    """The repository's writers can attach any file; it must not become the image's index."""
    reference = registry.push_layout(tiny.layout, "victim:1", tag="test")
    other = registry.push_layout(tiny.layout, "other:1", tag="test")
    made = document(node, "index", other)
    push_index(made["index"], reference, access=RegistryAccess())
    assert "its index is of" in failure(node, "pull", reference)
    assert reference not in (node.state_dir / "indexes/names.json").read_text()


def test_an_index_is_pushed_only_where_its_image_is(
    node: Node, registry: TestRegistry, tiny: Image, debian_reference: str
) -> None:
    reference = registry.push_layout(tiny.layout, "only-there:1", tag="test")
    node.clipshim("index", reference, "-q")
    assert "does not have" in failure(node, "push", reference, debian_reference)


def test_a_missing_index_in_the_registry_is_an_error(
    node: Node, registry: TestRegistry, tiny: Image
) -> None:
    reference = registry.push_layout(tiny.layout, "without-index:1", tag="test")
    assert reference in failure(node, "pull", reference)


def test_a_stub_is_an_ordinary_small_image(
    node: Node, registry: TestRegistry, debian_reference: str
) -> None:
    node.clipshim("index", debian_reference, "-q")
    target = registry.reference("debian:lazy")
    facts = document(node, "stub", debian_reference, target)
    assert facts["size"] < 4 << 20
    shown = subprocess.run(
        ["skopeo", "inspect", "--config", "--tls-verify=false", f"docker://{target}"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    config = json.loads(shown.stdout)
    assert config["config"]["Cmd"] == ["/usr/bin/python3", "/app/hello.py"]
    assert len(config["rootfs"]["diff_ids"]) == 1


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_a_stub_archive_holds_index_and_accounts(node: Node, debian_clip: Path, kind: str) -> None:
    archive = node.directory / "stub.tar"
    node.clipshim("stub", debian_clip, "-o", archive, "--archive-format", kind, "--name", "app:x")
    copied = node.directory / "copied"
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "-q", f"{kind}:{archive}", f"dir:{copied}"],
        check=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    layer = json.loads((copied / "manifest.json").read_text())["layers"][0]["digest"]
    with tarfile.open(copied / layer.removeprefix("sha256:")) as members:
        passwd = members.extractfile("etc/passwd")
        index = members.extractfile(".clip/index.clip")
        assert passwd is not None
        assert index is not None
        accounts = passwd.read().decode()
        assert accounts.startswith((debian_root() / "etc/passwd").read_text())
        assert index.read() == debian_clip.read_bytes()


def test_a_stub_is_loaded_into_podman(node: Node, debian_clip: Path) -> None:
    storage = node.directory / "storage.conf"
    storage.write_text(
        f'[storage]\ndriver = "vfs"\nrunroot = "{node.directory}/podman-run"\n'
        f'graphroot = "{node.directory}/podman-root"\n'
    )
    env = {**node.env, "CONTAINERS_STORAGE_CONF": str(storage)}
    node.clipshim("stub", debian_clip, "--load", "podman", "--name", "localhost/app:lazy", env=env)
    listed = subprocess.run(
        ["podman", "images", "--noheading", "--format", "{{.Repository}}:{{.Tag}}"],
        env=env, capture_output=True, text=True, check=True, timeout=120,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert listed.stdout.split() == ["localhost/app:lazy"]


def test_a_stub_needs_somewhere_to_go(node: Node, debian_clip: Path) -> None:
    assert "TARGET" in failure(node, "stub", debian_clip, code=2)


def test_a_stub_of_local_files_needs_their_data_in_its_index(node: Node, tiny: Image) -> None:
    image, archive, clip = f"oci:{tiny.layout}", node.directory / "s", node.directory / "e.clip"
    assert "--embed" in failure(node, "stub", image, "-o", archive, code=2)
    node.clipshim("index", "--embed", image, clip)
    node.clipshim("stub", clip, "-o", archive)
    assert archive.exists()


def test_status_tells_of_the_daemon(node: Node, debian_clip: Path) -> None:
    assert document(node, "status") == {"running": False}
    assert "not running" in node.clipshim("status").stdout
    target = node.directory / "tree"
    target.mkdir()
    node.clipshim("mount", debian_clip, target, "-q")
    found = document(node, "status")
    assert found["running"] is True
    assert len(found["images"]) == 1
    assert found["images"][0]["image_id"][:12] in node.clipshim("status").stdout
    assert "# TYPE clipshim_" in node.clipshim("status", "--metrics").stdout
    node.clipshim("umount", target)


def test_the_daemon_is_stopped_when_the_command_returns(node: Node, debian_clip: Path) -> None:
    target = node.directory / "tree"
    target.mkdir()
    node.clipshim("mount", debian_clip, target, "-q")
    done = node.clipshim("daemon", "--stop", check=False)
    assert done.returncode == 1, "a mounted tree keeps the daemon"
    node.clipshim("umount", target)
    node.clipshim("daemon", "--stop")
    assert node.mounts() == []
    wait_for("the last process ends", lambda: not node.processes())
    node.clipshim("daemon", "--stop")


def test_the_daemon_is_replaced_under_a_mounted_tree(node: Node, debian_clip: Path) -> None:
    target = node.directory / "tree"
    target.mkdir()
    node.clipshim("mount", debian_clip, target, "-q")
    old = node.start()
    node.clipshim("daemon", "--replace")

    def replaced() -> bool:
        answer = node.ping()
        return answer is not None and answer["pid"] != old["pid"]

    wait_for("another server answers", replaced)
    expected = (debian_root() / PYTHON.lstrip("/")).read_bytes()
    assert (target / PYTHON.lstrip("/")).read_bytes() == expected
    node.clipshim("umount", target)


def test_gc_removes_an_unused_tree(make_node: Callable[..., Node], debian_clip: Path) -> None:
    node = make_node(linger_s=3600)
    target = node.directory / "tree"
    target.mkdir()
    node.clipshim("mount", debian_clip, target, "-q")
    node.clipshim("umount", target)
    planned = document(node, "gc", "--dry-run")["removed"]
    assert planned
    assert len(document(node, "status")["images"]) == 1
    assert document(node, "gc")["removed"]
    assert document(node, "status")["images"] == []


def test_a_completed_image_needs_no_registry(node: Node, run_root: Path, debian: Image) -> None:
    with running_registry(run_root / "soon-gone") as registry:
        reference = registry.push_layout(debian.layout, "gone:1", tag="test")
        node.clipshim("index", reference, "-q")
        node.clipshim("bundle", reference, node.directory / "b", "-q")
        done = document(node, "complete", reference)
    assert [layer["complete"] for layer in done["layers"]] == [True] * 4
    shown = node.clipshim("run", "--bundle", node.directory / "b", "offline").stdout
    assert shown.startswith("lazy ")


def test_a_report_tells_what_a_container_fetched(node: Node, debian_clip: Path) -> None:
    node.clipshim("bundle", debian_clip, node.directory / "b", "-q", "--", "/bin/sleep", "600")
    # Without its own descriptors a detached container would hold the ends of our pipes.
    with open(node.directory / "output", "wb") as output:
        subprocess.run(
            [CLIPSHIM, "run", "--detach", "--bundle", node.directory / "b", "reported"],
            env=node.env, check=True, timeout=120, stdin=subprocess.DEVNULL,
            stdout=output, stderr=output,
        )  # fmt: skip
    try:
        facts = document(node, "report", "reported")
        assert facts["container"] == "reported"
        assert 0 < facts["fetched_bytes"] < facts["image_bytes"]
        assert "reported" in node.clipshim("report", "reported").stdout
        assert [c["id"] for c in document(node, "status")["containers"]] == ["reported"]
    finally:
        node.clipshim("delete", "--force", "reported")
    assert "no such container" in failure(node, "report", "reported")


def test_other_mounts_are_not_unmounted(node: Node) -> None:
    other = node.directory / "other"
    other.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", other], check=True)
    try:
        assert "found tmpfs" in failure(node, "umount", other)
        assert os.path.ismount(other)
    finally:
        subprocess.run(["umount", other], check=True)


def test_doctor_finds_nothing_wrong_here(node: Node) -> None:
    done = node.clipshim("doctor")
    assert "broken" not in done.stdout
    assert document(node, "doctor")["ok"] is True


def test_doctor_says_what_is_broken_and_what_to_do(make_node: Callable[..., Node]) -> None:
    node = make_node(runtimes=["/no/such/runc"], state_dir="/dev/shm/clipshim-doctor")
    done = node.clipshim("doctor", "--registry", "127.0.0.1:1", check=False)
    assert done.returncode == 1
    broken = [line for line in done.stdout.splitlines() if line.startswith("broken")]
    found = {line.split()[1].rstrip(":") for line in broken}
    assert found >= {"state_dir", "runtime", "registry"}
    assert not os.path.exists("/dev/shm/clipshim-doctor")


def test_a_broken_configuration_is_named(node: Node, debian_clip: Path) -> None:
    node.config.write_text("mode = 'sideways'\n")
    assert "mode" in failure(node, "mount", debian_clip, node.directory)
    assert node.clipshim("doctor", check=False).returncode == 1


def test_python_programs_get_the_same(
    node: Node, tiny_reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clipshim

    monkeypatch.setenv("CLIPSHIM_CONFIG", str(node.config))
    path = clipshim.index_image(tiny_reference, node.directory / "tiny.clip")
    target, root = node.directory / "tree", node.directory / "root"
    target.mkdir()
    root.mkdir()
    with clipshim.mount_index(path, target) as mounted:
        assert mounted.reference == tiny_reference
        assert "bin" in os.listdir(target)
    assert os.listdir(target) == []
    before = os.umask(0o077)  # the root looks like the image's all the same
    try:
        mounter = clipshim.OverlayMounter(path, root, state=node.directory / "state-of-root")
        with mounter as rootfs:
            (rootfs / "written").write_text("by a program")
            assert (rootfs / "bin").is_dir()
            assert rootfs.stat().st_mode == 0o40755
    finally:
        os.umask(before)
    assert os.listdir(root) == []
    assert (node.directory / "state-of-root/upper/written").read_text() == "by a program"
    assert node.container_mounts() == []

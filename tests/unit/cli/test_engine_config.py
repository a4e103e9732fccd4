"""Edits of the engines' configuration: idempotent, keeping, reversible."""

from __future__ import annotations

import json
import tomllib

import pytest

from clipshim.cli import engine_config as edit
from clipshim.errors import ConfigError

RUNTIME = "/usr/local/bin/clipshim"
DOCKER = """{
  "data-root": "/srv/docker",
  "runtimes": {
    "nvidia": {"path": "nvidia-container-runtime", "runtimeArgs": []}
  },
  "log-driver": "journald"
}
"""
CONTAINERD_V2 = """# our cluster's configuration
version = 2
root = "/srv/containerd"  # on the big disk

[plugins]
  # CRI
  [plugins."io.containerd.grpc.v1.cri"]
    sandbox_image = "registry.example.com/pause:3.9"
    [plugins."io.containerd.grpc.v1.cri".containerd]
      default_runtime_name = "runc"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes]
        [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
          runtime_type = "io.containerd.runc.v2"
          [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
            SystemdCgroup = true # as the kubelet
"""
CONTAINERD_V3 = """version = 3

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
# the end
"""
# as `containerd config default` of 2.4 writes it, with a drop-in directory and literal strings
CONTAINERD_V4 = """version = 4
root = '/var/lib/containerd'
disabled_plugins = []
imports = ['/etc/containerd/conf.d/*.toml']

[debug]
  level = ''

[plugins]
  [plugins.'io.containerd.cri.v1.images']
    snapshotter = 'overlayfs'

    [plugins.'io.containerd.cri.v1.images'.pinned_images]
      sandbox = 'registry.example.com/pause:3.10.2'

  [plugins.'io.containerd.cri.v1.runtime']
    cdi_spec_dirs = ['/etc/cdi', '/var/run/cdi']

    [plugins.'io.containerd.cri.v1.runtime'.containerd]
      default_runtime_name = 'runc'

      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes]
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
          runtime_type = 'io.containerd.runc.v2'
          pod_annotations = []
          sandboxer = 'podsandbox'

          [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
            BinaryName = ''
            SystemdCgroup = true

    [plugins.'io.containerd.cri.v1.runtime'.cni]
      bin_dirs = ['/opt/cni/bin']

  [plugins.'io.containerd.grpc.v1.cri']
    stream_server_port = '0'

  [plugins.'io.containerd.server.v1.grpc']
    address = '/run/containerd/containerd.sock'
"""
PODMAN = """# site policy
[containers]
log_driver = "k8s-file" # small

[engine]
events_logger = "file"
runtime_supports_json = ["crun", "runc"]

[engine.runtimes]
runc = ["/usr/sbin/runc"]
"""
CRI_V2 = "io.containerd.grpc.v1.cri"
CRI_V3 = "io.containerd.cri.v1.runtime"


@pytest.mark.parametrize("before", ["", "{}\n", DOCKER])
def test_docker_gets_a_runtime_and_loses_it(before: str) -> None:
    after = edit.add_docker(before, RUNTIME)
    document = json.loads(after)
    assert document["runtimes"]["clipshim"] == {"path": RUNTIME}
    assert edit.add_docker(after, RUNTIME) == after
    for key, value in json.loads(before or "{}").items():
        if key != "runtimes":
            assert document[key] == value
    removed = edit.remove_docker(after)
    assert json.loads(removed or "{}") == json.loads(before or "{}")


def test_docker_keeps_order_and_indentation() -> None:
    after = edit.add_docker(DOCKER, RUNTIME)
    assert list(json.loads(after)) == ["data-root", "runtimes", "log-driver"]
    assert '\n  "data-root"' in after
    assert list(json.loads(after)["runtimes"]) == ["nvidia", "clipshim"]


def test_docker_follows_a_moved_runtime_and_keeps_its_arguments() -> None:
    before = '{"runtimes": {"clipshim": {"path": "/old", "runtimeArgs": ["--debug"]}}}'
    entry = json.loads(edit.add_docker(before, RUNTIME))["runtimes"]["clipshim"]
    assert entry == {"path": RUNTIME, "runtimeArgs": ["--debug"]}


@pytest.mark.parametrize("text", ["{", "[]", '{"runtimes": 3}'])
def test_a_daemon_json_that_dockerd_cannot_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"daemon\.json"):
        edit.add_docker(text, RUNTIME)


@pytest.mark.parametrize(
    ("before", "cri"),
    [
        ("", CRI_V2),
        ("# the administrator's note\n", CRI_V2),
        ("version = 2\n", CRI_V2),
        (CONTAINERD_V2, CRI_V2),
        (CONTAINERD_V3, CRI_V3),
        ("version = 4\n", CRI_V3),
        (CONTAINERD_V4, CRI_V3),
    ],
)
def test_containerd_gets_a_runtime_and_loses_it(before: str, cri: str) -> None:
    after = edit.add_containerd(before, RUNTIME)
    runtime = tomllib.loads(after)["plugins"][cri]["containerd"]["runtimes"]["clipshim"]
    assert runtime["runtime_type"] == "io.containerd.runc.v2"
    assert runtime["options"]["BinaryName"] == RUNTIME
    assert runtime["pod_annotations"] == ["io.clipshim.*"]
    assert edit.add_containerd(after, RUNTIME) == after
    removed = edit.remove_containerd(after)
    assert "clipshim" not in removed
    if before in (CONTAINERD_V2, CONTAINERD_V3, CONTAINERD_V4):
        assert tomllib.loads(removed) == tomllib.loads(before)


def test_containerd_keeps_its_default_runtime() -> None:
    def runtimes(text: str) -> set[str]:
        document = tomllib.loads(edit.add_containerd(text, RUNTIME))
        return set(document["plugins"][CRI_V2]["containerd"]["runtimes"])

    assert runtimes("version = 2\n") == {"runc", "clipshim"}
    other = f'version = 2\n[plugins."{CRI_V2}".containerd]\ndefault_runtime_name = "kata"\n'
    assert runtimes(other) == {"clipshim"}


def test_containerd_takes_the_cgroup_driver_from_runc() -> None:
    for before, cri in ((CONTAINERD_V2, CRI_V2), (CONTAINERD_V4, CRI_V3)):
        plugins = tomllib.loads(edit.add_containerd(before, RUNTIME))["plugins"]
        runtimes = plugins[cri]["containerd"]["runtimes"]
        assert runtimes["clipshim"]["options"]["SystemdCgroup"] is True
        was = tomllib.loads(before)["plugins"][cri]["containerd"]["runtimes"]
        assert runtimes["runc"] == was["runc"]


@pytest.mark.parametrize("before", [CONTAINERD_V2, CONTAINERD_V3, CONTAINERD_V4])
def test_containerd_keeps_every_line(before: str) -> None:
    after = edit.add_containerd(before, RUNTIME).splitlines()
    missing = [line for line in before.splitlines() if line.strip() and line not in after]
    assert missing == []


def test_an_old_containerd_configuration_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match="version 1") as caught:
        edit.add_containerd('disabled_plugins = ["cri"]\n', RUNTIME)
    assert caught.value.hint is not None
    assert "migrate" in caught.value.hint


def test_a_containerd_configuration_of_the_future_is_refused_without_bad_advice() -> None:
    with pytest.raises(ConfigError, match="version 9: expected 2, 3 or 4") as caught:
        edit.add_containerd("version = 9\n", RUNTIME)
    assert caught.value.hint is not None
    assert "migrate" not in caught.value.hint


@pytest.mark.parametrize("before", ["", PODMAN, "# nothing but a comment\n"])
def test_podman_gets_a_runtime_and_loses_it(before: str) -> None:
    after = edit.add_podman(before, RUNTIME)
    engine = tomllib.loads(after)["engine"]
    assert engine["runtimes"]["clipshim"] == [RUNTIME]
    assert "clipshim" in engine["runtime_supports_json"]
    assert "runc" in engine["runtime_supports_json"]
    assert edit.add_podman(after, RUNTIME) == after
    assert tomllib.loads(edit.remove_podman(after)) == tomllib.loads(before)


def test_podman_keeps_comments() -> None:
    after = edit.add_podman(PODMAN, RUNTIME)
    assert "# site policy" in after
    assert '"k8s-file" # small' in after


def test_crio_gets_a_drop_in_of_our_own() -> None:
    after = edit.add_crio("", RUNTIME)
    runtime = tomllib.loads(after)["crio"]["runtime"]["runtimes"]["clipshim"]
    assert runtime["runtime_path"] == RUNTIME
    assert edit.remove_crio(after) == ""


@pytest.mark.parametrize("add", [edit.add_containerd, edit.add_podman])
def test_broken_toml_is_refused(add: object) -> None:
    assert callable(add)
    with pytest.raises(ConfigError):
        add("[plugins\n", RUNTIME)

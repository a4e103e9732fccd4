"""The configuration that people copy from integration/ says what `clipshim install` writes."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from clipshim.cli import engine_config as edit

SAMPLES = Path(__file__).resolve().parents[3] / "integration"
RUNTIME = "/usr/local/bin/clipshim"


def text(name: str) -> str:
    return (SAMPLES / name).read_text(encoding="utf-8")


def yaml_documents(name: str) -> list[dict[str, Any]]:
    """The documents of a YAML file, read by Debian's python3-yaml."""
    code = "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(sys.stdin))))"
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-c", code], input=text(name), capture_output=True,
        text=True, check=True, timeout=60,
    )  # fmt: skip
    documents: list[dict[str, Any]] = json.loads(done.stdout)
    return documents


def test_the_docker_sample_is_what_install_writes() -> None:
    assert json.loads(text("docker/daemon.json")) == json.loads(edit.add_docker("", RUNTIME))


@pytest.mark.parametrize("version", [2, 3, 4])
def test_the_containerd_samples_are_what_install_writes(version: int) -> None:
    sample = tomllib.loads(text(f"containerd/config-v{min(version, 3)}.toml"))
    written = tomllib.loads(edit.add_containerd(f"version = {version}\n", RUNTIME))
    sample["version"] = version  # 4 names the runtimes as 3 does
    cri = edit.CONTAINERD_CRI[version]
    runtime = sample["plugins"][cri]["containerd"]["runtimes"]["clipshim"]
    assert runtime["options"].pop("SystemdCgroup") is True
    assert sample == written


def test_the_podman_sample_is_what_install_writes() -> None:
    written = tomllib.loads(edit.add_podman("", RUNTIME))
    assert tomllib.loads(text("podman/containers.conf")) == written


def test_the_crio_sample_is_what_install_writes() -> None:
    written = tomllib.loads(edit.add_crio("", RUNTIME))
    assert tomllib.loads(text("crio/50-clipshim.conf")) == written


def test_the_compose_file_names_the_runtime() -> None:
    (compose,) = yaml_documents("docker/compose.yaml")
    assert compose["services"]["app"]["runtime"] == "clipshim"


def test_the_kubernetes_files_fit_together() -> None:
    (runtime_class,) = yaml_documents("kubernetes/runtimeclass.yaml")
    assert runtime_class["handler"] == edit.NAME
    pods = yaml_documents("kubernetes/pod.yaml")
    assert {pod["spec"]["runtimeClassName"] for pod in pods} == {runtime_class["metadata"]["name"]}
    annotations = [pod["metadata"].get("annotations", {}) for pod in pods]
    assert any("io.clipshim.image" in found for found in annotations)
    kinds = [document["kind"] for document in yaml_documents("kubernetes/daemonset.yaml")]
    assert kinds == ["DaemonSet", "ServiceAccount", "ClusterRole", "ClusterRoleBinding"]
    label = runtime_class["scheduling"]["nodeSelector"]
    assert f'"{next(iter(label))}":"true"' in text("kubernetes/install-on-node.sh")


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text("systemd/clipshim.service"))
    return parser


def test_the_unit_keeps_mounts_visible_to_engines() -> None:
    service = unit()["Service"]
    assert service["Type"] == "notify"
    assert service["KillMode"] == "mixed"
    assert int(service["FileDescriptorStoreMax"]) > 0
    # systemd.exec(5): each of these gives the service a mount name space of its own
    hiding = {
        "PrivateMounts", "PrivateTmp", "PrivateDevices", "ProtectSystem", "ProtectHome",
        "ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths", "TemporaryFileSystem",
        "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs",
        "ProtectControlGroups", "ProtectProc", "ProcSubset", "RootDirectory", "RootImage",
        "BindPaths", "BindReadOnlyPaths", "MountFlags", "ProtectHostname",
    }  # fmt: skip
    assert set(service) & hiding == set()


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        return  # the parser above has read it; a machine without systemd has no other
    copy = tmp_path / "clipshim.service"
    copy.write_text(text("systemd/clipshim.service").replace(RUNTIME, "/bin/true"))
    done = subprocess.run(
        [program, "verify", "--man=no", copy], capture_output=True, text=True, timeout=120,
        check=False, env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if "clipshim.service" in line]
    assert complaints == []


@pytest.mark.parametrize("script", ["quickstart.sh", "kubernetes/install-on-node.sh"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    path = SAMPLES / script
    assert os.access(path, os.X_OK)
    shell = "bash" if path.read_text().startswith("#!/usr/bin/env bash") else "sh"
    subprocess.run([shell, "-n", path], check=True, timeout=60)


@pytest.mark.parametrize("engine", ["docker", "containerd", "podman", "crio"])
def test_every_engine_has_a_page(engine: str) -> None:
    assert f"clipshim install {engine}" in text(f"{engine}/README.md")

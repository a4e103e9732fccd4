"""From an image's configuration to a bundle's config.json."""

from __future__ import annotations

import json
from typing import Any

import pytest

from clipshim.cli.bundle_spec import User, command_of, resolve_user, runtime_spec, volumes_of
from clipshim.errors import BundleError, NotFoundError

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
# comment
app:x:1000:1001:App:/home/app:/bin/sh
short:x:7:8
"""
GROUP = b"""root:x:0:
app:x:1001:
audio:x:29:app,other
video:x:44:other,app
staff:x:50:
"""


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", User(0, 0, [0])),
        ("root", User(0, 0, [0])),
        ("app", User(1000, 1001, [1001, 29, 44])),
        ("1000", User(1000, 1001, [1001, 29, 44])),
        ("app:staff", User(1000, 50, [50])),
        ("app:50", User(1000, 50, [50])),
        ("app:12345", User(1000, 12345, [12345])),
        ("4242", User(4242, 0, [0])),
        ("4242:4343", User(4242, 4343, [4343])),
        (":staff", User(0, 50, [50])),
        ("short", User(7, 8, [8])),
        ("4294967295", User(4294967295, 0, [0])),
    ],
)
def test_a_user_is_resolved_as_docker_does(user: str, expected: User) -> None:
    assert resolve_user(user, PASSWD, GROUP) == expected


@pytest.mark.parametrize("user", ["nobody-here", "app:no-such-group", "4294967296", "-1", "٣"])
def test_an_unknown_name_is_an_error_that_says_what_to_do(user: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        resolve_user(user, PASSWD, GROUP)
    assert "by number" in (caught.value.hint or "")


def test_numbers_need_no_files() -> None:
    assert resolve_user("1:2", None, None) == User(1, 2, [2])


def test_arguments_replace_cmd_and_keep_the_entrypoint() -> None:
    config = {"Entrypoint": ["/entry"], "Cmd": ["serve"]}
    assert command_of(config, []) == ["/entry", "serve"]
    assert command_of(config, ["migrate"]) == ["/entry", "migrate"]
    assert command_of(config, ["-c"], ["sh"]) == ["sh", "-c"]
    assert command_of({"Cmd": ["serve"]}, ["sh"], []) == ["sh"]


def test_an_image_without_a_program_asks_for_one() -> None:
    with pytest.raises(BundleError, match="neither Entrypoint nor Cmd") as caught:
        command_of({}, [])
    assert "-- PROGRAM" in (caught.value.hint or "")


def spec(config: dict[str, Any], **options: Any) -> dict[str, Any]:
    options.setdefault("user", User(0, 0, [0]))
    image = {"os": "linux", "architecture": "amd64", "config": {"Cmd": ["sh"], **config}}
    made = runtime_spec(image, index_name="index.clip", **options)
    json.dumps(made)
    return made


def test_the_index_is_named_by_annotation() -> None:
    assert spec({})["annotations"]["io.clipshim.index"] == "index.clip"


def test_environment_and_directory_come_from_the_image() -> None:
    made = spec({"Env": ["A=1"], "WorkingDir": "/srv"})
    assert made["process"]["cwd"] == "/srv"
    assert made["process"]["env"][-1] == "A=1"
    assert made["process"]["env"][0].startswith("PATH=")
    assert spec({"Env": ["PATH=/bin"]})["process"]["env"] == ["PATH=/bin"]
    assert spec({"WorkingDir": "srv"})["process"]["cwd"] == "/srv"


def test_labels_cannot_steer_a_runtime() -> None:
    labels = {
        "io.clipshim.index": "/etc/shadow",
        "run.oci.hooks.stderr": "/etc/passwd",
        "org.systemd.property.CollectMode": "'x'",
        "org.opencontainers.image.title": "fine",
    }
    annotations = spec({"Labels": labels, "StopSignal": "SIGUSR1"})["annotations"]
    assert annotations["io.clipshim.index"] == "index.clip"
    assert annotations["org.opencontainers.image.title"] == "fine"
    assert annotations["org.opencontainers.image.stopSignal"] == "SIGUSR1"
    assert not [key for key in annotations if key.startswith(("run.oci", "org.systemd"))]


def test_volumes_that_the_image_lacks_are_mounted() -> None:
    image: dict[str, Any] = {"config": {"Volumes": {"/data": {}, "/a/../../b": {}, "relative": {}}}}
    assert volumes_of(image) == ["/data"]
    mounts = spec({}, missing_volumes=["/data"])["mounts"]
    assert mounts[-1]["destination"] == "/data"
    assert mounts[-1]["type"] == "tmpfs"


def test_only_root_holds_capabilities() -> None:
    process = spec({}, user=User(1000, 1000, [1000]))["process"]
    assert process["capabilities"]["effective"] == []
    assert "CAP_CHOWN" in process["capabilities"]["bounding"]
    assert "CAP_SYS_ADMIN" not in spec({})["process"]["capabilities"]["bounding"]


def test_the_network_is_private_unless_asked_for() -> None:
    def kinds(made: dict[str, Any]) -> set[str]:
        return {item["type"] for item in made["linux"]["namespaces"]}

    assert "network" in kinds(spec({}))
    shared = spec({}, host_network=True)
    assert "network" not in kinds(shared)
    assert "/etc/resolv.conf" in {mount["destination"] for mount in shared["mounts"]}
    assert "cgroup" in kinds(spec({}, cgroup_namespace=True))


@pytest.mark.parametrize("config", [{"Env": "A=1"}, {"Cmd": [1]}, {"WorkingDir": 3}])
def test_a_configuration_of_the_wrong_shape_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(BundleError):
        spec(config)

"""podman with private storage, locks and configuration; it has no daemon."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.engine import ULIMITS, Client, cgroup_parent, destroy, engine_env
from tests.support.node import wait_for
from tests.support.programs import program

if TYPE_CHECKING:
    from tests.support.engine import Target

PODMAN = program("/usr/bin/podman")


class Podman(Client):
    """A podman of its own; calling it runs a podman command."""

    def __init__(self, directory: Path, target: Target) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.target = target
        (directory / "containers.conf").write_text(
            "[containers]\n"
            'netns = "none"\n'
            'log_driver = "k8s-file"\n'
            "[network]\n"
            f'network_config_dir = "{directory}/networks"\n'
            "[engine]\n"
            'lock_type = "file"\n'  # the shared-memory locks are one for the machine
            'cgroup_manager = "cgroupfs"\n'
            'events_logger = "file"\n'
            f'tmp_dir = "{directory}/tmp"\n'
            f'volume_path = "{directory}/volumes"\n'
            f'runtime = "{target.name}"\n'
            f'runtime_supports_json = ["{target.name}"]\n'
            "[engine.runtimes]\n"
            f'{target.name} = ["{target.runtime}"]\n'
        )
        (directory / "storage.conf").write_text(
            "[storage]\n"
            'driver = "overlay"\n'
            f'graphroot = "{directory}/root"\n'
            # podman refuses a run root of more than 50 characters
            f'runroot = "{directory}/rr"\n'
        )
        (directory / "registries.conf").write_text("unqualified-search-registries = []\n")
        (directory / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        env = engine_env(
            directory,
            CONTAINERS_CONF=f"{directory}/containers.conf",
            CONTAINERS_STORAGE_CONF=f"{directory}/storage.conf",
            CONTAINERS_REGISTRIES_CONF=f"{directory}/registries.conf",
            BUILDAH_ISOLATION="oci",
            PODMAN_IGNORE_CGROUPSV1_WARNING="1",  # podman 5 would put it before what programs say
        )
        super().__init__([PODMAN], env)

    def start_container(self, *arguments: str, **options: Any) -> str:
        """`podman run` with what every container here needs; stdout."""
        return self("run", *self.common(), *arguments, **options)

    def common(self) -> list[str]:
        """Options of `run` and `create`: limits this machine allows, a cgroup of this run."""
        return [*ULIMITS, f"--cgroup-parent={cgroup_parent()}"]

    def remove(self, name: str) -> None:
        """Removes a container. With user namespaces podman 4.3 needs two tries now and then.

        Its own clean-up of the shm mount is not over then, under runc as under clipshim.
        """
        words = ("rm", "--force", "--ignore", "--time=0", name)
        wait_for(f"{name} is removed", lambda: self.run(*words, check=False).returncode == 0, 120)

    def close(self) -> None:
        """Removes all containers and everything below the directory."""
        self.run("rm", "--all", "--force", "--time=0", check=False)
        self.run("umount", "--all", "--force", check=False)
        destroy(self.directory)
        for conmon in Path("/sys/fs/cgroup").glob(f"*{cgroup_parent()}/conmon"):
            conmon.rmdir()  # podman leaves it behind

"""dockerd with private roots and socket, no bridge, no iptables, and a containerd of its own.

The containerd is started apart, as Debian does it, so that it outlives a crash of dockerd. Images
lie in Docker's own store, or in containerd's if $CLIPSHIM_TEST_DOCKER_STORE is `containerd`, which
Docker 23 and newer can do and Docker 29 does by default.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from tests.support.containerd_engine import Containerd
from tests.support.engine import Client, Daemon, cgroup_parent, destroy, engine_env
from tests.support.programs import program

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.engine import Target

DOCKERD = program("/usr/sbin/dockerd")
DOCKER = program("/usr/bin/docker")
CONTAINERD_STORE = os.environ.get("CLIPSHIM_TEST_DOCKER_STORE") == "containerd"


class Docker(Client):
    """A running dockerd; calling it calls the docker client."""

    def __init__(self, directory: Path, target: Target) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.target = target
        self.socket = f"unix://{directory}/docker.sock"
        env = engine_env(directory, DOCKER_HOST=self.socket)
        super().__init__([DOCKER], env)
        self.containerd = Containerd(directory / "ctrd", target)
        self.daemon = Daemon(directory, env)
        self.start()

    def start(self) -> None:
        """Starts dockerd and waits for it."""
        config = self.directory / "daemon.json"
        features = {"features": {"containerd-snapshotter": True}} if CONTAINERD_STORE else {}
        config.write_text(json.dumps(features))
        (self.directory / "docker.pid").unlink(missing_ok=True)
        runtime = []
        if self.target.lazy:
            runtime = [
                f"--add-runtime={self.target.name}={self.target.runtime}",
                f"--default-runtime={self.target.name}",
            ]
        command: list[str | Path] = [
            DOCKERD,
            f"--config-file={config}",
            f"--data-root={self.directory}/data",
            f"--exec-root={self.directory}/exec",
            f"--pidfile={self.directory}/docker.pid",
            f"--host={self.socket}",
            f"--containerd={self.containerd.socket}",
            f"--cgroup-parent={cgroup_parent()}",
            "--bridge=none",
            "--iptables=false",
            "--ip6tables=false",
            "--ip-masq=false",
            "--ip-forward=false",
            f"--storage-driver={'overlayfs' if CONTAINERD_STORE else 'overlay2'}",
            "--default-ulimit=nofile=1024:1024",
            "--default-ulimit=nproc=4096:4096",
            "--live-restore",
            *runtime,
        ]
        self.daemon.start(command, self, "version")

    @property
    def forgets_deletions(self) -> bool:
        """Whether commits and builds lack what was deleted from a stub's tree.

        containerd's store compares what it can mount itself: the stub, which never had the files.
        """
        return self.target.lazy and CONTAINERD_STORE

    def close(self) -> None:
        """Removes all containers, ends the daemon, deletes its directory."""
        if self.daemon.process is not None:
            names = self.run("ps", "-aq", check=False).stdout.split()
            if names:
                self.run("rm", "-f", *names, check=False)
        self.daemon.stop()
        self.containerd.close()
        destroy(self.directory)

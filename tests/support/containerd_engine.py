"""containerd with private root, state and socket, its CRI plugin on, and no CNI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.engine import Client, Daemon, engine_env
from tests.support.programs import program

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.engine import Target

CONTAINERD = program("/usr/bin/containerd")
CTR = program("/usr/bin/ctr")
PAUSE = "localhost/pause:1"


class Containerd(Client):
    """A running containerd; calling it calls ctr."""

    def __init__(self, directory: Path, target: Target) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.target = target
        self.socket = directory / "c.sock"
        env = engine_env(directory)
        super().__init__([CTR, "--address", self.socket, "--namespace", "k8s.io"], env)
        self.daemon = Daemon(directory, env)
        self.start()

    def start(self) -> None:
        """Starts containerd and waits for it."""
        cri = 'plugins."io.containerd.grpc.v1.cri"'
        config = self.directory / "config.toml"
        config.write_text(
            "version = 2\n"
            f'root = "{self.directory}/root"\n'
            f'state = "{self.directory}/state"\n'
            f'temp = "{self.directory}/temp"\n'
            'disabled_plugins = ["io.containerd.internal.v1.tracing",'
            ' "io.containerd.tracing.processor.v1.otlp", "io.containerd.snapshotter.v1.btrfs",'
            ' "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper",'
            ' "io.containerd.snapshotter.v1.aufs"]\n'
            f'[grpc]\naddress = "{self.socket}"\n'
            f'[ttrpc]\naddress = "{self.socket}.ttrpc"\n'
            f'[plugins."io.containerd.internal.v1.opt"]\npath = "{self.directory}/opt"\n'
            f"[{cri}]\n"
            f'sandbox_image = "{PAUSE}"\n'
            'stream_server_address = "127.0.0.1"\nstream_server_port = "0"\n'
            "disable_hugetlb_controller = true\n"
            "restrict_oom_score_adj = true\n"
            f"[{cri}.cni]\n"
            f'bin_dir = "{self.directory}/cni"\nconf_dir = "{self.directory}/cni-conf"\n'
            f"[{cri}.containerd]\n"
            f'default_runtime_name = "{self.target.name}"\n'
            f"[{cri}.containerd.runtimes.{self.target.name}]\n"
            'runtime_type = "io.containerd.runc.v2"\n'
            'container_annotations = ["io.clipshim.*"]\npod_annotations = ["io.clipshim.*"]\n'
            f"[{cri}.containerd.runtimes.{self.target.name}.options]\n"
            f'BinaryName = "{self.target.runtime}"\n'
            f'Root = "{self.directory}/runtime"\n'
        )
        self.daemon.start([CONTAINERD, "--config", config], self, "version")

    def close(self) -> None:
        """Ends all tasks, then the daemon, and deletes its directory."""
        if self.daemon.process is not None:
            for name in self.run("tasks", "ls", "-q", check=False).stdout.split():
                self.run("tasks", "delete", "--force", name, check=False)
            for name in self.run("containers", "ls", "-q", check=False).stdout.split():
                self.run("containers", "delete", name, check=False)
        self.daemon.close()

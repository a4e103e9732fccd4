"""The real docker-registry on a free loopback port, for tests.

    with running_registry(directory) as registry:
        registry.push_layout(layout, "app:1")
        registry.reference("app:1")     # 127.0.0.1:PORT/app:1

Each has a directory of its own; nothing is left behind but that directory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

READY_TIMEOUT_S = 120.0
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
START_ATTEMPTS = 5  # the free port may be taken by another program before the registry binds it


@dataclass(frozen=True)
class TestRegistry:
    """A running registry; `username` and `password` are set if it wants them."""

    __test__ = False  # not a test class, whatever its name

    host: str  # 127.0.0.1:PORT
    directory: Path
    username: str | None = None
    password: str | None = None

    @property
    def url(self) -> str:
        """http://HOST."""
        return f"http://{self.host}"

    def reference(self, name: str) -> str:
        """The full name of an image in it."""
        return f"{self.host}/{name}"

    def push_layout(self, layout: Path | str, name: str, *, tag: str | None = None) -> str:
        """Pushes oci:LAYOUT[:TAG] as `name` with skopeo, all platforms; returns the full name."""
        source = f"oci:{layout}" + (f":{tag}" if tag else "")
        return self.push(source, name)

    def push(self, source: str, name: str) -> str:
        """Pushes any source that skopeo understands (oci:, docker-archive:, dir:)."""
        target = self.reference(name)
        command = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]
        if source.startswith("oci:"):
            command += ["--all", "--preserve-digests"]
        if self.username is not None:
            command += ["--dest-creds", f"{self.username}:{self.password}"]
        run_tool([*command, source, f"docker://{target}"])
        return target


@contextlib.contextmanager
def running_registry(
    directory: Path | str,
    *,
    username: str | None = None,
    password: str | None = None,
) -> Iterator[TestRegistry]:
    """A registry that keeps its blobs below `directory`; htpasswd log-in if `username` is given."""
    base = Path(directory)
    base.mkdir(parents=True, exist_ok=True)
    auth = ""
    if username is not None:
        assert password is not None
        (base / "htpasswd").write_text(f"{username}:{_bcrypt(password)}\n")
        auth = f"auth:\n  htpasswd:\n    realm: test\n    path: {base / 'htpasswd'}\n"
    for attempt in range(START_ATTEMPTS):
        port = free_port()
        config = base / "registry.yml"
        config.write_text(
            "version: 0.1\n"
            "log:\n  level: error\n  accesslog:\n    disabled: true\n"
            f"storage:\n  filesystem:\n    rootdirectory: {base / 'data'}\n"
            "  delete:\n    enabled: true\n"
            f"http:\n  addr: 127.0.0.1:{port}\n"
            f"{auth}"
        )
        environment = {"PATH": os.environ.get("PATH", ""), "OTEL_TRACES_EXPORTER": "none"}
        with open(base / "registry.log", "ab") as log:
            process = subprocess.Popen(
                [registry_program(), "serve", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
        try:
            if not _wait_ready(process, port):
                assert attempt + 1 < START_ATTEMPTS, (base / "registry.log").read_text()[-2000:]
                continue
            yield TestRegistry(f"127.0.0.1:{port}", base, username, password)
            return
        finally:
            process.kill()
            process.wait()


def registry_program() -> str:
    """Debian's docker-registry, or the plain distribution binary."""
    search = os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin:/usr/local/bin"
    for name in ("docker-registry", "registry"):
        found = shutil.which(name, path=search)
        if found:
            return found
    raise FileNotFoundError("docker-registry: apt-get install docker-registry")


def free_port() -> int:
    """A loopback TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_tool(command: list[str]) -> str:
    """Runs a program and returns its output; its stderr is in the failure."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def _wait_ready(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        try:
            with NO_PROXY.open(f"http://127.0.0.1:{port}/v2/", timeout=10):
                return True
        except urllib.error.HTTPError as answer:
            with answer:
                return answer.code == 401
        except OSError:
            time.sleep(0.02)
    return False


def _bcrypt(password: str) -> str:
    """Python has no bcrypt from 3.13 on; htpasswd and openssl may be missing: libcrypt has it."""
    import ctypes
    import ctypes.util

    library = ctypes.CDLL(ctypes.util.find_library("crypt") or "libcrypt.so.1")
    library.crypt.restype = ctypes.c_char_p
    library.crypt.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    hashed = library.crypt(password.encode(), b"$2b$04$abcdefghijklmnopqrstuu")
    assert hashed is not None, "libcrypt knows no bcrypt"
    assert isinstance(hashed, bytes)
    assert hashed.startswith(b"$2b$"), hashed
    return hashed.decode()

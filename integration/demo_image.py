"""Makes the quickstart's image: a Debian root with Python as an OCI layout of several layers.

    demo_image.py ROOT LAYOUT [TAG]

GNU tar writes the layers in a fixed order, so the same root gives the same bytes. Times stay as
they are: Python throws away compiled modules whose source has another time, and would read and
compile everything anew. Not for anything but the demonstration: standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

EPOCH = 1_700_000_000
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64", "ppc64le": "ppc64le"}
MEDIA = "application/vnd.oci.image"
SHARE, PYTHON = ("usr/share",), ("usr/lib/python3", "usr/lib/python3.*")
NEVER = ("proc/*", "sys/*", "dev/*", "run/*", "tmp/*", "var/cache/apt/*", "var/lib/apt/lists/*")
PROGRAM = '''"""What the container runs: shows that it is a whole system."""
import asyncio, http.client, json, os, platform, sys


async def main():
    facts = {
        "python": platform.python_version(),
        "system": open("/etc/os-release").readline().split("=")[1].strip().strip('"'),
        "pid": os.getpid(),
    }
    with open("/srv/written-by-the-container", "w") as file:
        json.dump(facts, file)
    print(json.dumps(facts))


asyncio.run(main())
'''


def main() -> None:
    """Writes LAYOUT whole or not at all."""
    root, layout = Path(sys.argv[1]), Path(sys.argv[2])
    tag = sys.argv[3] if len(sys.argv) > 3 else "latest"
    draft = layout.with_name(f".{layout.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "blobs" / "sha256").mkdir(parents=True)
    layers, diff_ids = [], []

    def add(directory: Path, *arguments: str) -> None:
        digest, size, diff_id = tar_layer(draft, directory, arguments)
        layers.append(descriptor(f"{MEDIA}.layer.v1.tar+gzip", digest, size))
        diff_ids.append(diff_id)

    add(root, *(f"--exclude=./{name}" for name in (*NEVER, *SHARE, *PYTHON)), ".")
    add(root, *(f"./{name}" for name in SHARE))
    found = sorted(path.relative_to(root) for name in PYTHON for path in root.glob(name))
    add(root, *(f"./{name}" for name in found))
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        Path(top, "srv").mkdir()
        Path(top, "srv", "hello.py").write_text(PROGRAM)
        for path in (Path(top, "srv", "hello.py"), Path(top, "srv"), Path(top)):
            os.utime(path, (EPOCH, EPOCH))
        add(Path(top), ".")

    config = {
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": ["python3", "/srv/hello.py"],
            "WorkingDir": "/srv",
        },
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{MEDIA}.manifest.v1+json",
        "config": descriptor(f"{MEDIA}.config.v1+json", *blob(draft, config)),
        "layers": layers,
    }
    entry = descriptor(f"{MEDIA}.manifest.v1+json", *blob(draft, manifest))
    entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
    write(draft / "index.json", {"schemaVersion": 2, "manifests": [entry]})
    write(draft / "oci-layout", {"imageLayoutVersion": "1.0.0"})
    shutil.rmtree(layout, ignore_errors=True)
    draft.rename(layout)


def tar_layer(draft: Path, directory: Path, arguments: tuple[str, ...]) -> tuple[str, int, str]:
    """Digest and size of the compressed layer, and its diff ID."""
    command = [
        "tar", "--create", "--directory", str(directory), "--sort=name", "--numeric-owner",
        "--format=posix",
        "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
        "--xattrs", "--xattrs-include=*", *arguments,
    ]  # fmt: skip
    path = draft / "layer"
    plain = hashlib.sha256()
    with open(path, "wb") as file:
        tar = subprocess.Popen(command, stdout=subprocess.PIPE)
        gzip = subprocess.Popen(["gzip", "-n", "-6"], stdin=subprocess.PIPE, stdout=file)
        assert tar.stdout is not None
        assert gzip.stdin is not None
        while piece := tar.stdout.read(1 << 20):
            plain.update(piece)
            gzip.stdin.write(piece)
        gzip.stdin.close()
        if tar.wait() or gzip.wait():
            raise SystemExit(f"tar or gzip failed on {directory}")
    with open(path, "rb") as file:
        packed = hashlib.file_digest(file, "sha256")
    size = path.stat().st_size
    path.rename(draft / "blobs" / "sha256" / packed.hexdigest())
    return f"sha256:{packed.hexdigest()}", size, f"sha256:{plain.hexdigest()}"


def blob(draft: Path, document: object) -> tuple[str, int]:
    """Stores JSON as a blob; its digest and size."""
    raw = json.dumps(document, sort_keys=True).encode()
    digest = hashlib.sha256(raw).hexdigest()
    (draft / "blobs" / "sha256" / digest).write_bytes(raw)
    return f"sha256:{digest}", len(raw)


def descriptor(media_type: str, digest: str, size: int) -> dict[str, object]:
    """An OCI descriptor."""
    return {"mediaType": media_type, "digest": digest, "size": size}


def write(path: Path, document: object) -> None:
    """One JSON file."""
    path.write_text(json.dumps(document, sort_keys=True))


if __name__ == "__main__":
    main()

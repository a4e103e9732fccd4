"""Real images for the system tests: a Debian with python3 in four layers, and a tiny one.

The Debian root comes from debootstrap and is kept in /var/cache/clipshim-tests/<recipe> (made
again if it is not there). The layers are written by GNU tar in a fixed order with clamped times,
so a recipe gives the same bytes on every run. The upper layers hold what upper layers hold in the
wild: whiteouts, an opaque directory, a file replaced, hard links, a file capability, odd names.
Not for layers that are wrong on purpose: those tests build their own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.support.leftovers import mounts_below, unmount_below

if TYPE_CHECKING:
    from collections.abc import Iterator

CACHE = Path("/var/cache/clipshim-tests")
SUITE = "bookworm"
PACKAGES = "python3,libcap2-bin,busybox-static,netbase"
# What people install who build and run things in one image.
LARGE_PACKAGES = (
    f"{PACKAGES},build-essential,ca-certificates,cmake,curl,default-libmysqlclient-dev,file,git"
    ",imagemagick,libcurl4-openssl-dev,libffi-dev,libpq-dev,libssl-dev,libxml2-dev,libxslt1-dev"
    ",openssh-client,perl,pkg-config,procps,python3-dev,python3-pip,python3-venv,rsync,sqlite3"
    ",subversion,unzip,vim,wget,zlib1g-dev"
)
# Times later than this are set to it. Packages are older: times of Python sources must stay, or
# the compiled modules beside them are stale and every start writes them again.
EPOCH = 1_780_000_000
CHUNK = 1 << 20
RECIPE = "6"  # raise it when anything below changes what is built
TAG = "test"
VARIANTS = ("gzip", "zstd", "plain")
MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar"
SUFFIX = {"gzip": "+gzip", "zstd": "+zstd", "plain": ""}

PYTHON_LINE = "import json, asyncio, http.client; print('lazy', json.dumps([1]))"


class Image(NamedTuple):
    """An OCI layout on disk; `reference` is how skopeo and clipshim name it."""

    layout: Path
    variant: str

    @property
    def reference(self) -> str:
        """`oci:DIR:TAG`."""
        return f"oci:{self.layout}:{TAG}"

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest, parsed."""
        index = json.loads((self.layout / "index.json").read_bytes())
        document: dict[str, Any] = json.loads(self.blob(index["manifests"][0]["digest"]))
        return document

    @property
    def compressed_size(self) -> int:
        """Bytes of all layers as stored."""
        return sum(int(layer["size"]) for layer in self.manifest["layers"])

    def blob_path(self, digest: str) -> Path:
        """Where a blob lies."""
        return self.layout / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def blob(self, digest: str) -> bytes:
        """A blob's bytes."""
        return self.blob_path(digest).read_bytes()


def run(*command: str | os.PathLike[str], **options: Any) -> str:
    """Runs a program; its output is in the error if it fails."""
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        **options,
    )
    if result.returncode != 0:
        words = " ".join(str(word) for word in command)
        raise RuntimeError(f"{words}: exit {result.returncode}\n{result.stdout[-4000:]}")
    return str(result.stdout)


def _discard(draft: Path) -> None:
    """Removes a draft; debootstrap may have died with /proc mounted in it."""
    unmount_below(draft)
    if not mounts_below(draft):
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _built_once(name: str) -> Iterator[tuple[Path, Path | None]]:
    """Yields (final, draft): draft is None if `final` is there, else what to fill.

    One process builds at a time; a draft that its builder left is thrown away.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    final = CACHE / name
    with open(CACHE / f"{name}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if final.exists():
            yield final, None
            return
        for old in CACHE.glob(f"{name}.draft-*"):
            _discard(old)
        draft = CACHE / f"{name}.draft-{os.getpid()}-{time.monotonic_ns()}"
        draft.mkdir()
        try:
            yield final, draft
            draft.rename(final)
        except BaseException:
            _discard(draft)
            raise


def _recipe(*parts: str) -> str:
    return hashlib.sha256("\0".join((RECIPE, *parts)).encode()).hexdigest()[:16]


def _mirror() -> list[str]:
    """The mirror that apt uses for the suite; without one debootstrap takes its default."""
    targets = run(
        "apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages"
    )
    return [line.split()[1] for line in targets.splitlines() if line.split()[0] == SUITE][:1]


def debian_root(packages: str = PACKAGES) -> Path:
    """The directory of a Debian root, read-only for the tests."""
    with _built_once(f"root-{_recipe(SUITE, packages)}") as (final, draft):
        if draft is not None:
            for attempt in range(1, 6):
                try:
                    run(
                        "debootstrap",
                        "--variant=minbase",
                        f"--include={packages}",
                        SUITE,
                        draft / "root",
                        *_mirror(),
                        timeout=1200,
                    )
                    break
                except (RuntimeError, subprocess.TimeoutExpired):
                    if attempt == 5:
                        raise
                    _discard(draft / "root")
                    time.sleep(5 * attempt)
            _trim(draft / "root")
    return final / "root"


def _trim(root: Path) -> None:
    """Takes out what differs from build to build or only costs time."""
    for name in ("var/cache/apt", "var/lib/apt/lists", "usr/share/locale", "var/log", "dev"):
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir(parents=True)
    for name in (
        "etc/machine-id",
        "etc/resolv.conf",
        "etc/hostname",
        "var/cache/ldconfig/aux-cache",
    ):
        (root / name).unlink(missing_ok=True)
    (root / "etc/hostname").write_text("debian\n")


def _tar(target: Path, base: Path, *arguments: str) -> None:
    run(
        "tar",
        "--format=posix",
        "--pax-option=delete=atime,delete=ctime,exthdr.name=%d/PaxHeaders/%f",
        "--sort=name",
        "--numeric-owner",
        "--xattrs",
        "--xattrs-include=*",
        f"--mtime=@{EPOCH}",
        "--clamp-mtime",
        "-C",
        base,
        "-cf",
        target,
        *arguments,
    )


def _is_python(path: str) -> bool:
    return path.startswith(("./usr/lib/python3", "./usr/bin/python3", "./usr/share/python3"))


def _tar_root(root: Path, work: Path, base: Path | None = None) -> list[Path]:
    """Layers 1 and 2: the system, and python3 on top; 3: what is not in `base`, if it is given."""
    system, python, rest = ["."], ["./usr", "./usr/bin", "./usr/lib", "./usr/share"], []
    for directory, directories, files in os.walk(root):
        for name in sorted(directories + files):
            path = f"./{os.path.relpath(os.path.join(directory, name), root)}"
            if base is not None and not os.path.lexists(base / path):
                rest.append(path)
            else:
                (python if _is_python(path) else system).append(path)
    layers = []
    for number, paths in enumerate(filter(None, (system, python, rest)), 1):
        listing = work / f"list{number}"
        listing.write_bytes(b"\0".join(os.fsencode(path) for path in sorted(paths)) + b"\0")
        _tar(work / f"{number}.tar", root, "--no-recursion", "--null", f"--files-from={listing}")
        layers.append(work / f"{number}.tar")
    return layers


def _fill_upper_layers(root: Path, one: Path, two: Path) -> None:
    """Layers 3 and 4: what people's Dockerfiles do."""
    for top in (one, two):
        (top / "etc").mkdir(parents=True)
        (top / "usr/share").mkdir(parents=True)
    passwd = (root / "etc/passwd").read_text()
    (one / "etc/passwd").write_text(passwd + "tester:x:1234:1235:Tester:/home/tester:/bin/sh\n")
    (one / "etc/group").write_text((root / "etc/group").read_text() + "testers:x:1235:\n")
    (one / "home/tester").mkdir(parents=True)
    os.chown(one / "home/tester", 1234, 1235)
    (one / "etc/.wh.debian_version").touch()  # a file removed
    (one / "usr/share/.wh.pixmaps").touch()  # a directory removed (or never there)
    (one / "usr/share/doc").mkdir()
    (one / "usr/share/doc/.wh..wh..opq").touch()  # all of doc replaced
    (one / "usr/share/doc/README").write_text("only this\n")
    (one / "app/data").mkdir(parents=True)
    (one / "app/data/linked-a").write_bytes(b"one file, two names\n")
    os.link(one / "app/data/linked-a", one / "app/data/linked-b")
    (one / "app/data/größe name\\x").write_text("odd name\n")
    os.symlink("data/linked-a", one / "app/link")
    os.symlink("/app/data", one / "app/absolute")
    os.mkfifo(one / "app/fifo")
    (one / "app/removed-later").write_text("in layer 3 only\n")
    (one / "app/big").write_bytes(
        b"".join(hashlib.sha256(i.to_bytes(8, "big")).digest() for i in range(1 << 17))
    )  # 4 MiB that do not compress
    shutil.copy(root / "bin/true", one / "app/setuid")
    os.chmod(one / "app/setuid", 0o4755)
    shutil.copy(root / "bin/busybox", one / "app/capable")
    run("setcap", "cap_net_bind_service=+ep", one / "app/capable")
    (two / "app").mkdir()
    (two / "app/.wh.removed-later").touch()
    (two / "app/hello.py").write_text(f"{PYTHON_LINE}\n")
    (two / "etc/issue").write_text("replaced by the top layer\n")


def _layer_tars(work: Path) -> list[Path]:
    root = debian_root()
    layers = _tar_root(root, work)
    tops = [work / "top3", work / "top4"]
    _fill_upper_layers(root, *tops)
    for number, top in enumerate(tops, 3):
        for path in [*top.rglob("*"), top]:
            os.utime(path, (EPOCH - 60, EPOCH - 60), follow_symlinks=False)
        _tar(work / f"{number}.tar", top, ".")
        layers.append(work / f"{number}.tar")
    return layers


def _compress(tar: Path, target: Path, variant: str, number: int) -> None:
    if variant == "plain":
        shutil.copy(tar, target)
    elif variant == "gzip":
        with open(target, "wb") as out:
            # Both writers that are common in the wild: one stream, and pigz's joined blocks.
            program = (
                ["gzip", "-n", "-6", "-c"] if number % 2 else ["pigz", "-n", "-6", "-p2", "-c"]
            )
            subprocess.run([*program, tar], stdout=out, check=True)
    else:
        import zstandard

        compressor = zstandard.ZstdCompressor(level=3)
        with open(tar, "rb") as source, open(target, "wb") as out:
            while chunk := source.read(CHUNK):  # one frame a chunk
                out.write(compressor.compress(chunk))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def write_layout(layout: Path, tars: list[Path], variant: str, config: dict[str, Any]) -> None:
    """Writes an OCI layout with one manifest, tagged TAG, from uncompressed layers."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def store(data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    layers = []
    for number, tar in enumerate(tars, 1):
        draft = blobs / f"draft-{number}"
        _compress(tar, draft, variant, number)
        digest = _sha256(draft)
        size = draft.stat().st_size
        draft.rename(blobs / digest.removeprefix("sha256:"))
        layers.append({"mediaType": MEDIA_TYPE + SUFFIX[variant], "digest": digest, "size": size})
    document = {
        "architecture": "amd64",
        "os": "linux",
        "created": "2023-11-14T22:13:20Z",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [_sha256(tar) for tar in tars]},
        "history": [
            {"created": "2023-11-14T22:13:20Z", "created_by": f"layer {number}"}
            for number in range(1, len(tars) + 1)
        ],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            **store(json.dumps(document, sort_keys=True).encode()),
        },
        "layers": layers,
    }
    descriptor = {
        "mediaType": manifest["mediaType"],
        **store(json.dumps(manifest, sort_keys=True).encode()),
        "platform": {"architecture": "amd64", "os": "linux"},
        "annotations": {"org.opencontainers.image.ref.name": TAG},
    }
    (layout / "index.json").write_text(
        json.dumps({"schemaVersion": 2, "manifests": [descriptor]}, sort_keys=True)
    )
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def debian_image(variant: str = "gzip") -> Image:
    """The Debian image, its layers compressed as `variant` says."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}")
    root = debian_root()
    with _built_once(f"debian-{variant}-{_recipe(root.parent.name, PYTHON_LINE)}") as (
        final,
        draft,
    ):
        if draft is not None:
            work = draft / "work"
            work.mkdir()
            config = {
                "Env": [
                    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                    "APP=1",
                ],
                "Cmd": ["/usr/bin/python3", "/app/hello.py"],
                "WorkingDir": "/app",
                "Labels": {"org.example.purpose": "tests"},
                "StopSignal": "SIGTERM",
            }
            write_layout(draft / "oci", _layer_tars(work), variant, config)
            shutil.rmtree(work)
    return Image(final / "oci", variant)


def large_image() -> Image:
    """A Debian with what people build with, in three layers: the system, python3, the rest."""
    base, root = debian_root(), debian_root(LARGE_PACKAGES)
    with _built_once(f"large-{_recipe(base.parent.name, root.parent.name)}") as (final, draft):
        if draft is not None:
            work = draft / "work"
            work.mkdir()
            config = {"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["/usr/bin/python3"]}
            write_layout(draft / "oci", _tar_root(root, work, base), "gzip", config)
            shutil.rmtree(work)
    return Image(final / "oci", "gzip")


def tiny_image(command: str = "sh") -> Image:
    """One layer with a static busybox: an ordinary image that starts at once."""
    busybox = Path("/usr/bin/busybox")
    if not busybox.exists():
        busybox = Path("/bin/busybox")
    with _built_once(f"tiny-{_recipe(_sha256(busybox), command)}") as (final, draft):
        if draft is not None:
            top = draft / "top"
            for name in ("bin", "etc", "proc", "sys", "dev", "usr/bin"):
                (top / name).mkdir(parents=True)
            (top / "tmp").mkdir()
            os.chmod(top / "tmp", 0o1777)
            shutil.copy(busybox, top / "bin/busybox")
            for name in ("sh", "cat", "echo", "ls", "sleep", "true", "false", "id", "stat", "env"):
                os.symlink("busybox", top / "bin" / name)
            (top / "etc/passwd").write_text(
                "root:x:0:0:root:/:/bin/sh\ntester:x:1234:1235::/:/bin/sh\n"
            )
            (top / "etc/group").write_text("root:x:0:\ntesters:x:1235:\n")
            for path in [*top.rglob("*"), top]:
                os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)
            _tar(draft / "1.tar", top, ".")
            config = {"Env": ["PATH=/bin:/usr/bin"], "Cmd": command.split()}
            write_layout(draft / "oci", [draft / "1.tar"], "gzip", config)
            shutil.rmtree(top)
            (draft / "1.tar").unlink()
    return Image(final / "oci", "gzip")


def unpack(image: Image, target: Path) -> Path:
    """Unpacks an image with umoci; answers the root directory."""
    run("umoci", "raw", "unpack", "--image", f"{image.layout}:{TAG}", target)
    return target


def convert(image: Image, target: str, *, name: str) -> str:
    """Copies an image with skopeo to `docker-archive:` or `oci-archive:` FILE."""
    run("skopeo", "--insecure-policy", "copy", "-q", image.reference, f"{target}:{name}")
    return target

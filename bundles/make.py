"""Makes the sample bundles: their programs, images, self-contained indexes and config.json.

    python bundles/make.py [DIRECTORY]        default: this directory

Everything is made here, so that no compiler, registry or network is needed and every run gives
the same: machine code from the listings below, layers as plain tar, one index a bundle. The
samples are for x86-64 Linux. Not a way to make bundles of your own: `clipshim bundle` is that.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import sys
import tarfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from clipshim.cli.bundle_spec import User, runtime_spec
from clipshim.index.builder import BuildOptions, build_index
from clipshim.registry.sources import LayerDescriptor

if TYPE_CHECKING:
    from collections.abc import Iterator

EPOCH = 1_700_000_000
LAYER = "application/vnd.oci.image.layer.v1.tar"
LOAD_ADDRESS = 0x400000
HEADERS_SIZE = 64 + 56

# x86-64, system call numbers of arch/x86/entry/syscalls/syscall_64.tbl
HELLO_TEXT = b"Hello from a container whose image was never unpacked.\n"
HELLO = (
    bytes.fromhex(
        "b8 01 00 00 00"  # mov eax, 1              write(
        "89 c7"  # mov edi, eax                       1,
        "48 8d 35 10 00 00 00"  # lea rsi, [rip+16]   text,
        "ba 37 00 00 00"  # mov edx, 55               55)
        "0f 05"  # syscall
        "b8 3c 00 00 00"  # mov eax, 60             exit(
        "31 ff"  # xor edi, edi                       0)
        "0f 05"  # syscall
    )
    + HELLO_TEXT
)
# Counts up the four digits in /data/count ten times, 50 ms apart, and prints them.
COUNTER = bytes.fromhex(
    "b8 02 00 00 00"  # 00  mov eax, 2               open(
    "48 8d 3d 9c 00 00 00"  # lea rdi, [rip+0x9c]      path,
    "be 02 00 00 00"  # mov esi, 2                     O_RDWR)
    "0f 05"  # syscall
    "85 c0"  # test eax, eax
    "0f 88 81 00 00 00"  # js fail
    "41 89 c4"  # mov r12d, eax
    "41 bd 0a 00 00 00"  # mov r13d, 10
    "48 83 ec 10"  # sub rsp, 16
    "b8 11 00 00 00"  # 28 again: mov eax, 17        pread64(
    "44 89 e7"  # mov edi, r12d                        file,
    "48 89 e6"  # mov rsi, rsp                         digits,
    "ba 05 00 00 00"  # mov edx, 5                     5,
    "45 31 d2"  # xor r10d, r10d                       0)
    "0f 05"  # syscall
    "83 f8 05"  # cmp eax, 5
    "75 5a"  # jne fail
    "b9 03 00 00 00"  # mov ecx, 3
    "fe 04 0c"  # 47 next: inc byte [rsp+rcx]
    "80 3c 0c 3a"  # cmp byte [rsp+rcx], '9'+1
    "75 08"  # jne write
    "c6 04 0c 30"  # mov byte [rsp+rcx], '0'
    "ff c9"  # dec ecx
    "79 ef"  # jns next
    "b8 12 00 00 00"  # 58 write: mov eax, 18        pwrite64(
    "44 89 e7"  # mov edi, r12d                        file,
    "48 89 e6"  # mov rsi, rsp                         digits,
    "ba 05 00 00 00"  # mov edx, 5                     5,
    "45 31 d2"  # xor r10d, r10d                       0)
    "0f 05"  # syscall
    "83 f8 05"  # cmp eax, 5
    "75 2a"  # jne fail
    "b8 01 00 00 00"  # mov eax, 1                   write(
    "89 c7"  # mov edi, eax                            1,
    "48 89 e6"  # mov rsi, rsp                         digits,
    "ba 05 00 00 00"  # mov edx, 5                     5)
    "0f 05"  # syscall
    "b8 23 00 00 00"  # mov eax, 35                  nanosleep(
    "48 8d 3d 29 00 00 00"  # lea rdi, [rip+0x29]      pause,
    "31 f6"  # xor esi, esi                            NULL)
    "0f 05"  # syscall
    "41 ff cd"  # dec r13d
    "75 90"  # jne again
    "31 ff"  # xor edi, edi
    "eb 05"  # jmp exit
    "bf 01 00 00 00"  # 9c fail: mov edi, 1
    "b8 3c 00 00 00"  # a1 exit: mov eax, 60         exit(edi)
    "0f 05"  # syscall
    "2f 64 61 74 61 2f 63 6f 75 6e 74 00"  # a8 path: "/data/count"
    "00 00 00 00"
    "00 00 00 00 00 00 00 00"  # b8 pause: 0 s,
    "80 f0 fa 02 00 00 00 00"  #              50,000,000 ns
)


@dataclass
class Sample:
    """One image, as the indexer sees an image (registry/sources.py, ImageSource)."""

    name: str
    streams: list[bytes]
    command: list[str]
    platform: str = "linux/amd64"
    layers: list[LayerDescriptor] = field(init=False)
    config: dict[str, object] = field(init=False)
    config_raw: bytes = field(init=False)
    manifest_raw: bytes = field(init=False)

    def __post_init__(self) -> None:
        """Derives what a registry would have told."""
        self.layers = [LayerDescriptor(digest(raw), len(raw), LAYER) for raw in self.streams]
        self.config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": self.command, "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [digest(raw) for raw in self.streams]},
        }
        self.config_raw = json.dumps(self.config, sort_keys=True).encode()
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": digest(self.config_raw),
                "size": len(self.config_raw),
            },
            "layers": [
                {"mediaType": LAYER, "digest": layer.digest, "size": layer.size}
                for layer in self.layers
            ],
        }
        self.manifest_raw = json.dumps(manifest, sort_keys=True).encode()

    @property
    def reference(self) -> str:
        """What the image would be called in a registry."""
        return f"localhost/clipshim-samples/{self.name}:1"

    @property
    def manifest_digest(self) -> str:
        """Of the manifest."""
        return digest(self.manifest_raw)

    @contextmanager
    def open_layer(self, i: int) -> Iterator[BinaryIO]:
        """The layer's bytes."""
        yield io.BytesIO(self.streams[i])


def samples() -> list[Sample]:
    """The images of all sample bundles."""
    base = {
        "dev/": None, "proc/": None, "sys/": None, "usr/": None, "usr/bin/": None, "bin": "usr/bin",
        "etc/": None, "etc/passwd": b"root:x:0:0:root:/:/bin/false\n", "etc/group": b"root:x:0:\n",
    }  # fmt: skip
    hello = tar_layer({**base, "usr/bin/hello": elf(HELLO)})
    counter = tar_layer({**base, "usr/bin/counter": elf(COUNTER)})
    data = tar_layer({"data/": None, "data/count": b"0000\n"})
    return [
        Sample("hello", [hello], ["/bin/hello"]),
        Sample("counter", [counter, data], ["/bin/counter"]),
    ]


def make_bundle(sample: Sample, directory: Path) -> None:
    """Writes one bundle: index.clip, config.json and the empty rootfs."""
    (directory / "rootfs").mkdir(parents=True, exist_ok=True)
    (directory / "rootfs" / ".gitkeep").touch()
    build_index(sample, directory / "index.clip", BuildOptions(embed=True))
    spec = runtime_spec(
        sample.config, index_name="index.clip", user=User(0, 0, [0]), hostname=sample.name
    )
    text = json.dumps(spec, indent=2, ensure_ascii=False)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def tar_layer(entries: dict[str, bytes | str | None]) -> bytes:
    """A plain tar: `name/` with None is a directory, bytes a file, text a symlink's target."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.mtime = EPOCH
            info.mode = 0o755 if content is None or name.startswith("usr/bin/") else 0o644
            if content is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            elif isinstance(content, str):
                info.type, info.linkname, info.mode = tarfile.SYMTYPE, content, 0o777
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def elf(code: bytes) -> bytes:
    """A static x86-64 program: ELF header, one program header, code (System V ABI, chapter 4)."""
    size = HEADERS_SIZE + len(code)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",  # 64 bits, little endian, version 1
        2,  # ET_EXEC
        62,  # EM_X86_64
        1,
        LOAD_ADDRESS + HEADERS_SIZE,
        64,  # the program header follows
        0,
        0,
        64,
        56,
        1,
        0,
        0,
        0,
    )
    # PT_LOAD, readable and executable, the whole file
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, LOAD_ADDRESS, LOAD_ADDRESS, size, size, 0x1000)
    return header + segment + code


def digest(raw: bytes) -> str:
    """sha256:HEX."""
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def main() -> None:
    """Makes all samples below a directory."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for sample in samples():
        make_bundle(sample, target / sample.name)


if __name__ == "__main__":
    main()

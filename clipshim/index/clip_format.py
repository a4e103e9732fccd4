"""The container format of a .clip file: a header, a table of sections, the sections.

Knows names, sizes, compression and digests of sections and nothing of what is in them; that is
model.py. Reading treats the file as hostile: every number is checked before it is used.

    offset  size  header, little endian
         0     8  magic "CLIPIDX\\n"
         8     4  format version
        12     4  number of sections
        16     8  size of the whole file
        24    32  sha256 of the table
        56    88  table, one row a section: name (24, NUL padded), offset, stored size, raw size
                  (8 each), compression (1: 0 none, 1 zstd), zeros (7), sha256 of the stored
                  bytes, so that nothing in the file can change unnoticed
    then          the sections in the table's order, without gaps, and nothing after them
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import struct
import tempfile
from typing import TYPE_CHECKING, BinaryIO, Final, Literal, NamedTuple, Protocol, cast

import zstandard

from clipshim.errors import IndexFormatError, NotFoundError, StoreError, remedy

if TYPE_CHECKING:
    import io
    from collections.abc import Iterable, Iterator
    from types import TracebackType

MAGIC: Final = b"CLIPIDX\n"
FORMAT_VERSION: Final = 1

_HEADER = struct.Struct("<8sIIQ32s")
_ROW = struct.Struct("<24sQQQB7x32s")
_NAME = re.compile(rb"[a-z][a-z0-9]*(\.[0-9]{1,5})?")
_COPY = 1 << 20
_MAX_WINDOW = 128 << 20
MAX_SECTIONS: Final = 2048
MAX_FILE_SIZE: Final = 1 << 44
# What is read whole into memory, by name: no index of a real image comes near these.
MAX_RAW_SIZE: Final = {
    "image": 16 << 20,
    "layers": 32 << 20,
    "tree": 512 << 20,
    "spans": 128 << 20,
    "windows": 1 << 30,
    "profile": 32 << 20,
}
# A small hostile file must not take much memory: trees of real images compress 6 times.
_MAX_RATIO = 128
_ZSTD_BLOCK = 128 << 10  # at most, RFC 8878 section 3.1.1.2

Compression = Literal["zstd", "none"]
_CODES: Final[dict[Compression, int]] = {"none": 0, "zstd": 1}
_COMPRESSIONS: Final[dict[int, Compression]] = {code: name for name, code in _CODES.items()}


class BinarySource(Protocol):
    """Something that can be read once from start to end."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes, b"" at the end."""
        ...


class Section(NamedTuple):
    """One row of the table."""

    name: str
    offset: int
    stored_size: int
    raw_size: int
    sha256: bytes  # of the stored bytes
    compression: Compression


def write_clip(
    path: str | os.PathLike[str],
    sections: Iterable[tuple[str, bytes | BinarySource, Compression]],
    *,
    level: int = 9,
) -> str:
    """Writes the file whole or not at all and returns its digest, "sha256:…".

    The same sections give the same bytes. A source is stored as it is; only bytes can be
    compressed, and are stored as they are if they compress more than a reader accepts. The file
    and its directory are synced.
    """
    path = os.fspath(path)
    directory = os.path.dirname(path) or "."
    listed = list(sections)
    if len(listed) > MAX_SECTIONS:
        raise IndexFormatError(f"index {path}: {len(listed)} sections, at most {MAX_SECTIONS}")
    try:
        fd, temporary = tempfile.mkstemp(dir=directory, prefix=".clip-", suffix=".tmp")
    except OSError as exc:
        raise StoreError(f"index {path}: cannot create: {exc.strerror}", hint=remedy(exc)) from exc
    with contextlib.ExitStack() as undo:
        undo.callback(_unlink_quietly, temporary)
        with os.fdopen(fd, "w+b") as file:
            try:
                digest = _write(file, listed, level)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
                os.rename(temporary, path)
            except OSError as exc:
                raise StoreError(
                    f"index {path}: cannot write: {exc.strerror or exc}", hint=remedy(exc)
                ) from exc
        undo.pop_all()
    _sync_directory(directory)
    return digest


def _write(
    file: io.BufferedRandom, listed: list[tuple[str, bytes | BinarySource, Compression]], level: int
) -> str:
    position = _HEADER.size + _ROW.size * len(listed)
    file.write(bytes(position))
    rows = []
    for name, content, compression in listed:
        if isinstance(content, bytes):
            raw_size = len(content)
            limit = MAX_RAW_SIZE.get(name, raw_size)
            if raw_size > limit:
                raise IndexFormatError(f"section {name}: at most {limit} bytes, got {raw_size}")
            stored = content
            if compression == "zstd":
                compressor = zstandard.ZstdCompressor(level=level, write_checksum=False)
                stored = compressor.compress(content)
                if not content or raw_size > _most_raw(len(stored)):
                    stored, compression = content, "none"  # a reader would refuse it
            file.write(stored)
            stored_size, digest = len(stored), hashlib.sha256(stored).digest()
        else:
            if compression != "none":
                raise ValueError("a source is stored as it is")
            hasher, raw_size = hashlib.sha256(), 0
            while chunk := content.read(_COPY):
                hasher.update(chunk)
                file.write(chunk)
                raw_size += len(chunk)
            stored_size, digest = raw_size, hasher.digest()
        rows.append(
            _ROW.pack(name.encode(), position, stored_size, raw_size, _CODES[compression], digest)
        )
        position += stored_size
    table = b"".join(rows)
    file.seek(0)
    file.write(
        _HEADER.pack(MAGIC, FORMAT_VERSION, len(listed), position, hashlib.sha256(table).digest())
    )
    file.write(table)
    file.flush()
    file.seek(0)
    return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


class ClipFile:
    """A .clip file open for reading; its header and table have been checked."""

    def __init__(self, fd: int, label: str) -> None:
        """Takes over `fd`; use `open`."""
        self._fd = fd
        self.label = label
        self.size = 0
        self._sections: dict[str, Section] = {}
        self._read_table()

    @classmethod
    def open(cls, path_or_fd: str | os.PathLike[str] | int) -> ClipFile:
        """Opens a path, or an fd, which stays the caller's.

        Raises NotFoundError, StoreError, or IndexFormatError for what is not a sound .clip file.
        """
        if isinstance(path_or_fd, int):
            label = f"fd {path_or_fd}"
            fd = os.dup(path_or_fd)
        else:
            label = os.fspath(path_or_fd)
            try:
                # O_NONBLOCK: a FIFO must be refused below, not waited for
                fd = os.open(label, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError as exc:
                raise NotFoundError(f"index {label}: no such file") from exc
            except OSError as exc:
                raise StoreError(
                    f"index {label}: cannot open: {exc.strerror}", hint=remedy(exc)
                ) from exc
        try:
            return cls(fd, label)
        except BaseException:
            os.close(fd)
            raise

    def __enter__(self) -> ClipFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; a second time does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def fileno(self) -> int:
        """The fd, owned by this object."""
        return self._fd

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all sections, in the file's order."""
        return tuple(self._sections)

    def __contains__(self, name: str) -> bool:
        return name in self._sections

    def entry(self, name: str) -> Section:
        """The table's row of a section. Raises IndexFormatError if there is none."""
        try:
            return self._sections[name]
        except KeyError:
            raise IndexFormatError(f"index {self.label}: no section {name!r}") from None

    def section(self, name: str) -> bytes:
        """The raw bytes of a section, verified. Raises IndexFormatError."""
        entry = self.entry(name)
        limit = MAX_RAW_SIZE.get(name, 0)
        if entry.raw_size > limit:
            raise self._bad(f"section {name}: at most {limit} bytes, got {entry.raw_size}")
        stored = self.pread(entry.offset, entry.stored_size)
        if hashlib.sha256(stored).digest() != entry.sha256:
            raise self._bad(f"section {name}: content does not match its sha256")
        return stored if entry.compression == "none" else self._decompressed(entry, stored)

    @property
    def unpacked_bytes(self) -> int:
        """What reading all sections but those that are read in pieces takes."""
        pieces = ("windows", "blob.")
        rows = self._sections.values()
        return sum(row.raw_size for row in rows if not row.name.startswith(pieces))

    def pieces(self, name: str) -> Iterator[bytes]:
        """The raw bytes of a section in pieces, verified before the first of them.

        Raises IndexFormatError, also in the middle if the file is changed meanwhile.
        """
        entry = self.entry(name)
        self.verify(name)
        source = cast("BinaryIO", _Stored(self, entry))  # only its read() is used
        if entry.compression == "none":
            while piece := source.read(_COPY):
                yield piece
            return
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        left = entry.raw_size
        try:
            with decompressor.stream_reader(source, read_size=_COPY, closefd=False) as reader:
                while piece := reader.read(_COPY):
                    left -= len(piece)
                    if left < 0:
                        break
                    yield piece
        except zstandard.ZstdError as exc:
            raise self._bad(f"section {name}: not zstd: {exc}") from exc
        if left:
            raise self._bad(f"section {name}: expected {entry.raw_size} bytes, got others")

    def head(self, name: str, size: int) -> bytes:
        """The first `size` bytes of a section, or all, NOT verified. Raises IndexFormatError."""
        entry = self.entry(name)
        if entry.compression == "none":
            return self.pread(entry.offset, min(size, entry.stored_size))
        stored = self.pread(entry.offset, min(entry.stored_size, size + 2 * _ZSTD_BLOCK))
        # the window of such a frame is its content, but memory is used only as far as it is filled
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 30)
        try:
            with decompressor.stream_reader(stored) as reader:
                return reader.read(size)
        except zstandard.ZstdError as exc:
            raise self._bad(f"section {name}: not zstd: {exc}") from exc

    def verify(self, name: str) -> None:
        """Checks a section of any size against its sha256 without holding it in memory."""
        entry = self.entry(name)
        hasher = hashlib.sha256()
        for start in range(0, entry.stored_size, _COPY):
            size = min(_COPY, entry.stored_size - start)
            hasher.update(self.pread(entry.offset + start, size))
        if hasher.digest() != entry.sha256:
            raise self._bad(f"section {name}: content does not match its sha256")

    def pread(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of the file as stored. Raises IndexFormatError if it is shorter."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise self._bad(f"bytes {offset} to {offset + size} of {self.size}")
        parts = []
        while size:
            try:
                part = os.pread(self._fd, min(size, 64 << 20), offset)
            except OSError as exc:
                raise StoreError(
                    f"index {self.label}: cannot read: {exc.strerror}", hint=remedy(exc)
                ) from exc
            if not part:
                raise self._bad(f"ends at byte {offset}, expected {size} more bytes")
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def digest(self) -> str:
        """The sha256 of the whole file, "sha256:…"."""
        hasher = hashlib.sha256()
        for start in range(0, self.size, _COPY):
            hasher.update(self.pread(start, min(_COPY, self.size - start)))
        return "sha256:" + hasher.hexdigest()

    def _decompressed(self, entry: Section, stored: bytes) -> bytes:
        try:
            declared = zstandard.frame_content_size(stored)
            if declared != entry.raw_size:
                raise self._bad(
                    f"section {entry.name}: expected {entry.raw_size} bytes, got {declared}"
                )
            # yields what the frame declares or fails; the section is one frame and no more
            return zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as exc:
            raise self._bad(f"section {entry.name}: not zstd: {exc}") from exc

    def _read_table(self) -> None:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise self._bad("not a regular file")
        self.size = status.st_size
        if self.size < _HEADER.size:
            raise self._bad(f"{self.size} bytes are too few for a .clip file")
        magic, version, count, size, digest = _HEADER.unpack(self.pread(0, _HEADER.size))
        if magic != MAGIC:
            raise self._bad("not a .clip file")
        if version != FORMAT_VERSION:
            raise IndexFormatError(
                f"index {self.label}: expected format version {FORMAT_VERSION}, got {version}",
                hint="make the index again with this version of clipshim",
            )
        if size != self.size or size > MAX_FILE_SIZE:
            raise self._bad(f"expected {size} bytes, got {self.size}")
        if not 0 < count <= MAX_SECTIONS:
            raise self._bad(f"expected 1 to {MAX_SECTIONS} sections, got {count}")
        position = _HEADER.size + _ROW.size * count
        if position > size:
            raise self._bad("the table of sections is cut off")
        table = self.pread(_HEADER.size, _ROW.size * count)
        if hashlib.sha256(table).digest() != digest:
            raise self._bad("the table of sections does not match its sha256")
        for section in self._rows(table):
            if section.offset != position:  # so none overlap and nothing hides between them
                raise self._bad(
                    f"section {section.name}: expected at {position}, got {section.offset}"
                )
            position += section.stored_size
            if position > size:
                raise self._bad(f"section {section.name}: ends beyond the file")
            if section.name in self._sections:
                raise self._bad(f"two sections {section.name}")
            self._sections[section.name] = section
        if position != size:
            raise self._bad(f"{size - position} bytes after the last section")

    def _rows(self, table: bytes) -> Iterator[Section]:
        for raw_name, offset, stored_size, raw_size, code, sha256 in _ROW.iter_unpack(table):
            name = raw_name.rstrip(b"\0")
            if not _NAME.fullmatch(name):
                raise self._bad(f"section with the bad name {name!r}")
            compression = _COMPRESSIONS.get(code)
            if compression is None:
                raise self._bad(f"section {name.decode()}: unknown compression {code}")
            most = stored_size if compression == "none" else _most_raw(stored_size)
            least = stored_size if compression == "none" else 1
            if not least <= raw_size <= most or stored_size > _most_stored(raw_size):
                raise self._bad(f"section {name.decode()}: sizes contradict each other")
            yield Section(name.decode(), offset, stored_size, raw_size, sha256, compression)

    def _bad(self, what: str) -> IndexFormatError:
        return IndexFormatError(f"index {self.label}: {what}")


class _Stored:
    """The stored bytes of a section as a file."""

    def __init__(self, clip: ClipFile, entry: Section) -> None:
        self._clip = clip
        self._at = entry.offset
        self._end = entry.offset + entry.stored_size

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, b"" at the end."""
        part = self._clip.pread(self._at, min(size, self._end - self._at))
        self._at += len(part)
        return part


def _most_raw(stored_size: int) -> int:
    return (1 << 20) + _MAX_RATIO * stored_size


def _most_stored(raw_size: int) -> int:
    """More than zstd makes of bytes that it cannot compress: what is larger is no frame of it."""
    return raw_size + (raw_size >> 7) + 1024


def _unlink_quietly(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _sync_directory(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

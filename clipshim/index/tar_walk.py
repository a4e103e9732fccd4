"""Walks a layer's tar stream as it is decoded and notes where each file's bytes lie.

Push style: whoever decodes the layer feeds it, payloads are skipped, and memory grows with the
number of entries only. Understands V7, ustar, GNU and PAX headers with the rules of Go's
archive/tar, which every engine unpacks layers with (POSIX.1-2017 pax, GNU tar manual "Standard").
PAX global headers are checked and ignored, as all engines do. Not for whiteouts, links or
anything else that needs more than one entry: see merge.py.
"""

import base64
import binascii
import zlib
from dataclasses import dataclass
from struct import Struct
from typing import NoReturn
from urllib.parse import unquote_to_bytes

from clipshim.errors import LayerError

REGULAR, HARD_LINK, SYMLINK, CHAR_DEVICE = b"0", b"1", b"2", b"3"
BLOCK_DEVICE, DIRECTORY, FIFO = b"4", b"5", b"6"

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20  # a PAX header, a long name, a sparse map; archive/tar's bound
MAX_STORED_BYTES = 16 << 20  # sparse data of one layer that does not lie on block boundaries
MAX_CHUNK_TABLE = 4 << 20  # entries of one sparse file
MAX_ENTRIES = 2_000_000  # of one layer
MAX_EXTENSIONS_BYTES = 512 << 20  # of one layer, in all
MAX_SIZE = 1 << 50
MAX_NAME = 255  # linux/limits.h NAME_MAX
MAX_PATH = 4095  # linux/limits.h PATH_MAX, without the final NUL
MAX_XATTR_VALUE = 65535  # e_value_size in linux/fs/erofs/erofs_fs.h

_HEADER = Struct("100s8s8s8s12s12s8s1s100s8s64s8s8s155s12s")
_ZERO = bytes(BLOCK)
_NO_XATTRS: dict[bytes, bytes] = {}
_TYPES = {
    b"\0": REGULAR,
    b"0": REGULAR,
    b"7": REGULAR,
    b"S": REGULAR,
    b"1": HARD_LINK,
    b"2": SYMLINK,
    b"3": CHAR_DEVICE,
    b"4": BLOCK_DEVICE,
    b"5": DIRECTORY,
    b"6": FIFO,
}
_PLAIN_RECORDS = frozenset(
    (b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"atime", b"ctime")
)
_WITHOUT_PAYLOAD = frozenset(b"123456")


@dataclass(slots=True)
class TarEntry:
    """One member of a layer.

    `name` and a hard link's `linkname` are relative, without `.`, `..` or empty components; the
    root directory is b"". Sizes and offsets are in bytes. `data_offset` counts in the
    uncompressed stream. `sparse` lists (offset in the file, size) of what a sparse file holds;
    its pieces follow each other from `data_offset`, or are in `stored` where they lie so that a
    tree of 512-byte blocks could not point at them.
    """

    name: bytes
    type: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    linkname: bytes = b""
    devmajor: int = 0
    devminor: int = 0
    xattrs: dict[bytes, bytes] = None  # type: ignore[assignment]  # shared when empty
    data_offset: int = 0
    sparse: list[tuple[int, int]] | None = None
    stored: bytes | None = None

    def __post_init__(self) -> None:
        if self.xattrs is None:
            self.xattrs = _NO_XATTRS


class TarWalker:
    """Feed it a layer's uncompressed bytes in pieces of any size, then close it.

    Both raise LayerError, which names the layer and the entry.
    """

    def __init__(self, layer_name: str) -> None:
        self._layer = layer_name
        self._entries: list[TarEntry] = []
        self._offset = 0  # of the next byte to be fed
        self._held = bytearray()  # the beginning of a block that came in pieces
        self._want = BLOCK
        self._step = self._header
        self._extension_steps = {
            b"x": self._local_pax,
            b"X": self._local_pax,
            b"g": self._global_pax,
            b"L": self._name_block,
            b"K": self._link_block,
        }
        self._skip = 0
        self._padding = 0  # how much of _skip an archive may leave out at its end
        self._ended = False
        self._zero_seen = False
        self._after = 0  # stream offset behind the block that a step handles
        self._numbers: dict[bytes, int] = {}
        self._stored_total = self._extensions_total = 0
        self._forget()
        # what a sparse file needs until its map is complete
        self._sparse_entry: TarEntry | None = None
        self._map = bytearray()
        self._pieces: list[tuple[int, int]] = []
        self._payload = 0

    @property
    def offset(self) -> int:
        """Bytes fed so far."""
        return self._offset

    @property
    def count(self) -> int:
        """Entries found so far."""
        return len(self._entries)

    def feed(self, data: bytes | memoryview) -> None:
        """Takes the next bytes of the stream."""
        size = len(data)
        base = self._offset
        self._offset = base + size
        if self._ended:
            return
        position = 0
        held = self._held
        while position < size:
            if self._skip:
                taken = min(self._skip, size - position)
                self._skip -= taken
                position += taken
                continue
            missing = self._want - len(held)
            if missing > size - position:
                held += data[position:]
                return
            if held:
                held += data[position : position + missing]
                block = bytes(held)
                held.clear()
            else:
                block = bytes(data[position : position + missing])
            position += missing
            self._after = base + position
            self._step(block)
            if self._ended:
                return

    def close(self) -> list[TarEntry]:
        """The entries, in the order of the stream; LayerError if it stops in the middle."""
        if not self._ended:
            pending = self._pax or self._long_name is not None or self._long_link is not None
            if self._held or self._skip > self._padding or self._step != self._header or pending:
                where = f"after {self._entries[-1].name!r}" if self._entries else "in the header"
                raise LayerError(
                    f"layer {self._layer}: truncated tar stream: "
                    f"ends at byte {self._offset} {where}"
                )
        return self._entries

    def _fail(self, what: str, name: bytes = b"") -> NoReturn:
        entry = f"entry {name!r} " if name else ""
        raise LayerError(
            f"layer {self._layer}: {entry}near byte {max(self._after - BLOCK, 0)}: {what}"
        )

    def _forget(self) -> None:
        self._pax: dict[bytes, bytes] | None = None
        self._pax_xattrs = self._pax_sparse_file = False
        self._pairs: list[bytes] = []
        self._long_name: bytes | None = None
        self._long_link: bytes | None = None

    def _header(self, block: bytes) -> None:
        if block == _ZERO:
            self._ended = self._zero_seen
            self._zero_seen = True
            return
        fields = _HEADER.unpack(block)
        self._check(block, fields[6])
        if self._zero_seen:
            self._fail("expected the second zero block of an archive's end, got a header")
        flag = fields[7]
        size = self._number(fields[4])
        if flag in b"xgLKX":
            if not 0 <= size <= MAX_EXTENSION_BYTES:
                self._fail(f"extension header: expected at most 1 MiB, got {size} bytes")
            self._extension(flag, size)
            return
        kind = _TYPES.get(flag)
        name = fields[0].rstrip(b"\0")
        if kind is None:
            self._fail(f"type flag {flag!r} is not one that a layer can hold", name)
        if b"\0" in name:
            name = name[: name.index(b"\0")]
        linkname = fields[8].partition(b"\0")[0] if flag in b"12" else b""
        magic = fields[9]
        if magic[:6] == b"ustar\0" and fields[13][0]:
            # star's own variant has times behind 131 bytes of prefix
            prefix = fields[13][:131] if block[508:] == b"tar\0" else fields[13]
            name = prefix.partition(b"\0")[0] + b"/" + name
        mode = self._number(fields[1]) & 0o7777
        uid, gid = self._number(fields[2]), self._number(fields[3])
        mtime_ns = self._number(fields[5]) * 1_000_000_000
        xattrs = _NO_XATTRS
        pax = self._pax
        if pax:
            try:
                size = int(pax.get(b"size", size))
                uid = int(pax.get(b"uid", uid))
                gid = int(pax.get(b"gid", gid))
                if b"mtime" in pax:
                    mtime_ns = _pax_time(pax[b"mtime"])
                if self._pax_xattrs:
                    xattrs = _pax_xattrs(pax)
            except (ValueError, binascii.Error) as exc:
                self._fail(f"damaged PAX record: {exc}", name)
            name = pax.get(b"path", name)
            linkname = pax.get(b"linkpath", linkname)
        if self._long_name is not None:
            name = self._long_name
        if self._long_link is not None:
            linkname = self._long_link
        if not 0 <= size <= MAX_SIZE:
            self._fail(f"size {size} is out of range", name)
        if flag == b"\0" and name.endswith(b"/"):
            kind = DIRECTORY  # V7 had no type for it
        payload = 0 if flag[0] in _WITHOUT_PAYLOAD else size
        major = minor = 0
        if flag in b"34":
            major, minor = self._number(fields[11]), self._number(fields[12])
            if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
                self._fail(f"device number {major}:{minor} is out of range", name)
        entry = TarEntry(
            name,
            kind,
            mode,
            uid if 0 <= uid < 0xFFFFFFFF else self._owner(uid, name),
            gid if 0 <= gid < 0xFFFFFFFF else self._owner(gid, name),
            size if kind == REGULAR else 0,
            mtime_ns,
            linkname,
            major,
            minor,
            xattrs,
            self._after,
        )
        if flag == b"S":
            self._old_gnu_sparse(entry, block, payload)
        elif pax and kind == REGULAR and self._pax_sparse_file:
            self._pax_sparse(entry, pax, payload)
        else:
            self._add(entry)
            self._pass(payload)
        self._forget()

    def _check(self, block: bytes, field: bytes) -> None:
        """The checksum: the sum of all bytes with the field itself as blanks."""
        try:
            stored = int(field.strip(b" \0") or b"0", 8)
        except ValueError:
            try:
                stored = int(field.partition(b"\0")[0].strip() or b"0", 8)
            except ValueError:
                self._fail("not a tar header")
        # The low half of Adler-32 is 1 + the sum, modulo 65521: thirty times faster than sum()
        rest = (zlib.adler32(block) & 0xFFFF) - 1 - sum(field) + 8 * 32
        if (rest - stored) % 65521 and stored != _signed_sum(block):
            self._fail("not a tar header: wrong checksum")

    def _number(self, field: bytes) -> int:
        known = self._numbers.get(field)
        if known is not None:
            return known
        if field[0] & 0x80:  # GNU's base-256
            value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
            if field[0] & 0x40:
                value -= 1 << (8 * len(field) - 1)
            if not -(1 << 63) <= value < 1 << 63:
                self._fail("a number needs more than 64 bits")
        else:
            try:
                value = int(field.strip(b" \0") or b"0", 8)
            except ValueError:
                try:
                    value = int(field.partition(b"\0")[0].strip() or b"0", 8)
                except ValueError:
                    self._fail(f"expected an octal number, got {field!r}")
        if len(self._numbers) > 10_000:
            self._numbers.clear()
        self._numbers[field] = value
        return value

    def _owner(self, number: int, name: bytes) -> int:
        if not -(1 << 31) <= number <= 0xFFFFFFFF:
            self._fail(f"owner {number} is out of range", name)
        # chown(2) takes -1 as "leave it", and what an unpacker creates belongs to root
        return 0 if number in (-1, 0xFFFFFFFF) else number & 0xFFFFFFFF

    def _add(self, entry: TarEntry) -> None:
        raw = entry.name
        entry.name = self._clean(raw, raw)
        if entry.type == HARD_LINK:
            entry.linkname = self._clean(entry.linkname, raw)
        elif entry.type == SYMLINK and not 0 < len(entry.linkname) <= MAX_PATH:
            size = len(entry.linkname)
            self._fail(f"symbolic link: expected a target of 1 to 4095 bytes, got {size}", raw)
        self._entries.append(entry)
        if len(self._entries) > MAX_ENTRIES:
            self._fail(f"the layer has more than {MAX_ENTRIES} entries", raw)

    def _clean(self, path: bytes, entry: bytes) -> bytes:
        if path.startswith(b"./"):
            path = path[2:]
        if b"/." in path or b"//" in path or path[:1] in (b"/", b"."):
            parts: list[bytes] = []
            for part in path.split(b"/"):
                if part == b"..":
                    if not parts:
                        self._fail(f"path {path!r} leads out of the root", entry)
                    parts.pop()
                elif part not in (b"", b"."):
                    parts.append(part)
            path = b"/".join(parts)
        elif path.endswith(b"/"):
            path = path[:-1]
        if len(path) > MAX_NAME:
            longest = max(map(len, path.split(b"/")))
            if longest > MAX_NAME or len(path) > MAX_PATH:
                self._fail(
                    f"path of {len(path)} bytes with a component of {longest}: expected at most "
                    f"{MAX_PATH} and {MAX_NAME}",
                    entry,
                )
        return path

    def _pass(self, payload: int) -> None:
        self._padding = -payload % BLOCK
        self._skip = payload + self._padding

    # extension headers

    def _extension(self, flag: bytes, size: int) -> None:
        self._payload = size
        self._extensions_total += size
        if self._extensions_total > MAX_EXTENSIONS_BYTES:
            self._fail(f"the layer has more than {MAX_EXTENSIONS_BYTES} bytes of extension headers")
        self._step = self._extension_steps[flag]
        self._want = size + -size % BLOCK
        if not size:
            self._after_extension()
            if flag in b"LK":
                self._fail("empty long name")

    def _after_extension(self) -> None:
        self._step = self._header
        self._want = BLOCK

    def _local_pax(self, block: bytes) -> None:
        self._after_extension()
        self._pairs = []
        self._pax = self._records(block[: self._payload])

    def _global_pax(self, block: bytes) -> None:
        self._after_extension()
        self._records(block[: self._payload])
        self._pairs = []

    def _name_block(self, block: bytes) -> None:
        self._after_extension()
        self._long_name = block[: self._payload].partition(b"\0")[0]

    def _link_block(self, block: bytes) -> None:
        self._after_extension()
        self._long_link = block[: self._payload].partition(b"\0")[0]

    def _records(self, data: bytes) -> dict[bytes, bytes]:
        """PAX records, `<length> <key>=<value>\\n`; an empty value takes a record back."""
        records: dict[bytes, bytes] = {}
        position, end = 0, len(data)
        while position < end:
            blank = data.find(b" ", position, position + 12)
            digits = data[position:blank]
            if blank < 0 or not digits.isdigit():
                self._fail("damaged PAX header: expected the length of a record")
            following = position + int(digits)
            equals = data.find(b"=", blank, following)
            if following > end or equals <= blank + 1 or data[following - 1] != 0x0A:
                self._fail("damaged PAX header: a record does not end where it should")
            key, value = data[blank + 1 : equals], data[equals + 1 : following - 1]
            if b"\0" in (value if key in (b"path", b"linkpath") else key):
                self._fail(f"damaged PAX header: a zero byte in {key!r}")
            if key not in _PLAIN_RECORDS:
                if key.startswith(b"GNU.sparse."):
                    self._pax_sparse_file = True
                    if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                        self._pairs.append(value)
                elif key.startswith((b"SCHILY.xattr.", b"LIBARCHIVE.xattr.")):
                    self._pax_xattrs = True
            if value:
                records[key] = value
            else:
                records.pop(key, None)
            position = following
        return records

    # sparse files

    def _old_gnu_sparse(self, entry: TarEntry, block: bytes, payload: int) -> None:
        entry.size = self._number(block[483:495])
        self._sparse_entry, self._payload = entry, payload
        self._pieces = []
        self._gnu_pieces(block[386:482], entry)
        if block[482]:
            self._step = self._gnu_sparse_block
        else:
            self._sparse_complete()

    def _gnu_sparse_block(self, block: bytes) -> None:
        assert self._sparse_entry
        self._gnu_pieces(block[:504], self._sparse_entry)
        if len(self._pieces) * 24 > MAX_EXTENSION_BYTES:
            self._fail("sparse map of more than 1 MiB", self._sparse_entry.name)
        if not block[504]:
            self._sparse_complete()

    def _gnu_pieces(self, fields: bytes, entry: TarEntry) -> None:
        for at in range(0, len(fields), 24):
            if not fields[at]:
                break
            offset = self._number(fields[at : at + 12])
            self._pieces.append((offset, self._number(fields[at + 12 : at + 24])))

    def _pax_sparse(self, entry: TarEntry, pax: dict[bytes, bytes], payload: int) -> None:
        version = (pax.get(b"GNU.sparse.major"), pax.get(b"GNU.sparse.minor"))
        in_payload = version == (b"1", b"0")
        listed = version in ((b"0", b"0"), (b"0", b"1")) or (
            version == (None, None) and (b"GNU.sparse.map" in pax or bool(self._pairs))
        )
        if not in_payload and not listed:
            self._add(entry)  # an unknown version is an ordinary file to archive/tar too
            self._pass(payload)
            return
        entry.name = pax.get(b"GNU.sparse.name", entry.name)
        try:
            size = pax.get(b"GNU.sparse.size", pax.get(b"GNU.sparse.realsize"))
            entry.size = int(size) if size else entry.size
            if listed:
                numbers = pax[b"GNU.sparse.map"].split(b",") if b"GNU.sparse.map" in pax else None
                self._pieces = _pairs([int(number) for number in numbers or self._pairs])
        except ValueError as exc:
            self._fail(f"damaged sparse map: {exc}", entry.name)
        self._sparse_entry, self._payload = entry, payload
        if listed:
            self._sparse_complete()
        else:
            self._map.clear()
            self._step = self._map_block

    def _map_block(self, block: bytes) -> None:
        """Sparse format 1.0: decimal lines, first their number of pairs, before the data."""
        entry = self._sparse_entry
        assert entry
        self._payload -= BLOCK
        self._map += block
        if self._payload < 0 or len(self._map) > MAX_EXTENSION_BYTES:
            self._fail("damaged sparse map: longer than its file or 1 MiB", entry.name)
        lines = self._map.count(b"\n")
        if not lines:
            return
        try:
            pairs = int(self._map[: self._map.index(b"\n")])
            if pairs < 0 or lines < 1 + 2 * pairs:
                if pairs < 0 or 4 * pairs > MAX_EXTENSION_BYTES:
                    self._fail(f"damaged sparse map: {pairs} pairs", entry.name)
                return
            numbers = self._map.split(b"\n", 1 + 2 * pairs)[1 : 1 + 2 * pairs]
            self._pieces = _pairs([int(number) for number in numbers])
        except ValueError as exc:
            self._fail(f"damaged sparse map: {exc}", entry.name)
        self._map.clear()
        self._sparse_complete()

    def _sparse_complete(self) -> None:
        """The map is known and the data comes next."""
        entry = self._sparse_entry
        assert entry
        self._sparse_entry = None
        self._step = self._header
        end = total = 0
        for offset, size in self._pieces:
            if offset < end or size < 0 or offset + size > entry.size:
                self._fail(f"sparse map: piece {offset}+{size} is out of order", entry.name)
            end = offset + size
            total += size
        if total != self._payload or entry.size > MAX_SIZE:
            self._fail(f"sparse map covers {total} bytes of {self._payload}", entry.name)
        entry.sparse = [piece for piece in self._pieces if piece[1]]
        entry.data_offset = self._after
        self._pieces = []
        self._add(entry)
        if chunk_bits(entry.size, entry.sparse, entry.data_offset) is not None:
            self._pass(total)
            return
        self._stored_total += total
        if self._stored_total > MAX_STORED_BYTES:
            self._fail(
                f"sparse file of {total} bytes whose pieces do not begin on 512-byte boundaries: "
                f"expected at most {MAX_STORED_BYTES} bytes of such files in a layer",
                entry.name,
            )
        self._want = total + -total % BLOCK
        self._step = self._store

    def _store(self, block: bytes) -> None:
        self._after_extension()
        entry = self._entries[-1]
        entry.stored = block[: sum(size for _, size in entry.sparse or ())]


def chunk_bits(size: int, pieces: list[tuple[int, int]], data_offset: int) -> int | None:
    """log2 of the largest chunk that cuts a sparse file only at borders of its pieces.

    None if the pieces do not lie on 512-byte blocks of file and stream, or if the table of
    chunks would be larger than MAX_CHUNK_TABLE.
    """
    borders = 0
    for offset, length in pieces:
        borders |= offset | (length if offset + length < size else 0)
        if data_offset % BLOCK:
            return None
        data_offset += length
    if borders % BLOCK:
        return None
    bits = (borders & -borders).bit_length() - 1 if borders else max(size - 1, 1).bit_length()
    bits = min(max(bits, 9), 40)
    return bits if -(-size >> bits) <= MAX_CHUNK_TABLE else None


def _signed_sum(block: bytes) -> int:
    """What old tars on machines with signed chars wrote."""
    return sum(byte - 256 if byte > 127 else byte for byte in block[:148] + b" " * 8 + block[156:])


def _pairs(numbers: list[int]) -> list[tuple[int, int]]:
    if len(numbers) % 2:
        raise ValueError("an odd number of values")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _pax_time(value: bytes) -> int:
    """Nanoseconds from decimal seconds; digits beyond the ninth are cut off."""
    seconds, _, fraction = value.partition(b".")
    sign = 1
    if value[:1] in b"+-":
        sign = -1 if value[:1] == b"-" else 1
        seconds = seconds[1:]
    if not (seconds + fraction).isdigit() or len(seconds) > 18:
        raise ValueError(f"time {value!r}")
    nanoseconds = int(fraction[:9].ljust(9, b"0")) if fraction else 0
    return sign * (int(seconds or b"0") * 1_000_000_000 + nanoseconds)


def _pax_xattrs(pax: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Extended attributes by name, in order of names; star's form wins over libarchive's."""
    found: dict[bytes, bytes] = {}
    for key, value in pax.items():
        if key.startswith(b"LIBARCHIVE.xattr."):
            name = unquote_to_bytes(key[17:])
            padded = value + b"=" * (-len(value) % 4)
            found.setdefault(name, base64.b64decode(padded, validate=True))
        elif key.startswith(b"SCHILY.xattr."):
            found[key[13:]] = value
    for name, value in found.items():
        if not 0 < len(name) <= MAX_NAME or b"\0" in name or len(value) > MAX_XATTR_VALUE:
            raise ValueError(f"extended attribute {name!r} of {len(value)} bytes")
    return dict(sorted(found.items())) if found else _NO_XATTRS

"""Walks a layer's tar stream as it is decoded and notes where each file's bytes lie.

Push style: whoever decodes the layer feeds it, payloads are skipped, and memory grows with the
number of entries only. Understands V7, ustar, GNU and PAX headers with the rules of Go's
archive/tar, which every engine unpacks layers with (POSIX.1-2017 pax, GNU tar manual "Standard").
PAX global headers are checked and ignored, as all engines do. Not for whiteouts, links or
anything else that needs more than one entry: see merge.py.
"""

import zlib
from dataclasses import dataclass
from struct import Struct
from typing import NoReturn

from clipshim.errors import LayerError
from clipshim.index.pax import PaxHeader
from clipshim.index.sparse_map import (
    BLOCK,
    MAX_MAP_BYTES,
    Pieces,
    checked,
    chunk_bits,
    pairs,
    parse_map,
)

REGULAR, HARD_LINK, SYMLINK, CHAR_DEVICE = b"0", b"1", b"2", b"3"
BLOCK_DEVICE, DIRECTORY, FIFO = b"4", b"5", b"6"

MAX_EXTENSION_BYTES = 1 << 20  # a PAX header, a long name, a sparse map; archive/tar's bound
MAX_STORED_BYTES = 16 << 20  # sparse data of one layer that does not lie on block boundaries
MAX_ENTRIES = 2_000_000  # of one layer
MAX_EXTENSIONS_BYTES = 512 << 20  # of one layer, in all
MAX_PIECES = 1_000_000  # of all sparse files of a layer
MAX_SIZE = 1 << 50
MAX_NAME = 255  # linux/limits.h NAME_MAX
MAX_PATH = 4095  # linux/limits.h PATH_MAX, without the final NUL

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
    sparse: Pieces | None = None
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
        self._stored_total = self._extensions_total = self._pieces_total = 0
        self._forget()
        # what a sparse file needs until its map is complete
        self._sparse_entry: TarEntry | None = None
        self._map = bytearray()
        self._pieces: Pieces = []
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
        self._pax: PaxHeader | None = None
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
            records = pax.records
            try:
                size = int(records.get(b"size", size))
                uid = int(records.get(b"uid", uid))
                gid = int(records.get(b"gid", gid))
                precise = pax.mtime_ns()
                if precise is not None:
                    mtime_ns = precise
                if pax.has_xattrs:
                    xattrs = pax.xattrs()
            except ValueError as exc:
                self._fail(f"damaged PAX record: {exc}", name)
            name = records.get(b"path", name)
            linkname = records.get(b"linkpath", linkname)
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
        elif pax and pax.is_sparse and kind == REGULAR:
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
        self._pax = self._parsed_pax(block)

    def _global_pax(self, block: bytes) -> None:
        self._after_extension()
        self._parsed_pax(block)

    def _parsed_pax(self, block: bytes) -> PaxHeader:
        try:
            return PaxHeader(block[: self._payload])
        except ValueError as exc:
            self._fail(f"damaged PAX header: {exc}")

    def _name_block(self, block: bytes) -> None:
        self._after_extension()
        self._long_name = block[: self._payload].partition(b"\0")[0]

    def _link_block(self, block: bytes) -> None:
        self._after_extension()
        self._long_link = block[: self._payload].partition(b"\0")[0]

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
        if len(self._pieces) * 24 > MAX_MAP_BYTES:
            self._fail("sparse map of more than 1 MiB", self._sparse_entry.name)
        if not block[504]:
            self._sparse_complete()

    def _gnu_pieces(self, fields: bytes, entry: TarEntry) -> None:
        for at in range(0, len(fields), 24):
            if not fields[at]:
                break
            offset = self._number(fields[at : at + 12])
            self._pieces.append((offset, self._number(fields[at + 12 : at + 24])))

    def _pax_sparse(self, entry: TarEntry, pax: PaxHeader, payload: int) -> None:
        records = pax.records
        version = (records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor"))
        in_payload = version == (b"1", b"0")
        listed = version in ((b"0", b"0"), (b"0", b"1")) or (
            version == (None, None) and (b"GNU.sparse.map" in records or bool(pax.pairs))
        )
        if not in_payload and not listed:
            self._add(entry)  # an unknown version is an ordinary file to archive/tar too
            self._pass(payload)
            return
        entry.name = records.get(b"GNU.sparse.name", entry.name)
        try:
            size = records.get(b"GNU.sparse.size", records.get(b"GNU.sparse.realsize"))
            entry.size = int(size) if size else entry.size
            if listed:
                text = records.get(b"GNU.sparse.map")
                self._pieces = pairs(text.split(b",") if text else pax.pairs)
        except ValueError as exc:
            self._fail(f"damaged sparse map: {exc}", entry.name)
        self._sparse_entry, self._payload = entry, payload
        if listed:
            self._sparse_complete()
        else:
            self._map.clear()
            self._step = self._map_block

    def _map_block(self, block: bytes) -> None:
        entry = self._sparse_entry
        assert entry
        self._payload -= BLOCK
        self._map += block
        if self._payload < 0 or len(self._map) > MAX_MAP_BYTES:
            self._fail("damaged sparse map: longer than its file or 1 MiB", entry.name)
        try:
            pieces = parse_map(self._map)
        except ValueError as exc:
            self._fail(f"damaged sparse map: {exc}", entry.name)
        if pieces is not None:
            self._pieces = pieces
            self._map.clear()
            self._sparse_complete()

    def _sparse_complete(self) -> None:
        """The map is known and the data comes next."""
        entry = self._sparse_entry
        assert entry
        self._sparse_entry = None
        self._step = self._header
        total = self._payload
        if not 0 <= entry.size <= MAX_SIZE:
            self._fail(f"size {entry.size} is out of range", entry.name)
        try:
            entry.sparse = checked(self._pieces, entry.size, total)
        except ValueError as exc:
            self._fail(f"damaged sparse map: {exc}", entry.name)
        self._pieces_total += len(self._pieces)
        if self._pieces_total > MAX_PIECES:
            self._fail(f"sparse files of the layer have more than {MAX_PIECES} pieces", entry.name)
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


def _signed_sum(block: bytes) -> int:
    """What old tars on machines with signed chars wrote."""
    return sum(byte - 256 if byte > 127 else byte for byte in block[:148] + b" " * 8 + block[156:])

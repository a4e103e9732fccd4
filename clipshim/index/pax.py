"""PAX extended headers: records that say more of a tar member than its header can hold.

POSIX.1-2017, pax, "pax Extended Header"; extended attributes as star and libarchive write them.
Knows nothing of streams: tar_walk does.
"""

import base64
from urllib.parse import unquote_to_bytes

MAX_XATTR_NAME = 255  # linux/limits.h XATTR_NAME_MAX
MAX_XATTR_VALUE = 65535  # e_value_size in linux/fs/erofs/erofs_fs.h

_PLAIN = frozenset((b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"atime", b"ctime"))
_STAR, _LIBARCHIVE = b"SCHILY.xattr.", b"LIBARCHIVE.xattr."


class PaxHeader:
    """The records of one header, the last of each key. Raises ValueError if they are damaged.

    `pairs` are the values of GNU's sparse format 0.0, the one whose keys come again and again.
    """

    __slots__ = ("has_xattrs", "is_sparse", "pairs", "records")

    def __init__(self, data: bytes) -> None:
        self.records: dict[bytes, bytes] = {}
        self.pairs: list[bytes] = []
        self.has_xattrs = self.is_sparse = False
        records = self.records
        position, end = 0, len(data)
        while position < end:
            blank = data.find(b" ", position, position + 12)
            digits = data[position:blank]
            if blank < 0 or not digits.isdigit():
                raise ValueError("expected the length of a record")
            following = position + int(digits)
            equals = data.find(b"=", blank, following)
            if following > end or equals <= blank + 1 or data[following - 1] != 0x0A:
                raise ValueError("a record does not end where it should")
            key, value = data[blank + 1 : equals], data[equals + 1 : following - 1]
            if b"\0" in (value if key in (b"path", b"linkpath") else key):
                raise ValueError(f"a zero byte in {key!r}")
            if key not in _PLAIN:
                self._note(key, value)
            if value:
                records[key] = value
            else:
                records.pop(key, None)  # an empty value takes a record back
            position = following

    def _note(self, key: bytes, value: bytes) -> None:
        if key.startswith(b"GNU.sparse."):
            self.is_sparse = True
            if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                self.pairs.append(value)
        elif key.startswith((_STAR, _LIBARCHIVE)):
            self.has_xattrs = True

    def mtime_ns(self) -> int | None:
        """Nanoseconds from decimal seconds; digits beyond the ninth are cut off."""
        value = self.records.get(b"mtime")
        if value is None:
            return None
        seconds, _, fraction = value.partition(b".")
        sign = 1
        if value[:1] in b"+-":
            sign = -1 if value[:1] == b"-" else 1
            seconds = seconds[1:]
        if not (seconds + fraction).isdigit() or len(seconds) > 18:
            raise ValueError(f"time {value!r}")
        nanoseconds = int(fraction[:9].ljust(9, b"0")) if fraction else 0
        return sign * (int(seconds or b"0") * 1_000_000_000 + nanoseconds)

    def xattrs(self) -> dict[bytes, bytes]:
        """Extended attributes in order of names; star's form wins over libarchive's."""
        found: dict[bytes, bytes] = {}
        for key, value in self.records.items():
            if key.startswith(_LIBARCHIVE):
                padded = value + b"=" * (-len(value) % 4)
                name = unquote_to_bytes(key[len(_LIBARCHIVE) :])
                found.setdefault(name, base64.b64decode(padded, validate=True))
            elif key.startswith(_STAR):
                found[key[len(_STAR) :]] = value
        for name, value in found.items():
            if not 0 < len(name) <= MAX_XATTR_NAME or b"\0" in name or len(value) > MAX_XATTR_VALUE:
                raise ValueError(f"extended attribute {name!r} of {len(value)} bytes")
        return dict(sorted(found.items()))

"""Maps of sparse files in tar streams: which pieces a file has, and how chunks can show them.

GNU tar manual, "Storing Sparse Files". Raises ValueError; tar_walk names layer and entry.
"""

BLOCK = 512
MAX_CHUNK_TABLE = 4 << 20  # entries of one sparse file
MAX_MAP_BYTES = 1 << 20

Pieces = list[tuple[int, int]]  # (offset in the file, size), in order


def pairs(numbers: list[bytes]) -> Pieces:
    """Offsets and sizes that take turns, in decimal."""
    if len(numbers) % 2:
        raise ValueError("an odd number of values")
    values = [int(number) for number in numbers]
    return list(zip(values[::2], values[1::2], strict=True))


def parse_map(text: bytes | bytearray) -> Pieces | None:
    """The map of format 1.0: decimal lines, first the number of pairs. None if it goes on."""
    lines = text.count(b"\n")
    if not lines:
        return None
    count = int(text[: text.index(b"\n")])
    if not 0 <= count <= MAX_MAP_BYTES // 4:
        raise ValueError(f"{count} pieces")
    if lines < 1 + 2 * count:
        return None
    return pairs(bytes(text).split(b"\n", 1 + 2 * count)[1 : 1 + 2 * count])


def checked(pieces: Pieces, size: int, payload: int) -> Pieces:
    """The pieces that hold anything, if they fit a file of `size` bytes and their payload."""
    end = total = 0
    for offset, length in pieces:
        if offset < end or length < 0 or offset + length > size:
            raise ValueError(f"piece {offset}+{length} is out of order")
        end = offset + length
        total += length
    if total != payload:
        raise ValueError(f"covers {total} bytes of {payload}")
    return [piece for piece in pieces if piece[1]]


def chunk_bits(size: int, pieces: Pieces, data_offset: int) -> int | None:
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

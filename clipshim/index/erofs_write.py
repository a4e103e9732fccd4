"""Writes a tree as an EROFS image whose files point into the layers' tar streams.

The image is deterministic: the same tree gives the same bytes. Layout: superblock and device
table, inodes with what is inlined after them, then the blocks of large directories and of the
few sparse files that no chunk could describe. Not for reading: see erofs_read.py.
"""

from collections import Counter
from collections.abc import Sequence

from clipshim.errors import LayerError
from clipshim.index.erofs_format import (
    BLOCK,
    BLOCK_BITS,
    CHUNK_BASED,
    CHUNK_FORMAT_INDEXES,
    CHUNK_INDEX,
    CHUNK_INDEX_SIZE,
    COMPACT,
    COMPACT_SIZE,
    DEVICE_SLOT,
    DEVICE_SLOT_SIZE,
    DIRENT,
    DIRENT_SIZE,
    EXTENDED,
    EXTENDED_SIZE,
    FEATURE_COMPAT_MTIME,
    FEATURE_INCOMPAT_CHUNKED_FILE,
    FEATURE_INCOMPAT_DEVICE_TABLE,
    FLAT_INLINE,
    FLAT_PLAIN,
    NULL_ADDR,
    SLOT,
    SLOT_BITS,
    SUPER,
    SUPER_MAGIC,
    SUPER_OFFSET,
    SUPER_SIZE,
    XATTR_ENTRY,
    XATTR_HEADER,
    XATTR_HEADER_SIZE,
    XATTR_PREFIXES,
)
from clipshim.index.merge import Node, Tree
from clipshim.index.sparse_map import MAX_CHUNK_TABLE, chunk_bits
from clipshim.index.tar_walk import (
    BLOCK_DEVICE,
    CHAR_DEVICE,
    DIRECTORY,
    FIFO,
    REGULAR,
    SYMLINK,
    TarEntry,
)

_KINDS = {  # entry type: (S_IFMT >> 12, file_type of a name)
    REGULAR: (0o10, 1),
    DIRECTORY: (0o4, 2),
    CHAR_DEVICE: (0o2, 3),
    BLOCK_DEVICE: (0o6, 4),
    FIFO: (0o1, 5),
    SYMLINK: (0o12, 7),
}
_MAX_BLOCKS = NULL_ADDR  # 32-bit block addresses: layers of 2 TiB
_MAX_COPIED = 64 << 20  # blocks of sparse files that are copied into the image
_MAX_CHUNKS = 8 << 20  # of all files; one each but for sparse files
_HIDDEN_XATTR = b"trusted.overlay."  # would speak to the overlayfs above the tree


def write_erofs(tree: Tree, layer_sizes: Sequence[int]) -> bytes:
    """The image; device i + 1 is layer i, whose uncompressed stream has layer_sizes[i] bytes."""
    return _Writer(tree, layer_sizes).write()


class _Inode:
    """A node's place in the image.

    Its bytes: the fixed part, `xattrs`, then either `table` or the last `tail` bytes of its
    contents. What comes before the tail is in `own` bytes of blocks at block `address`.
    """

    __slots__ = (
        "address",
        "blocks",
        "compact",
        "layout",
        "nid",
        "node",
        "own",
        "parent",
        "size",
        "splits",
        "table",
        "tail",
        "union",
        "xattrs",
    )

    def __init__(self, node: Node, parent: "_Inode | None") -> None:
        self.node = node
        self.parent = parent or self
        self.nid = self.size = self.tail = self.own = self.address = self.union = 0
        self.layout = FLAT_PLAIN
        self.xattrs = self.table = self.blocks = b""
        self.compact = False
        self.splits: list[list[bytes]] = []  # a directory's names, block by block


class _Writer:
    def __init__(self, tree: Tree, layer_sizes: Sequence[int]) -> None:
        self._layer_sizes = layer_sizes
        self._inodes: list[_Inode] = []
        self._by_node: dict[int, _Inode] = {}
        self._chunks = self._copied = 0
        self._collect(tree.root)
        times = Counter(inode.node.entry.mtime_ns for inode in self._inodes)
        # Inodes that have the commonest time take 32 bytes, the others 64.
        self._epoch_ns = max(min(times, key=lambda time: (-times[time], time)), 0)
        head = SUPER_OFFSET + SUPER_SIZE + DEVICE_SLOT_SIZE * len(layer_sizes)
        self._meta_block = -(-head // BLOCK)

    def _collect(self, root: Node) -> None:
        """All inodes, each directory followed by the files in it, then by its subdirectories."""
        pending = [self._new(root, None)]
        while pending:
            inode = pending.pop()
            children = inode.node.children
            assert children is not None
            below = []
            for name in sorted(children):
                child = children[name]
                if child.children is not None:
                    below.append(self._new(child, inode))
                elif id(child) not in self._by_node:
                    self._new(child, inode)
            pending += below[::-1]

    def _new(self, node: Node, parent: _Inode | None) -> _Inode:
        inode = self._by_node[id(node)] = _Inode(node, parent)
        self._inodes.append(inode)
        return inode

    def write(self) -> bytes:
        position = 0
        for inode in self._inodes:
            self._measure(inode)
            position = self._place(inode, position)
        blocks = self._meta_block + -(-position // BLOCK)
        for inode in self._inodes:
            if inode.own:
                inode.address = blocks
                blocks += -(-inode.own // BLOCK)
        if blocks >= _MAX_BLOCKS:
            raise LayerError("the tree of the image needs more than 2 TiB")
        image = bytearray(blocks * BLOCK)
        for number, inode in enumerate(self._inodes, 1):
            self._put(image, inode, number)
        self._put_super(image, blocks)
        return bytes(image)

    # where everything lies

    def _measure(self, inode: _Inode) -> None:
        node = inode.node
        entry = node.entry
        if entry.xattrs:
            inode.xattrs = _xattr_area(entry.xattrs)
        if node.children is not None:
            inode.splits, inode.size = _split_directory(node.children)
            inode.tail = (inode.size - 1) % BLOCK + 1
            inode.own = inode.size - inode.tail
        elif entry.type == SYMLINK:
            inode.size = inode.tail = len(entry.linkname)
        elif entry.type == REGULAR:
            inode.size = entry.size
            if entry.size:
                self._measure_file(inode)
        elif entry.type != FIFO:
            minor = entry.devminor  # new_encode_dev() of linux/kdev_t.h
            inode.union = minor & 0xFF | entry.devmajor << 8 | (minor & ~0xFF) << 12
        inode.compact = (
            entry.mtime_ns == self._epoch_ns
            and entry.uid < 1 << 16
            and entry.gid < 1 << 16
            and inode.size < 1 << 32
            and node.nlink < 1 << 16
        )

    def _measure_file(self, inode: _Inode) -> None:
        entry, layer = inode.node.entry, inode.node.layer
        inode.layout = CHUNK_BASED
        if entry.stored is not None:
            bits, inode.table, inode.blocks = _stored_chunks(entry, _MAX_COPIED - self._copied)
            inode.own = len(inode.blocks)
            self._copied += inode.own
        else:
            limit = self._layer_sizes[layer]
            pieces = [(0, entry.size)] if entry.sparse is None else entry.sparse
            total = sum(size for _, size in pieces)
            if entry.data_offset % BLOCK or entry.data_offset + total > limit:
                raise LayerError(f"layer {layer}: entry {entry.name!r}: data beyond its layer")
            if limit >= _MAX_BLOCKS * BLOCK:
                raise LayerError(f"layer {layer}: expected less than 2 TiB, got {limit} bytes")
            found = chunk_bits(entry.size, pieces, entry.data_offset)
            if found is None:
                raise LayerError(f"layer {layer}: entry {entry.name!r}: sparse data unaligned")
            bits = found
            self._chunks += -(-entry.size >> bits)
            if self._chunks > _MAX_CHUNKS:
                raise LayerError(f"layer {layer}: entry {entry.name!r}: too many sparse chunks")
            inode.table = _chunk_table(entry.size, pieces, entry.data_offset, bits, layer + 1)
        inode.union = CHUNK_FORMAT_INDEXES | (bits - BLOCK_BITS)

    def _place(self, inode: _Inode, position: int) -> int:
        """Gives the inode its nid; the first position behind it."""
        fixed = (COMPACT_SIZE if inode.compact else EXTENDED_SIZE) + len(inode.xattrs)
        position += -position % SLOT
        if inode.tail:
            if inode.tail <= BLOCK - fixed % SLOT:
                inode.layout = FLAT_INLINE
                # An inline tail must not cross the end of a block.
                while (position + fixed) % BLOCK + inode.tail > BLOCK:
                    position += SLOT
            else:
                inode.own += inode.tail
                inode.tail = 0
        inode.nid = position >> SLOT_BITS
        if inode.table:
            fixed += -fixed % CHUNK_INDEX_SIZE
        return position + fixed + len(inode.table) + inode.tail

    # the bytes

    def _put(self, image: bytearray, inode: _Inode, number: int) -> None:
        node = inode.node
        entry = node.entry
        content = inode.blocks
        if node.children is not None:
            content = self._directory(inode)
        elif entry.type == SYMLINK:
            content = entry.linkname
        if inode.own:
            at = inode.address * BLOCK
            image[at : at + inode.own] = content[: inode.own]
            if not inode.table:
                inode.union = inode.address
        kind = _KINDS[entry.type][0] << 12
        mode = kind | (0o777 if entry.type == SYMLINK else entry.mode)
        xattrs = (len(inode.xattrs) - XATTR_HEADER_SIZE) // 4 + 1 if inode.xattrs else 0
        at = (self._meta_block << BLOCK_BITS) + (inode.nid << SLOT_BITS)
        layout = inode.layout << 1
        if inode.compact:
            COMPACT.pack_into(
                image, at, layout, xattrs, mode, node.nlink, inode.size, 0, inode.union, number,
                entry.uid, entry.gid, 0,
            )  # fmt: skip
            at += COMPACT_SIZE
        else:
            seconds, nanoseconds = divmod(entry.mtime_ns, 1_000_000_000)
            EXTENDED.pack_into(
                image, at, layout | 1, xattrs, mode, 0, inode.size, inode.union, number,
                entry.uid, entry.gid, seconds, nanoseconds, node.nlink,
            )  # fmt: skip
            at += EXTENDED_SIZE
        image[at : at + len(inode.xattrs)] = inode.xattrs
        at += len(inode.xattrs)
        if inode.table:
            at += -at % CHUNK_INDEX_SIZE
            table = inode.table
            if inode.address:
                table = _moved(table, inode.address)
            image[at : at + len(table)] = table
        elif inode.tail:
            image[at : at + inode.tail] = content[inode.own :]

    def _directory(self, inode: _Inode) -> bytes:
        children = inode.node.children
        assert children is not None
        content = bytearray()
        by_node = self._by_node
        for names in inode.splits:
            content += bytes(-len(content) % BLOCK)
            offset = DIRENT_SIZE * len(names)
            for name in names:
                if name == b"." or name == b"..":
                    nid, kind = (inode if name == b"." else inode.parent).nid, 2
                else:
                    child = children[name]
                    nid, kind = by_node[id(child)].nid, _KINDS[child.entry.type][1]
                content += DIRENT.pack(nid, offset, kind, 0)
                offset += len(name)
            content += b"".join(names)
        return bytes(content)

    def _put_super(self, image: bytearray, blocks: int) -> None:
        seconds, nanoseconds = divmod(self._epoch_ns, 1_000_000_000)
        devices = len(self._layer_sizes)
        incompat = FEATURE_INCOMPAT_CHUNKED_FILE
        if devices:
            incompat |= FEATURE_INCOMPAT_DEVICE_TABLE
        SUPER.pack_into(
            image, SUPER_OFFSET, SUPER_MAGIC, 0,
            FEATURE_COMPAT_MTIME, BLOCK_BITS, 0, self._inodes[0].nid, len(self._inodes),
            seconds, nanoseconds,
            blocks, self._meta_block, 0, bytes(16), bytes(16), incompat, 0, devices,
            (SUPER_OFFSET + SUPER_SIZE) // DEVICE_SLOT_SIZE, 0, 0, 0, 0, 0, bytes(23),
        )  # fmt: skip
        for number, size in enumerate(self._layer_sizes):
            at = SUPER_OFFSET + SUPER_SIZE + DEVICE_SLOT_SIZE * number
            DEVICE_SLOT.pack_into(image, at, b"", -(-size // BLOCK), 0, b"")


def _split_directory(children: dict[bytes, Node]) -> tuple[list[list[bytes]], int]:
    """The names of a directory in blocks, in order, and the size of the whole."""
    blocks: list[list[bytes]] = []
    names: list[bytes] = []
    used = 0
    for name in sorted((b".", b"..", *children)):
        needed = DIRENT_SIZE + len(name)
        if used + needed > BLOCK:
            blocks.append(names)
            names, used = [], 0
        names.append(name)
        used += needed
    blocks.append(names)
    return blocks, (len(blocks) - 1) * BLOCK + used


def _xattr_area(xattrs: dict[bytes, bytes]) -> bytes:
    """An inode's inline extended attributes; those that the kernel cannot show are left out."""
    area = bytearray()
    for full, value in xattrs.items():
        if full.startswith(_HIDDEN_XATTR):
            continue
        for index, prefix in XATTR_PREFIXES.items():
            name = full[len(prefix) :]
            if full.startswith(prefix) and bool(name) == prefix.endswith(b"."):
                area += XATTR_ENTRY.pack(len(name), index, len(value)) + name + value
                area += bytes(-len(area) % 4)
                break
    if not area:
        return b""
    if len(area) // 4 + 1 > 0xFFFF:
        raise LayerError("extended attributes of a file need more than 256 KiB")
    return XATTR_HEADER.pack(0, 0) + bytes(area)


def _chunk_table(
    size: int, pieces: list[tuple[int, int]], data_offset: int, bits: int, device: int
) -> bytes:
    """One index a chunk; chunks outside of all pieces are holes."""
    if len(pieces) == 1 and size <= 1 << bits:
        return CHUNK_INDEX.pack(0, device, data_offset >> BLOCK_BITS)
    table = bytearray()
    hole = CHUNK_INDEX.pack(0, 0, NULL_ADDR)
    done = 0
    for offset, length in pieces:
        table += hole * ((offset >> bits) - done)
        done = (offset + length + (1 << bits) - 1) >> bits
        first = data_offset >> BLOCK_BITS
        step = 1 << (bits - BLOCK_BITS)
        table += b"".join(
            CHUNK_INDEX.pack(0, device, first + number * step)
            for number in range(done - (offset >> bits))
        )
        data_offset += length
    return bytes(table + hole * (-(-size >> bits) - done))


def _stored_chunks(entry: TarEntry, limit: int) -> tuple[int, bytes, bytes]:
    """Chunk bits, table relative to the first block, and blocks of a file that is copied.

    LayerError if it needs more than `limit` bytes of blocks.
    """
    assert entry.stored is not None
    bits = 12
    while -(-entry.size >> bits) > MAX_CHUNK_TABLE // 64:
        bits += 1
    if bits > 20:
        raise LayerError(f"entry {entry.name!r}: unaligned sparse file of {entry.size} bytes")
    chunks: dict[int, bytearray] = {}
    position = 0
    for offset, length in entry.sparse or []:
        end = offset + length
        while offset < end:
            chunk, inside = offset >> bits, offset & ((1 << bits) - 1)
            taken = min(end - offset, (1 << bits) - inside)
            buffer = chunks.get(chunk)
            if buffer is None:
                buffer = chunks[chunk] = bytearray(1 << bits)
                if len(chunks) << bits > limit:
                    raise LayerError(f"entry {entry.name!r}: sparse data spread too thinly")
            buffer[inside : inside + taken] = entry.stored[position : position + taken]
            position += taken
            offset += taken
    table = bytearray()
    done = 0
    for number, chunk in enumerate(sorted(chunks)):
        table += CHUNK_INDEX.pack(0, 0, NULL_ADDR) * (chunk - done)
        table += CHUNK_INDEX.pack(0, 0, number << (bits - BLOCK_BITS))
        done = chunk + 1
    table += CHUNK_INDEX.pack(0, 0, NULL_ADDR) * (-(-entry.size >> bits) - done)
    return bits, bytes(table), b"".join(chunks[chunk] for chunk in sorted(chunks))


def _moved(table: bytes, address: int) -> bytes:
    return b"".join(
        CHUNK_INDEX.pack(zero, device, block if block == NULL_ADDR else block + address)
        for zero, device, block in CHUNK_INDEX.iter_unpack(table)
    )

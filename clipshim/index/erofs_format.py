"""The part of the EROFS on-disk format that trees use: numbers and structures, no logic.

Source: linux/fs/erofs/erofs_fs.h (Linux 6.12). Trees have blocks of 512 bytes, so that a chunk
can begin wherever a tar payload does; one device a layer; no compression.
"""

from struct import Struct

BLOCK_BITS = 9
BLOCK = 1 << BLOCK_BITS
SLOT_BITS = 5
SLOT = 1 << SLOT_BITS  # a nid counts these from the start of the metadata area

SUPER_OFFSET = 1024
SUPER_MAGIC = 0xE0F5E1E2
# magic, checksum, feature_compat, blkszbits, sb_extslots, root_nid, inos, epoch, fixed_nsec,
# blocks, meta_blkaddr, xattr_blkaddr, uuid, volume_name, feature_incompat, available_compr_algs,
# extra_devices, devt_slotoff, dirblkbits, xattr_prefix_count, xattr_prefix_start, packed_nid,
# xattr_filter_reserved, reserved
SUPER = Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23s")
SUPER_SIZE = 128
# No checksum of the superblock: with blocks of 512 bytes fsck.erofs 1.8 crashes over it, and
# mkfs.erofs leaves it out too. A tree is covered by its section's SHA-256.
FEATURE_COMPAT_MTIME = 0x2
FEATURE_INCOMPAT_CHUNKED_FILE = 0x4
FEATURE_INCOMPAT_DEVICE_TABLE = 0x8

DEVICE_SLOT = Struct("<64sII56s")  # tag, blocks, mapped_blkaddr, reserved
DEVICE_SLOT_SIZE = 128

# i_format, i_xattr_icount, i_mode, i_nlink, i_size, i_reserved, i_u, i_ino, i_uid, i_gid, reserved
COMPACT = Struct("<HHHHIIIIHHI")
COMPACT_SIZE = 32
# i_format, i_xattr_icount, i_mode, i_reserved, i_size, i_u, i_ino, i_uid, i_gid, i_mtime,
# i_mtime_nsec, i_nlink, reserved
EXTENDED = Struct("<HHHHQIIIIqII16x")
EXTENDED_SIZE = 64
FLAT_PLAIN, FLAT_INLINE, CHUNK_BASED = 0, 2, 4  # data layouts, bits 1 to 3 of i_format

CHUNK_FORMAT_INDEXES = 0x20
CHUNK_FORMAT_BITS = 0x1F
CHUNK_INDEX = Struct("<HHI")  # reserved, device_id, blkaddr
CHUNK_INDEX_SIZE = 8
NULL_ADDR = 0xFFFFFFFF

DIRENT = Struct("<QHBB")  # nid, nameoff, file_type, reserved
DIRENT_SIZE = 12
MAX_NAME = 255

XATTR_HEADER = Struct("<IB7x")  # h_name_filter, h_shared_count
XATTR_HEADER_SIZE = 12
XATTR_ENTRY = Struct("<BBH")  # e_name_len, e_name_index, e_value_size
XATTR_ENTRY_SIZE = 4
# The kernel shows extended attributes of these kinds only.
XATTR_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}

# S_IFMT >> 12 of a mode to the file_type of its names
FILE_TYPES = {0o10: 1, 0o4: 2, 0o2: 3, 0o6: 4, 0o1: 5, 0o14: 6, 0o12: 7}

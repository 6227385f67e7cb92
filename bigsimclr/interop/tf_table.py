"""The bytes below a TensorFlow checkpoint: checked numbers, checksums, and LevelDB tables.

Nothing in a file is believed: every length is held against the bytes that are there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from bigsimclr.errors import CheckpointError

_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
_FOOTER = 48  # bytes
_TRAILER = 5  # bytes behind a block: its compression and its checksum
_KEY_LIMIT = 1024  # bytes; keys share prefixes, so that a small file could spell very long ones


@dataclass
class ByteReader:
    """Take numbers and pieces from the front of some bytes, and never more than there are."""

    path: Path  # the file they are from, for errors
    data: bytes
    at: int = 0  # bytes taken

    @property
    def has_more(self) -> bool:
        """Whether bytes are left."""
        return self.at < len(self.data)

    def take(self, count: int) -> bytes:
        """Take a number of bytes.

        Raises:
            CheckpointError: fewer are left.
        """
        piece = self.data[self.at : self.at + count]
        if len(piece) < count:
            raise damaged(self.path, f"{count} bytes expected, {len(piece)} left")
        self.at += count
        return piece

    def varint(self) -> int:
        """Take an unsigned number of 64 bits in seven-bit groups, the lowest first.

        Raises:
            CheckpointError: it does not end, or has more bits.
        """
        value = 0
        for shift in range(0, 70, 7):
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80 and value < 1 << 64:
                return value
        raise damaged(self.path, "a number has more than 64 bits")

    def fixed(self, size: int) -> int:
        """Take an unsigned number of `size` bytes, the lowest first.

        Raises:
            CheckpointError: fewer are left.
        """
        return int.from_bytes(self.take(size), "little")

    def field(self) -> tuple[int, int | bytes]:
        """Take a field of a protocol buffer: its number, and an integer or the bytes it holds.

        Integers of variable length are two's complements of 64 bits.

        Raises:
            CheckpointError: it does not end, or is of a kind that the format has given up.
        """
        number, wire = divmod(self.varint(), 8)
        match wire:
            case 0:
                value = self.varint()
                return number, value - (1 << 64) * (value >> 63)
            case 1:
                return number, self.fixed(8)
            case 2:
                return number, self.take(self.varint())
            case 5:
                return number, self.fixed(4)
            case _:
                raise damaged(self.path, f"a field of the unknown kind {wire}")


def crc32c(data: bytes, crc: int = 0) -> int:
    """Compute the CRC-32C of bytes.

    Args:
        data: the bytes.
        crc: the CRC of what stands before them.
    """
    value: int = google_crc32c.extend(crc, data)
    return value


def masked(crc: int) -> int:
    """Disguise a CRC as files store it: a CRC over bytes that hold CRCs would be weak.

    Source: tensorflow/core/lib/hash/crc32c.h, Mask.
    """
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def table_entries(path: Path, content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a table, in the order of the keys, every block verified.

    A table is: data blocks, a block of metadata, a block that lists the data blocks, a footer.
    Blocks may not overlap, so the work is bounded by the size of the file.

    Args:
        path: the file, for errors.
        content: all its bytes.

    Raises:
        CheckpointError: the bytes are no intact table, or are compressed.

    Source: tensorflow/core/lib/io/{format,table,block}.cc, which are LevelDB's.
    """
    if not content.endswith(_MAGIC):
        raise damaged(path, "the mark at its end is missing")
    body, footer = content[:-_FOOTER], ByteReader(path, content[-_FOOTER:])
    _block(path, body, footer.varint(), footer.varint())  # metadata: not in use, but verified
    list_of_blocks = _block(path, body, footer.varint(), footer.varint())
    end = 0
    previous: bytes | None = None
    for _, handle in _block_entries(path, list_of_blocks):
        place = ByteReader(path, handle)
        start, size = place.varint(), place.varint()
        if start < end:
            raise damaged(path, "its blocks overlap")
        end = start + size + _TRAILER
        for key, value in _block_entries(path, _block(path, body, start, size)):
            if previous is not None and key <= previous:
                raise damaged(path, f"the key {key!r} comes twice or out of order")
            previous = key
            yield key, value


def damaged(path: Path, reason: str) -> CheckpointError:
    """Word the error for a file that is not what it should be.

    Args:
        path: the file.
        reason: what is wrong with it.
    """
    return CheckpointError(
        f"{path} is damaged or no part of a TensorFlow checkpoint ({reason}); "
        "copy or download it again"
    )


def unsupported(path: Path, what: str) -> CheckpointError:
    """Word the error for an intact file that needs TensorFlow.

    Args:
        path: the file.
        what: what it has that is not read here.
    """
    return CheckpointError(
        f"{path} has {what}, which is not supported; load it in TensorFlow and save it again "
        "without that"
    )


def _block(path: Path, body: bytes, start: int, size: int) -> bytes:
    """Verify the block at a byte of the file; `size` is that without its trailer."""
    reader = ByteReader(path, body, start)
    block, compression = reader.take(size), reader.take(1)
    if reader.fixed(4) != masked(crc32c(block + compression)):
        raise damaged(path, f"the checksum of the block at byte {start} differs")
    if compression == b"\1":
        raise unsupported(path, "blocks compressed with snappy")
    if compression != b"\0":
        raise unsupported(path, f"blocks in the unknown compression {compression[0]}")
    return block


def _block_entries(path: Path, block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values; of a key only what differs from the one before is stored.

    The list of restarts at the end serves searches and is skipped.
    """
    restarts = ByteReader(path, block, max(len(block) - 4, 0)).fixed(4)
    size = len(block) - 4 * (restarts + 1)
    if size < 0:
        raise damaged(path, "a block is shorter than its list of restarts")
    reader, key = ByteReader(path, block[:size]), b""
    while reader.has_more:
        shared, fresh, length = reader.varint(), reader.varint(), reader.varint()
        if shared > len(key):
            raise damaged(path, "a key shares more bytes than the one before has")
        key = key[:shared] + reader.take(fresh)
        if len(key) > _KEY_LIMIT:
            raise damaged(path, f"a key has more than {_KEY_LIMIT} bytes")
        yield key, reader.take(length)

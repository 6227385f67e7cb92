"""Write TensorFlow checkpoints, intact ones and ones with anything wrong but their checksums.

Written from the format's definition and not with the reader's own code, so that the two agree on
the format and not merely with each other.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

Rows = Sequence[tuple[bytes, bytes]]  # keys and values, in the order of the keys
Span = tuple[int, int]  # offset and size of a block without its trailer

NUMBERS = {  # DataType
    "float32": 1,
    "float64": 2,
    "int32": 3,
    "uint8": 4,
    "int16": 5,
    "int8": 6,
    "string": 7,
    "complex64": 8,
    "int64": 9,
    "bool": 10,
    "bfloat16": 14,
    "uint16": 17,
    "complex128": 18,
    "float16": 19,
    "uint32": 22,
    "uint64": 23,
}
NO_RESTARTS = struct.pack("<I", 0)


def masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value: int) -> bytes:
    groups = []
    value &= (1 << 64) - 1
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def integer(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def header(shards: int = 1, endianness: int = 0, min_consumer: int = 0) -> bytes:
    version = integer(1, 1) + integer(2, min_consumer)
    return integer(1, shards) + integer(2, endianness) + message(3, version)


def entry(
    dtype: int,
    shape: Iterable[int],
    *,
    shard: int = 0,
    offset: int = 0,
    size: int = 0,
    crc: int = 0,
) -> bytes:
    dimensions = b"".join(message(2, integer(1, side)) for side in shape)
    fields = integer(1, dtype) + message(2, dimensions) + integer(3, shard)
    fields += integer(4, offset) + integer(5, size)
    return fields + varint(6 << 3 | 5) + struct.pack("<I", crc)


def block(rows: Rows, restart_every: int = 16) -> bytes:
    content, restarts, previous = b"", [], b""
    for position, (key, value) in enumerate(rows):
        shared = 0
        if position % restart_every == 0:
            restarts.append(len(content))
        else:
            while shared < min(len(key), len(previous)) and key[shared] == previous[shared]:
                shared += 1
        content += varint(shared) + varint(len(key) - shared) + varint(len(value))
        content += key[shared:] + value
        previous = key
    return content + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def sealed(content: bytes, compression: int = 0) -> bytes:
    """Add the trailer of a block."""
    content += bytes([compression])
    return content + struct.pack("<I", masked_crc(content))


def footer(metadata: Span, blocks: Span) -> bytes:
    handles = b"".join(varint(number) for number in (*metadata, *blocks))
    return handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def table(
    rows: Rows, *, block_bytes: int = 4096, restart_every: int = 16, compression: int = 0
) -> tuple[bytes, list[Span]]:
    """Return a table and where all its blocks lie: data, metadata, and the list of blocks."""
    groups: list[list[tuple[bytes, bytes]]] = [[]]
    for row in rows:
        if sum(len(key) + len(value) for key, value in groups[-1]) >= block_bytes:
            groups.append([])
        groups[-1].append(row)
    content, spans, handles = b"", [], []
    for group in [*groups, []]:
        written = block(group, restart_every)
        spans.append((len(content), len(written)))
        content += sealed(written, compression)
        if group:
            handles.append((group[-1][0], b"".join(varint(number) for number in spans[-1])))
    written = block(handles, restart_every=1)
    spans.append((len(content), len(written)))
    content += sealed(written, compression)
    return content + footer(spans[-2], spans[-1]), spans


def table_of(only: bytes) -> bytes:
    """Return a table of one data block, given without its trailer."""
    content = sealed(only) + sealed(NO_RESTARTS)
    blocks = block([(b"", varint(0) + varint(len(only)))])
    return content + sealed(blocks) + footer((len(only) + 5, 4), (len(content), len(blocks)))


def string_bytes(texts: Sequence[bytes]) -> tuple[bytes, int]:
    """Return an array of strings as stored, and its masked checksum."""
    lengths = b"".join(varint(len(text)) for text in texts)
    numbers = b"".join(struct.pack("<I", len(text)) for text in texts)
    middle = struct.pack("<I", masked_crc(numbers))
    joined = b"".join(texts)
    return lengths + middle + joined, masked_crc(numbers + middle + joined)


def bundle_files(
    variables: Mapping[str, NDArray[np.generic] | bytes], shards: int = 1
) -> tuple[Rows, list[bytes]]:
    """Return the rows of an index, and the content of the shards, which take turns."""
    rows, data = [(b"", header(shards))], [bytearray() for _ in range(shards)]
    for position, (name, value) in enumerate(sorted(variables.items())):
        shard = position % shards
        if isinstance(value, bytes):
            stored, crc = string_bytes([value])
            dtype, shape = NUMBERS["string"], ()
        else:
            stored = value.astype(value.dtype.newbyteorder("<")).tobytes()
            dtype, shape, crc = NUMBERS[value.dtype.name], value.shape, masked_crc(stored)
        place = {"shard": shard, "offset": len(data[shard]), "size": len(stored)}
        rows.append((name.encode(), entry(dtype, shape, **place, crc=crc)))
        data[shard] += stored
    return rows, [bytes(content) for content in data]


def write_bundle(
    prefix: Path,
    variables: Mapping[str, NDArray[np.generic] | bytes],
    *,
    shards: int = 1,
    block_bytes: int = 4096,
) -> None:
    """Write an intact checkpoint: arrays, and strings given as bytes."""
    rows, data = bundle_files(variables, shards)
    index, _ = table(rows, block_bytes=block_bytes)
    write_files(prefix, index, data)


def write_files(prefix: Path, index: bytes, data: Sequence[bytes]) -> None:
    Path(f"{prefix}.index").write_bytes(index)
    for shard, content in enumerate(data):
        Path(f"{prefix}.data-{shard:05d}-of-{len(data):05d}").write_bytes(content)


def write_entries(
    prefix: Path, entries: Rows, *, head: bytes | None = None, data: bytes = bytes(24)
) -> None:
    """Write an index of one shard whose checksums are right, whatever it says."""
    index, _ = table([(b"", header() if head is None else head), *entries])
    write_files(prefix, index, [data])

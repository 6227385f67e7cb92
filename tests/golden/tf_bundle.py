"""Read the arrays of a TensorFlow checkpoint (tensor bundle) without TensorFlow.

`<prefix>.index` is a LevelDB table of protocol buffers, one per array, that say where in
`<prefix>.data-*` its bytes lie. Only what the stored cases use is read: one shard, no compression,
numbers. For tests alone: nothing here guards against a malicious file.
"""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_TYPES = {1: np.float32, 2: np.float64, 3: np.int32, 9: np.int64}
_WIRE_FIXED = {1: 8, 5: 4}  # bytes of the protocol buffers' fixed-size fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _message(data: bytes) -> dict[int, list]:
    """Field number -> its values: integers, or bytes of strings and nested messages."""
    fields: dict[int, list] = {}
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
        else:
            size = _WIRE_FIXED.get(wire)
            if size is None:
                size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        fields.setdefault(key >> 3, []).append(value)
    return fields


def _entries(table: bytes, offset: int, size: int) -> list[tuple[bytes, bytes]]:
    """Key and value pairs of one table block; keys are stored without their common prefix."""
    assert table[offset + size] == 0, "compressed block"
    block = table[offset : offset + size]
    restarts = struct.unpack_from("<I", block, size - 4)[0]
    end, at, key = size - 4 - 4 * restarts, 0, b""
    entries = []
    while at < end:
        shared, at = _varint(block, at)
        fresh, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + fresh]
        entries.append((key, block[at + fresh : at + fresh + length]))
        at += fresh + length
    return entries


def read_bundle(directory: Path) -> dict[str, NDArray]:
    """Arrays by variable name of the one checkpoint in `directory`."""
    (index,) = directory.glob("*.index")
    (data_file,) = directory.glob(f"{index.stem}.data-00000-of-00001")
    table, data = index.read_bytes(), data_file.read_bytes()
    footer = table[-_FOOTER_BYTES:]
    assert struct.unpack("<Q", footer[-8:])[0] == _MAGIC, f"{index} is no tensor bundle"
    _, at = _varint(footer, 0)
    _, at = _varint(footer, at)
    offset, at = _varint(footer, at)
    size, _ = _varint(footer, at)
    arrays: dict[str, NDArray] = {}
    for _, handle in _entries(table, offset, size):
        block_offset, at = _varint(handle, 0)
        block_size, _ = _varint(handle, at)
        for name, value in _entries(table, block_offset, block_size):
            entry = _message(value)
            dtype = _TYPES.get(entry.get(1, [0])[0])
            if not name or dtype is None:  # the header, or text such as the object graph
                continue
            dimensions = _message(entry[2][0]).get(2, []) if 2 in entry else []
            shape = [_message(dimension).get(1, [0])[0] for dimension in dimensions]
            start, length = entry.get(4, [0])[0], entry.get(5, [0])[0]
            flat = np.frombuffer(data[start : start + length], dtype=dtype)
            arrays[name.decode()] = flat.reshape(shape)
    return arrays

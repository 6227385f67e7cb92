"""Read TensorFlow checkpoints (tensor bundles) without TensorFlow, believing nothing in them.

`<prefix>.index` is a table that says where in the shards `<prefix>.data-<i>-of-<n>` the bytes of
each variable lie, and what their checksum is. Memory in use is that of the index and one variable.
"""

import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bigsimclr.errors import CheckpointError
from bigsimclr.interop.tf_table import (
    ByteReader,
    crc32c,
    damaged,
    masked,
    table_entries,
    unsupported,
)

_TEXT_LIMIT = 16 << 20  # bytes of an index or a string; the largest SimCLR has less than one
_MESSAGE_LIMIT = 4096  # bytes that describe one variable
_VARIABLE_LIMIT = 1 << 16
_RANK_LIMIT = 32  # the dimensions an array can have in every version of numpy
_CHUNK = 8 << 20  # bytes
_FORMAT_VERSION = 1

# Source: tensorflow/core/framework/types.proto, DataType.
_ARRAY_TYPES = {
    1: "float32",
    2: "float64",
    3: "int32",
    4: "uint8",
    5: "int16",
    6: "int8",
    8: "complex64",
    9: "int64",
    17: "uint16",
    18: "complex128",
    19: "float16",
    22: "uint32",
    23: "uint64",
}
_OTHER_TYPES = {7: "string", 10: "bool", 14: "bfloat16", 20: "resource", 21: "variant"}


@dataclass(frozen=True)
class Variable:
    """What the index says of a variable."""

    dtype: str  # "float32", "int64", "string", ...
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a variable lie."""

    shard: Path
    offset: int  # bytes
    size: int  # bytes
    crc: int  # masked CRC-32C


@dataclass(frozen=True)
class Bundle:
    """An open checkpoint: its variables by key, in the order of the index."""

    prefix: Path
    variables: Mapping[str, Variable]
    _places: Mapping[str, _Place] = field(repr=False)

    def read(self, name: str) -> NDArray[np.generic]:
        """Read a variable of numbers and verify its checksum.

        Args:
            name: a key of `variables`.

        Returns:
            A new array of the variable's shape, in the byte order of this machine.

        Raises:
            CheckpointError: it is missing, damaged, or of a type that is not read.
        """
        variable, place = self._find(name)
        if variable.dtype not in _ARRAY_TYPES.values():
            raise CheckpointError(
                f"{self.prefix}: {name!r} is of type {variable.dtype}, which cannot be read as "
                "numbers; cast it in TensorFlow and save it again"
            )
        try:
            data = np.empty(place.size, dtype=np.uint8)
        except MemoryError as error:
            raise CheckpointError(
                f"{self.prefix}: {name!r} has {place.size} bytes, for which memory is short"
            ) from error
        crc = at = 0
        for chunk in _read_chunks(place):
            crc = crc32c(chunk, crc)
            data[at : at + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
            at += len(chunk)
        _verify(name, place, crc)
        stored = np.dtype(variable.dtype).newbyteorder("<")
        array = data.view(stored).reshape(variable.shape)
        return array.astype(stored.newbyteorder("="), copy=False)

    def read_text(self, name: str) -> bytes:
        """Read a variable that is one string, and verify its checksums.

        Args:
            name: a key of `variables`, such as `_CHECKPOINTABLE_OBJECT_GRAPH`.

        Raises:
            CheckpointError: it is missing, damaged, or something else.

        Source: tensorflow/core/util/tensor_bundle/tensor_bundle.cc, ReadStringTensor.
        """
        variable, place = self._find(name)
        if variable != Variable("string", ()):
            raise CheckpointError(
                f"{self.prefix}: {name!r} is {variable.dtype} of shape {list(variable.shape)}, "
                "where one string is expected"
            )
        if place.size > _TEXT_LIMIT:
            raise damaged(place.shard, f"{name!r} has {place.size} bytes, too many for a text")
        reader = ByteReader(place.shard, b"".join(_read_chunks(place)))
        length = reader.varint()
        # Summed is the length as a number, in the fewest of 4 and 8 bytes, not as it is stored.
        crc = crc32c(length.to_bytes(4 if length < 1 << 32 else 8, "little"))
        stored_crc = reader.take(4)
        if int.from_bytes(stored_crc, "little") != masked(crc):
            raise damaged(place.shard, f"the checksum of the length of {name!r} differs")
        text = reader.take(length)
        if reader.has_more:
            raise damaged(place.shard, f"{name!r} is longer than its length")
        _verify(name, place, crc32c(text, crc32c(stored_crc, crc)))
        return text

    def _find(self, name: str) -> tuple[Variable, _Place]:
        if name not in self.variables:
            raise CheckpointError(f"{self.prefix} has no variable {name!r}")
        return self.variables[name], self._places[name]


def open_bundle(prefix: Path) -> Bundle:
    """Read and verify the index of a checkpoint, and hold it against the sizes of its shards.

    Args:
        prefix: the path of the checkpoint's files without `.index` and `.data-...`, such as
            `model.ckpt-1000`.

    Raises:
        CheckpointError: files are missing, damaged, or in a form that only TensorFlow reads.

    Source: tensorflow/core/util/tensor_bundle/tensor_bundle.cc and
        tensorflow/core/protobuf/tensor_bundle.proto.
    """
    index = Path(f"{prefix}.index")
    with _open_regular(index) as (descriptor, size):
        if size > _TEXT_LIMIT:
            raise damaged(index, f"{size} bytes where an index has at most {_TEXT_LIMIT}")
        content = b"".join(_pieces(index, descriptor, 0, size))
    shards = 0
    variables: dict[str, Variable] = {}
    places: dict[str, _Place] = {}
    for position, (key, value) in enumerate(table_entries(index, content)):
        if position > _VARIABLE_LIMIT:
            raise unsupported(index, f"more than {_VARIABLE_LIMIT} variables")
        if (key == b"") != (position == 0):
            raise damaged(index, "it does not begin with a header")
        if position == 0:
            shards = _parse_header(index, value)
            continue
        name = _decode_name(index, key)
        variables[name], places[name] = _parse_entry(prefix, shards, name, value)
    if shards == 0:
        raise damaged(index, "it is empty")
    _check_places(places)
    return Bundle(prefix, variables, places)


def _parse_header(index: Path, message: bytes) -> int:
    """Return the number of shards (BundleHeaderProto)."""
    integers, messages = _parse_message(index, message)
    version, _ = _parse_message(index, messages.get(3, b""))
    shards, endianness, oldest_reader = integers.get(1, 0), integers.get(2, 0), version.get(2, 0)
    if endianness != 0:
        raise unsupported(index, "numbers in big-endian order")
    if oldest_reader > _FORMAT_VERSION:
        raise unsupported(index, f"the format of version {oldest_reader}")
    if not 1 <= shards < 1 << 31:
        raise damaged(index, f"it speaks of {shards} shards")
    return shards


def _decode_name(index: Path, key: bytes) -> str:
    if key.startswith(b"\0"):  # the mark of a piece; see EncodeTensorNameSlice
        raise unsupported(index, f"a piece of a partitioned variable, {key!r}")
    try:
        return key.decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(index, f"the key {key!r} is not UTF-8") from error


def _parse_entry(prefix: Path, shards: int, name: str, message: bytes) -> tuple[Variable, _Place]:
    """Parse a BundleEntryProto."""
    index = Path(f"{prefix}.index")
    integers, messages = _parse_message(index, message)
    if 7 in messages:
        raise unsupported(index, f"the partitioned variable {name!r}")
    dtype, shard, offset, size, crc = (integers.get(number, 0) for number in (1, 3, 4, 5, 6))
    if not (0 <= shard < shards and offset >= 0 and size >= 0):
        raise damaged(index, f"{name!r} lies in shard {shard} at {offset} with {size} bytes")
    shape = _parse_shape(index, name, messages.get(2, b""))
    kind = _ARRAY_TYPES.get(dtype)
    if kind is not None and math.prod(shape) * np.dtype(kind).itemsize != size:
        raise damaged(index, f"{name!r} has {size} bytes, not those of {kind} {list(shape)}")
    kind = kind or _OTHER_TYPES.get(dtype, f"number {dtype}")
    file = Path(f"{prefix}.data-{shard:05d}-of-{shards:05d}")
    return Variable(kind, shape), _Place(file, offset, size, crc)


def _parse_shape(index: Path, name: str, message: bytes) -> tuple[int, ...]:
    """Parse a TensorShapeProto."""
    reader = ByteReader(index, message)
    shape: list[int] = []
    while reader.has_more:
        number, value = reader.field()
        if number == 2 and isinstance(value, bytes):
            shape.append(_parse_message(index, value)[0].get(1, 0))
        if number == 3 and value:
            raise damaged(index, f"{name!r} has no shape")
        if len(shape) > _RANK_LIMIT:
            raise damaged(index, f"{name!r} has more than {_RANK_LIMIT} dimensions")
    # Sizes are multiplied without the zeros, as numpy does: no product may overflow.
    if min(shape, default=0) < 0 or math.prod(max(size, 1) for size in shape) >= 1 << 48:
        raise damaged(index, f"{name!r} has the impossible shape {shape}")
    return tuple(shape)


def _parse_message(path: Path, message: bytes) -> tuple[dict[int, int], dict[int, bytes]]:
    """Return the integers and the messages of a protocol buffer by field number.

    As its definition has it, of several integers the last counts, and messages are joined.
    """
    if len(message) > _MESSAGE_LIMIT:
        raise damaged(path, f"the description of one variable has {len(message)} bytes")
    integers: dict[int, int] = {}
    messages: dict[int, bytes] = {}
    reader = ByteReader(path, message)
    while reader.has_more:
        number, value = reader.field()
        if isinstance(value, int):
            integers[number] = value
        else:
            messages[number] = messages.get(number, b"") + value
    return integers, messages


def _check_places(places: Mapping[str, _Place]) -> None:
    """Hold places against the sizes of their files.

    Variables may not share bytes: together they are then no larger than the files.
    """
    spans = sorted(
        (place.shard, place.offset, place.offset + place.size, name)
        for name, place in places.items()
    )
    for shard, group in groupby(spans, key=lambda span: span[0]):
        inside = list(group)
        with _open_regular(shard) as (_, size):
            _, _, end, name = max(inside, key=lambda span: span[2])
            if end > size:
                raise damaged(shard, f"{size} bytes, but {name!r} ends at {end}")
        for (_, _, end, first), (_, start, _, second) in pairwise(inside):
            if start < end:
                raise damaged(shard, f"{first!r} and {second!r} share bytes")


def _verify(name: str, place: _Place, crc: int) -> None:
    if masked(crc) != place.crc:
        raise damaged(place.shard, f"the checksum of {name!r} differs")


def _read_chunks(place: _Place) -> Iterator[bytes]:
    with _open_regular(place.shard) as (descriptor, _):
        yield from _pieces(place.shard, descriptor, place.offset, place.size)


def _pieces(path: Path, descriptor: int, start: int, size: int) -> Iterator[bytes]:
    at, end = start, start + size
    while at < end:
        piece = os.pread(descriptor, min(_CHUNK, end - at), at)
        if not piece:
            raise damaged(path, f"it ends at byte {at}")
        yield piece
        at += len(piece)


@contextmanager
def _open_regular(path: Path) -> Iterator[tuple[int, int]]:
    """Yield descriptor and size of a file that is no pipe or device; a pipe must not block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing; a checkpoint is named by what its .index and .data files have "
            "in common, and needs all of them"
        ) from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file; name a checkpoint's prefix")
        yield descriptor, status.st_size
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)


def _unreadable(path: Path, error: OSError | ValueError) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return CheckpointError(f"{path} cannot be read: {reason or type(error).__name__}")

"""What a tar shard holds and where, found once and kept beside the shard.

A shard follows the WebDataset layout: `KEY.jpg` (or another image format) with `KEY.cls` (the class
number as text) or `KEY.json` beside it. A key ends at the first dot behind the last slash. Of a
JSON object are used `label` or `cls` (class number), `class` (its name) and `name` (the image's).
"""

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from bigsimclr.data.names import fingerprint, printable
from bigsimclr.data.tar_members import (
    BLOCK,
    OtherMember,
    TarFile,
    TarMember,
    open_regular,
    read_at,
)
from bigsimclr.errors import DataError, StorageError
from bigsimclr.storage import publish

Integers = NDArray[np.int64]

IMAGE_SUFFIXES: Final = frozenset(
    {"jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff", "gif"}
)
MOST_CLASSES: Final = 1 << 20

_FORMAT: Final = "bigsimclr shard index 1"
_MOST_IMAGE_BYTES: Final = 1 << 30
_MOST_TEXT_BYTES: Final = 4 << 20
_SAMPLED_BLOCKS: Final = 16
_SAMPLED_BYTES: Final = 4096


@dataclass(frozen=True)
class ShardIndex:
    """The images of one shard, in the order of the shard."""

    bytes: int  # size of the shard
    stamp: str  # hash of samples of its content, by which another shard is noticed
    keys: list[str]
    suffixes: list[str]
    names: list[str]  # stored in KEY.json; "" where there is none
    offsets: Integers  # [n] of the images' content
    sizes: Integers  # [n] bytes
    headers: Integers  # [n] CRC-32 of the blocks before the content
    labels: Integers  # [n], -1 where there is none
    classes: dict[int, str] = field(default_factory=dict)  # names that KEY.json gives
    left_out: dict[str, int] = field(default_factory=dict)  # other members, what -> count

    def __len__(self) -> int:
        return len(self.keys)

    def to_json(self) -> str:
        """Write the index as text, one column a line."""
        columns = {
            "format": _FORMAT,
            "bytes": self.bytes,
            "stamp": self.stamp,
            "classes": [[number, name] for number, name in self.classes.items()],
            "left_out": self.left_out,
            "keys": self.keys,
            "suffixes": self.suffixes,
            "names": self.names,
            **{name: getattr(self, name).tolist() for name in _NUMBERS},
        }
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in columns.items()]
        return "{" + ",\n".join(lines) + "}\n"


# What reading a file raises that holds anything at all.
_UNUSABLE: Final = (
    OSError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_NUMBERS: Final = ("offsets", "sizes", "headers", "labels")


def index_path(shard: Path) -> Path:
    """Return where the index of a shard is kept."""
    return shard.with_name(f"{shard.name}.index")


def index_shard(shard: Path, *, afresh: bool = False) -> tuple[ShardIndex, bool]:
    """Read a shard's index; find it and write it down where there is none, or one of another shard.

    Samples of a shard tell another one, and its time tells that labels were changed in place.

    Args:
        shard: the file.
        afresh: trust no index that is there.

    Returns:
        The index, and whether it is kept in a file: False where the folder cannot be written.

    Raises:
        DataError: the shard is damaged, cannot be read, or holds what it must not.
    """
    place = index_path(shard)
    try:
        descriptor, size = open_regular(shard)
    except OSError as error:
        raise DataError(f"{printable(str(shard))}: {error.strerror}") from error
    try:
        stamp = _stamp(descriptor, size)
        stored = None if afresh or _is_older(place, descriptor) else read_index(place)
        if stored is not None and (stored.bytes, stored.stamp) == (size, stamp):
            return stored, True
        found = _found(descriptor, size, stamp=stamp, shown=printable(str(shard)))
    except OSError as error:
        raise DataError(f"{printable(str(shard))}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return found, _keep(place, found)


def read_index(path: Path) -> ShardIndex | None:
    """Read an index file; None where there is none that can be used."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or found["format"] != _FORMAT:
            return None
        index = ShardIndex(
            bytes=int(found["bytes"]),
            stamp=str(found["stamp"]),
            keys=_texts(found["keys"]),
            suffixes=_texts(found["suffixes"]),
            names=_texts(found["names"]),
            classes={int(number): str(name) for number, name in found["classes"]},
            left_out={str(what): int(count) for what, count in found["left_out"].items()},
            **{name: np.array(found[name], np.int64) for name in _NUMBERS},
        )
        return index if _adds_up(index) else None
    except _UNUSABLE:
        return None


def stamp_of(shard: Path) -> tuple[int, str]:
    """Return the size in bytes and the stamp of a shard, as its index has them.

    Raises:
        OSError: it cannot be read.
        DataError: it is not a regular file.
    """
    descriptor, size = open_regular(shard)
    try:
        return size, _stamp(descriptor, size)
    finally:
        os.close(descriptor)


def read_image(descriptor: int, *, offset: int, size: int, header: int) -> bytes:
    """Read an image of a shard with the header before it, by one call.

    Raises:
        OSError: it cannot be read.
        DataError: another header stands there than when the shard was indexed.
    """
    content = read_at(descriptor, offset - BLOCK, BLOCK + size)
    if len(content) < BLOCK + size or zlib.crc32(content[:BLOCK]) != header:
        raise DataError("its shard was changed after it was indexed")
    return content[BLOCK:]


def dali_index(shard: Path) -> str:
    """Write the index that DALI's WebDataset reader takes, in the format v1.2 of its `wds2idx`.

    Raises:
        DataError: the shard is damaged, or a name has a space, which ends a field there.
        OSError: it cannot be read.
    """
    descriptor, size = open_regular(shard)
    try:
        groups: list[tuple[str, list[str]]] = []
        for member in TarFile(descriptor, size, printable(str(shard))).members():
            if isinstance(member, OtherMember):
                continue
            key, suffix = split_name(member.name)
            if any(mark.isspace() for mark in member.name):
                raise DataError(f"{printable(str(shard))}: '{printable(member.name)}' has a space")
            if not groups or groups[-1][0] != key:
                groups.append((key, []))
            groups[-1][1].append(f"{suffix} {member.offset} {member.size} {member.name}")
    finally:
        os.close(descriptor)
    return f"v1.2 {len(groups)}\n" + "".join(f"{' '.join(parts)}\n" for _, parts in groups)


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into its key and its suffix, at the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}{slash}{stem}", suffix


def _is_older(place: Path, descriptor: int) -> bool:
    """Say whether an index was written before its shard was changed last."""
    try:
        return place.stat().st_mtime_ns < os.fstat(descriptor).st_mtime_ns
    except OSError:
        return True


def _keep(place: Path, index: ShardIndex) -> bool:
    """Write an index beside its shard; False where that cannot be, or is not wanted."""
    # The superuser could write to folders that were closed to writing on purpose.
    if not place.parent.stat().st_mode & 0o222:
        return False
    try:
        publish(place, index.to_json())
    except StorageError:
        return False
    return True


@dataclass(frozen=True)
class _Details:
    """What KEY.cls or KEY.json says of an image."""

    label: int = -1
    name: str = ""
    label_name: str = ""


def _found(descriptor: int, size: int, *, stamp: str, shown: str) -> ShardIndex:
    archive = TarFile(descriptor, size, shown)
    images: dict[str, TarMember] = {}
    headers: dict[str, int] = {}
    details: dict[str, _Details] = {}
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    for member in archive.members():
        if isinstance(member, OtherMember):
            if member.kind != "folder":
                left_out[member.kind] += 1
            continue
        if member.name in seen:
            raise DataError(f"{shown}: member '{printable(member.name)}' is there twice")
        seen.add(member.name)
        key, suffix = split_name(member.name)
        kind = suffix.lower()
        if key.endswith("/") or not key:
            left_out["hidden file"] += 1
        elif kind in IMAGE_SUFFIXES:
            if key in images or member.size > _MOST_IMAGE_BYTES:
                what = "is a second image of its key" if key in images else "is no image, so large"
                raise DataError(f"{shown}: member '{printable(member.name)}' {what}")
            images[key] = member
            headers[key] = zlib.crc32(archive.read(member.offset - BLOCK, BLOCK))
        elif kind in {"cls", "json"}:
            said = _details(archive, member, kind, shown)
            # A number beside an object with more: the object adds names, the number stays.
            details[key] = _merged(details.get(key), said, f"{shown}: '{printable(member.name)}'")
        else:
            left_out[f".{printable(suffix)}" if suffix else "without a suffix"] += 1
    orphans = len(details.keys() - images.keys())
    if orphans:
        left_out["label without an image"] += orphans
    said_of = [details.get(key, _Details()) for key in images]
    members = images.values()
    return ShardIndex(
        bytes=size,
        stamp=stamp,
        keys=list(images),
        suffixes=[split_name(member.name)[1] for member in members],
        names=[said.name for said in said_of],
        offsets=_integers(member.offset for member in members),
        sizes=_integers(member.size for member in members),
        headers=_integers(headers[key] for key in images),
        labels=_integers(said.label for said in said_of),
        classes=_class_names(said_of, shown),
        left_out=dict(left_out),
    )


def _details(archive: TarFile, member: TarMember, kind: str, shown: str) -> _Details:
    place = f"{shown}: member '{printable(member.name)}'"
    if member.size > _MOST_TEXT_BYTES:
        raise DataError(f"{place} has {member.size:,} bytes, too many for a label")
    content = archive.read(member.offset, member.size)
    if kind == "cls":
        text = content.decode("ascii", errors="replace").strip()
        if len(text) > 20 or not text.removeprefix("-").isdecimal():
            raise DataError(f"{place} holds '{printable(text[:40])}', not a class number")
        return _Details(_label(int(text), place))
    try:
        said = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON") from error
    if not isinstance(said, dict):
        return _Details(_label(said, place)) if isinstance(said, int) else _Details()
    return _Details(
        _label(said.get("label", said.get("cls")), place),
        _name(said.get("name")),
        _name(said.get("class")),
    )


def _label(value: object, place: str) -> int:
    if value is None:
        return -1
    if not isinstance(value, int) or isinstance(value, bool) or value >= MOST_CLASSES:
        shown = printable(repr(value)[:40])
        raise DataError(f"{place}: {shown} is no class number (0 to {MOST_CLASSES - 1:,})")
    return max(value, -1)


def _name(value: object) -> str:
    """Take a name that can be written into a list; nothing where it cannot."""
    if not isinstance(value, str):
        return ""
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return ""
    return value


def _merged(before: _Details | None, said: _Details, place: str) -> _Details:
    if before is None:
        return said
    if min(before.label, said.label) >= 0 and before.label != said.label:
        raise DataError(f"{place} gives another label than its neighbour")
    return _Details(
        max(before.label, said.label),
        before.name or said.name,
        before.label_name or said.label_name,
    )


def _class_names(said_of: Iterable[_Details], shown: str) -> dict[int, str]:
    classes: dict[int, str] = {}
    for said in said_of:
        if said.label >= 0 and said.label_name:
            known = classes.setdefault(said.label, said.label_name)
            if known != said.label_name:
                both = f"'{printable(known)}' and '{printable(said.label_name)}'"
                raise DataError(f"{shown}: class {said.label} is called {both}")
    return classes


def _stamp(descriptor: int, size: int) -> str:
    last = max(size - _SAMPLED_BYTES, 0)
    places = [last * number // (_SAMPLED_BLOCKS - 1) for number in range(_SAMPLED_BLOCKS)]
    return fingerprint(read_at(descriptor, place, _SAMPLED_BYTES) for place in places)


def _adds_up(index: ShardIndex) -> bool:
    """Tell whether an index file's numbers can be those of a shard."""
    count = len(index.keys)
    columns = [index.suffixes, index.names, *(getattr(index, name) for name in _NUMBERS)]
    return (
        all(np.shape(column) == (count,) for column in columns)
        and bool(np.all(index.offsets >= BLOCK))
        and bool(np.all((index.sizes >= 0) & (index.sizes <= _MOST_IMAGE_BYTES)))
        and bool(np.all(index.offsets <= index.bytes - index.sizes))
        and bool(np.all((index.labels >= -1) & (index.labels < MOST_CLASSES)))
    )


def _texts(values: object) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("a list of texts is needed")
    os.fsencode("".join(values))  # a ValueError where JSON holds what no name can
    return cast("list[str]", values)


def _integers(values: Iterable[int]) -> Integers:
    return np.fromiter(values, np.int64)

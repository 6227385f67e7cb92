"""The file `pack.json` of a folder of shards: what was packed, and whether all of it is there."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from bigsimclr.data.names import counted, printable, some
from bigsimclr.errors import DataError

NAME: Final = "pack.json"
_FORMAT: Final = "bigsimclr pack 1"


@dataclass(frozen=True)
class PackedShard:
    """One shard, as it was read back after packing."""

    name: str
    images: int
    bytes: int
    sha256: str  # of the file, in hex


@dataclass(frozen=True)
class PackFile:
    """What `pack.json` says."""

    source: str  # fingerprint of the images that are packed
    images: int
    shards: int
    order: Literal["shuffled", "source"]  # how the images are dealt out to the shards
    files: tuple[PackedShard, ...] = ()  # empty until all are there and verified

    def to_json(self) -> str:
        """Write it as text."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n"


def read_pack(folder: Path) -> PackFile | None:
    """Read the `pack.json` of a folder; None where there is none.

    Raises:
        DataError: it cannot be read.
    """
    path = folder / NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{printable(str(path))}: {error.strerror}") from error
    return parse_pack(text, str(path))


def parse_pack(text: bytes, place: str) -> PackFile:
    """Read the content of a `pack.json`; `place` says where it is from, for messages.

    Raises:
        DataError: it is damaged, or of another version.
    """
    try:
        found = json.loads(text)
        files = tuple(
            PackedShard(str(file["name"]), int(file["images"]), int(file["bytes"]), file["sha256"])
            for file in found["files"]
        )
        pack = PackFile(
            source=str(found["source"]),
            images=int(found["images"]),
            shards=int(found["shards"]),
            order="shuffled" if found["order"] == "shuffled" else "source",
            files=files,
        )
        is_ours = found["format"] == _FORMAT
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{printable(place)} is damaged") from error
    if not is_ours:
        raise DataError(f"{printable(place)} was written by another version")
    if len(files) not in (0, pack.shards):
        raise DataError(f"{printable(place)} is damaged: it lists {counted(len(files), 'shard')}")
    return pack


def check_complete(folder: Path, sizes: dict[str, int]) -> None:
    """Refuse a folder whose pack was not finished, or from which shards are missing.

    Args:
        folder: the folder.
        sizes: bytes of each shard that is there, by name.

    Raises:
        DataError: a shard is missing, or has another size than when it was packed.
    """
    pack = read_pack(folder)
    if pack is None:
        return
    shown = printable(str(folder))
    if not pack.files:
        raise DataError(f"{shown}: packing was not finished; run `bigsimclr data pack` again")
    _refuse(shown, "not there", (file.name for file in pack.files if file.name not in sizes))
    _refuse(
        shown,
        "not as long as when they were packed",
        (file.name for file in pack.files if sizes[file.name] != file.bytes),
    )


def _refuse(shown: str, what: str, names: Iterable[str]) -> None:
    found = list(names)
    if found:
        raise DataError(
            f"{shown}: {counted(len(found), 'shard')} of the pack {what}: {some(found)}; copy"
            " them again, or remove pack.json to read what there is"
        )

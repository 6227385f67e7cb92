"""Images packed into tar shards: the encoded bytes unchanged, resumable, and read back.

Image `n` of a source becomes `00000000n.jpg` (or its own format), with `.cls` where it has a label,
and `.json` with its name, its class and the sha256 of its bytes. Which shard it goes into depends
on the order of the source alone, so that a killed run continues where it was.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from bigsimclr.data import Source
from bigsimclr.data.names import counted, printable, some
from bigsimclr.data.pack_file import NAME, PackedShard, PackFile, read_pack
from bigsimclr.data.shard_index import IMAGE_SUFFIXES, dali_index, index_shard, split_name
from bigsimclr.data.tar_members import (
    BLOCK,
    OtherMember,
    TarFile,
    open_regular,
    read_at,
    tar_header,
    tar_padding,
)
from bigsimclr.data.tasks import run_tasks
from bigsimclr.errors import DataError, StorageError
from bigsimclr.randomness import Stream, permuted
from bigsimclr.storage import flush_folder, publish, whole_file

logger = logging.getLogger(__name__)

Integers = NDArray[np.int64]

_LOCK: Final = ".pack.lock"
_OVERHEAD: Final = 6 * BLOCK  # of an image: headers, and what fills up the members' last blocks
_OWN: Final = re.compile(r"shard-(\d{6})\.(?:tar|tar\.index|idx)")
_LEFT_OVER: Final = re.compile(rf"\.(?:{_OWN.pattern}|pack\.json)\.[0-9a-f]+\.tmp")
_BEGINNINGS: Final = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"P5", "ppm"),
    (b"P6", "ppm"),
)


class Packable(Source, Protocol):
    """A source of encoded images."""

    @property
    def encoded_bytes(self) -> int:
        """Bytes of all images together, at least nearly."""
        ...


@dataclass(frozen=True)
class Progress:
    """How far a pack has come."""

    doing: Literal["packed", "verified"]
    shards: int  # done
    of: int
    images: int  # done in this run
    bytes: int  # done in this run


@dataclass(frozen=True)
class _Job:
    """What every process that packs knows."""

    source: Packable
    folder: Path
    plan: PackFile
    known: Mapping[str, str] = field(default_factory=dict)  # sha256 of each shard, by its name

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.tar"

    def images(self, shard: int) -> Integers:
        """Return the images of a shard, ascending by index in the source."""
        count, shards = self.plan.images, self.plan.shards
        places = np.arange(shard * count // shards, (shard + 1) * count // shards, dtype=np.int64)
        if self.plan.order == "source":
            return places
        return np.sort(permuted(0, 0, places, count, stream=Stream.PACK))


def pack(
    source: Packable,
    folder: Path,
    *,
    shard_bytes: int = 256 << 20,
    shuffled: bool = True,
    workers: int = 1,
    report: Callable[[Progress], None] = lambda _: None,
) -> PackFile:
    """Pack a source into shards, or continue, and verify every shard.

    Args:
        source: the images.
        folder: where the shards go: a new or empty folder, or one with a part of this pack.
        shard_bytes: size that shards come near to.
        shuffled: deal the images out to the shards at random, always in the same way, so that
            every shard has images of all classes; else in the source's order.
        workers: processes.
        report: told of every shard.

    Raises:
        StorageError: the folder holds something else, another process packs into it, or it cannot
            be written.
        DataError: an image cannot be read, or a shard is not what was packed.
    """
    total = source.encoded_bytes + len(source) * _OVERHEAD
    plan = PackFile(
        source=source.fingerprint,
        images=len(source),
        shards=min(max(1, round(total / shard_bytes)), len(source)),
        order="shuffled" if shuffled else "source",
    )
    job = _Job(source, folder, plan)
    with _held(folder) as lock:
        job = replace(job, known=_begin(job))
        missing = [number for number in range(plan.shards) if not job.path(number).exists()]
        done = Progress("packed", plan.shards - len(missing), plan.shards, 0, 0)
        for shard in run_tasks(_write, job, missing, workers=workers, closed=(lock,)):
            done = _told(done, shard, report)
        flush_folder(folder)
        files: list[PackedShard] = []
        done = Progress("verified", 0, plan.shards, 0, 0)
        everything = range(plan.shards)
        for shard in run_tasks(_verified, job, everything, workers=workers, closed=(lock,)):
            files.append(shard)
            done = _told(done, shard, report)
        finished = replace(plan, files=tuple(sorted(files, key=lambda file: file.name)))
        publish(folder / NAME, finished.to_json())
        flush_folder(folder)
    return finished


def _told(done: Progress, shard: PackedShard, report: Callable[[Progress], None]) -> Progress:
    done = replace(
        done,
        shards=done.shards + 1,
        images=done.images + shard.images,
        bytes=done.bytes + shard.bytes,
    )
    report(done)
    return done


@contextmanager
def _held(folder: Path) -> Iterator[int]:
    """Make the folder, and keep other processes from packing into it by a lock on a descriptor."""
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{printable(str(folder))} is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / NAME).exists():
            _refuse_strangers(folder, 0)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        shown = printable(str(folder))
        raise StorageError(f"{shown} cannot be written: {error.strerror}") from error
    try:
        _lock(lock, folder)
        yield lock
        (folder / _LOCK).unlink(missing_ok=True)
    finally:
        os.close(lock)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError(
            f"another process is packing into {printable(str(folder))}; wait for it"
        ) from None
    except OSError as error:
        logger.info("%s has no locks: %s", printable(str(folder)), error.strerror)


def _begin(job: _Job) -> dict[str, str]:
    """See that the folder holds this pack or nothing, and write down what it is going to hold.

    Returns:
        The sha256 of each shard by its name, where the pack was complete before.
    """
    folder, plan = job.folder, job.plan
    for beside in folder.glob(".*.tmp"):
        if _LEFT_OVER.fullmatch(beside.name):
            beside.unlink()
    before = read_pack(folder)
    if before is None:
        _refuse_strangers(folder, 0)
        publish(folder / NAME, plan.to_json())
        flush_folder(folder)
        return {}
    if replace(before, files=()) != plan:
        what = "of other images" if before.source != plan.source else "cut otherwise"
        raise StorageError(
            f"{printable(str(folder))} holds a pack {what} ({before.images:,} images in"
            f" {counted(before.shards, 'shard')}, order {printable(before.order)}); this one has"
            f" {plan.images:,} in {plan.shards}, order {plan.order}: name another folder"
        )
    _refuse_strangers(folder, plan.shards)
    return {file.name: file.sha256 for file in before.files}


def _refuse_strangers(folder: Path, shards: int) -> None:
    """Refuse a folder with visible files that are not those of a pack of so many shards."""
    strangers = sorted(
        entry.name
        for entry in folder.iterdir()
        if not entry.name.startswith(".") and not _is_own(entry.name, shards)
    )
    if strangers:
        raise StorageError(
            f"{printable(str(folder))} holds other files: {some(strangers)}; name a new folder"
        )


def _is_own(name: str, shards: int) -> bool:
    own = _OWN.fullmatch(name)
    return name == NAME or (own is not None and int(own[1]) < shards)


def _write(job: _Job, shard: int) -> PackedShard:
    """Write one shard whole."""
    path, images = job.path(shard), job.images(shard)
    with whole_file(path, overwrite=False) as beside, beside.open("wb") as file:
        for index in images.tolist():
            for name, content in _members(job.source, index):
                file.write(tar_header(name, len(content)))
                file.write(content)
                file.write(tar_padding(len(content)))
        file.write(bytes(2 * BLOCK))
        size = file.tell()
    return PackedShard(path.name, len(images), size, "")


def _members(source: Source, index: int) -> Iterator[tuple[str, bytes]]:
    """Yield the members of one image, by name."""
    name = source.name(index)
    try:
        content = source.read(index).image
    except (OSError, DataError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{printable(name)} cannot be read: {printable(text)}") from error
    if not isinstance(content, bytes):
        raise DataError(f"{printable(name)} is no encoded image; only those are packed")
    key, label = f"{index:09d}", int(source.labels[index])
    yield f"{key}.{_suffix(name, content)}", content
    facts: dict[str, object] = {"name": name, "sha256": hashlib.sha256(content).hexdigest()}
    if label >= 0:
        yield f"{key}.cls", str(label).encode()
        facts |= {"label": label, "class": source.classes[label]}
    yield f"{key}.json", json.dumps(facts).encode()


def _suffix(name: str, content: bytes) -> str:
    """Name an image's format by how it begins; damaged ones by their name."""
    for beginning, suffix in _BEGINNINGS:
        if content.startswith(beginning):
            return suffix
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    suffix = name.rpartition(".")[2].lower()
    return suffix if suffix in IMAGE_SUFFIXES else "jpg"


def _verified(job: _Job, shard: int) -> PackedShard:
    """Read a shard back, compare all that can be compared, and write its indexes."""
    path, images = job.path(shard), job.images(shard).tolist()
    try:
        return _compared(job, path, images)
    except OSError as error:
        shown = printable(str(path))
        raise StorageError(f"{shown} cannot be read back: {error.strerror}") from error


def _compared(job: _Job, path: Path, images: list[int]) -> PackedShard:
    found, _ = index_shard(path, afresh=True)
    source = job.source
    expected = [(f"{index:09d}", source.name(index), int(source.labels[index])) for index in images]
    if list(zip(found.keys, found.names, found.labels.tolist(), strict=True)) != expected:
        raise _changed(path, "holds other images than were packed")
    with path.open("rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest()
    damaged = _damaged_images(path)
    if damaged:
        raise _changed(path, f"has damaged images: {some(damaged)}")
    if job.known.get(path.name, whole) != whole:
        raise _changed(path, "is not the file that was verified before")
    publish(path.with_suffix(".idx"), dali_index(path))
    return PackedShard(path.name, len(images), found.bytes, whole)


def _damaged_images(path: Path) -> list[str]:
    """List the keys of images whose bytes have another hash than the one stored beside them."""
    descriptor, size = open_regular(path)
    try:
        hashes: dict[str, list[str]] = {}
        for member in TarFile(descriptor, size, path.name).members():
            if isinstance(member, OtherMember):
                continue
            key, suffix = split_name(member.name)
            if suffix == "cls":
                continue
            content = read_at(descriptor, member.offset, member.size)
            digest = hashlib.sha256(content).hexdigest()
            if suffix == "json":
                digest = _noted_digest(content)
            hashes.setdefault(key, []).append(digest)
    finally:
        os.close(descriptor)
    return [key for key, both in hashes.items() if len(both) != 2 or both[0] != both[1]]


def _noted_digest(content: bytes) -> str:
    """Return the hash of an image that is noted beside it; nothing where that is damaged."""
    try:
        return str(json.loads(content)["sha256"])
    except (LookupError, RecursionError, TypeError, ValueError):
        return ""


def _changed(path: Path, what: str) -> DataError:
    return DataError(f"{printable(str(path))} {what}; remove it and pack again")

"""Open every image once: what is broken, of which kinds the images are, and which are copies."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from bigsimclr.data import Choosy, Source, Splits
from bigsimclr.data.alike import Look, find_twins, look_of
from bigsimclr.data.decode import UnreadableImageError, decode, read_header
from bigsimclr.data.listing import SUFFIXES
from bigsimclr.data.processes import in_processes
from bigsimclr.data.stored import stored_image

MOST_DIFFERING_BITS: Final = 4
"""Photographs compressed again, resized or brightened differ in 4 bits of 64 at most; of half a
million pairs of different photographs the closest differ in 12."""

Part = Literal["train", "held out"]
Integers = NDArray[np.int64]

_SUFFIXES: Final = {
    "JPEG": {".jpg", ".jpeg", ".jfif", ".mpo"},
    "MPO": {".jpg", ".jpeg", ".jfif", ".mpo"},
    "PNG": {".png"},
    "WEBP": {".webp"},
    "BMP": {".bmp"},
    "PPM": {".ppm", ".pgm"},
    "TIFF": {".tif", ".tiff"},
    "GIF": {".gif"},
}


@dataclass(frozen=True)
class Broken:
    """An image that cannot be read."""

    part: Part
    name: str
    reason: str


@dataclass(frozen=True)
class Copy:
    """An image that is, or looks like, a training image."""

    name: str
    of: str  # the training image; for a training image, an earlier one
    bits: int | None  # in which the two perceptual hashes differ; None: the same bytes
    is_same_class: bool  # or one of them has none


@dataclass(frozen=True)
class Spread:
    """The middle and the ends of some numbers."""

    least: int
    median: float
    most: int


@dataclass(frozen=True)
class Group:
    """The training images or the held-out ones."""

    images: int
    bytes: int  # of all encoded images that were read
    classes: dict[str, int]  # images of each class, broken ones counted
    fingerprint: str


@dataclass(frozen=True)
class Scan:
    """What was found; the same whatever the number of processes."""

    train: Group
    held_out: Group | None
    broken: tuple[Broken, ...]
    skipped: dict[str, int]  # suffix -> files that were not taken for images, most frequent first
    formats: dict[str, int]  # most frequent first
    modes: dict[str, int]
    traits: dict[str, int]
    width: Spread | None  # pixels; None where no image could be read
    height: Spread | None
    bytes: Spread | None  # of one encoded image
    copies: tuple[Copy, ...]  # training images with the bytes of an earlier one
    alike: tuple[Copy, ...]  # training images that look like an earlier one
    leaks: tuple[Copy, ...]  # held-out images with the bytes of a training image
    leaks_alike: tuple[Copy, ...]  # held-out images that look like a training image
    not_compared: int  # images too small or too plain to tell by their look

    @property
    def is_clean(self) -> bool:
        """Say whether every image can be read and no held-out image is among the training ones."""
        return not (self.broken or self.leaks or self.leaks_alike)


def scan(
    splits: Splits,
    *,
    max_pixels: int,
    workers: int = 0,
    most_differing_bits: int = MOST_DIFFERING_BITS,
    tell: Callable[[int], None] = lambda _: None,
) -> Scan:
    """Open every image of a data set.

    About 340 bytes are kept of each image; a process holds one decoded image at a time.

    Args:
        splits: the images.
        max_pixels: images that declare more are broken.
        workers: processes; 0 works in this one.
        most_differing_bits: images alike differ in as many bits of 64, or fewer.
        tell: is told the number of images done, after each.

    Raises:
        DataError: processes die without having worked.
    """
    every = _Everything(splits, max_pixels)
    found = _Found(len(every))
    looks = in_processes(every.look, len(every), workers=workers, on_death=_killed)
    for done, (number, seen) in enumerate(looks, start=1):
        found.add(number, seen)
        tell(done)
    copies, alike = _copies(every, found, most_differing_bits)
    train = len(splits.train)
    readable = found.sizes[found.sizes[:, 0] > 0]
    return Scan(
        train=_group(splits.train, found.bytes[:train]),
        held_out=None if splits.held_out is None else _group(splits.held_out, found.bytes[train:]),
        broken=(*_left_out(splits), *(every.broken(*entry) for entry in found.reasons())),
        skipped=_skipped(splits),
        formats=dict(found.formats.most_common()),
        modes=dict(found.modes.most_common()),
        traits=dict(found.traits.most_common()),
        width=spread(readable[:, 1]),
        height=spread(readable[:, 0]),
        bytes=spread(found.bytes[found.sizes[:, 0] > 0]),
        copies=tuple(copy for number, copy in copies if number < train),
        alike=tuple(copy for number, copy in alike if number < train),
        leaks=tuple(copy for number, copy in copies if number >= train),
        leaks_alike=tuple(copy for number, copy in alike if number >= train),
        not_compared=int((found.has_digest & ~found.has_hash).sum()),
    )


def spread(values: NDArray[np.integer]) -> Spread | None:
    """Return the least, the median and the most of some numbers [N]; None where there are none."""
    if not len(values):
        return None
    return Spread(int(values.min()), float(np.median(values)), int(values.max()))


def class_counts(source: Source) -> dict[str, int]:
    """Count the images of each class."""
    shown = source.labels[source.labels >= 0]
    counts = np.bincount(shown, minlength=len(source.classes))
    return dict(zip(source.classes, counts.tolist(), strict=True))


@dataclass(frozen=True)
class _Seen:
    """What is kept of one image."""

    reason: str = ""  # why it cannot be read; "" where it can
    digest: bytes = b""  # sha256 of what is stored; empty where it cannot be read or decoded
    look: Look | None = None  # None where it is too small or too plain
    size: tuple[int, int] = (0, 0)  # height, width
    bytes: int = 0
    format: str = ""
    mode: str = ""
    traits: tuple[str, ...] = ()


def _killed(number: int, reason: str) -> _Seen:  # noqa: ARG001 - the caller knows the number
    return _Seen(reason=reason)


class _Everything:
    """The training images, and behind them the held-out ones."""

    def __init__(self, splits: Splits, max_pixels: int) -> None:
        self.train, self.held_out = splits.train, splits.held_out
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.train) + (0 if self.held_out is None else len(self.held_out))

    def at(self, number: int) -> tuple[Part, Source, int]:
        if self.held_out is None or number < len(self.train):
            return "train", self.train, number
        return "held out", self.held_out, number - len(self.train)

    def name(self, number: int) -> str:
        _, source, index = self.at(number)
        return source.name(index)

    def class_name(self, number: int) -> str:
        _, source, index = self.at(number)
        label = int(source.labels[index])
        return source.classes[label] if 0 <= label < len(source.classes) else ""

    def broken(self, number: int, reason: str) -> Broken:
        part, source, index = self.at(number)
        return Broken(part, source.name(index), reason)

    def look(self, number: int) -> _Seen:
        _, source, index = self.at(number)
        try:
            stored = stored_image(source, index)
        except UnreadableImageError as error:
            return _Seen(reason=str(error))
        if isinstance(stored, np.ndarray):
            content, header = np.ascontiguousarray(stored).tobytes(), None
            shape = repr(stored.shape).encode()
        else:
            content, header = stored, read_header(stored)
            shape = b""
        try:
            pixels = decode(stored, max_pixels=self.max_pixels)
        except UnreadableImageError as error:
            return _Seen(reason=str(error), bytes=len(content))
        traits: list[str] = []
        if header is not None:
            # An image within a file of many has none of its own.
            suffix = PurePosixPath(source.name(index)).suffix.lower()
            own = _SUFFIXES.get(header.format, {suffix})
            traits = [
                name
                for name, holds in (
                    ("16 bits or more", header.is_wide),
                    ("turned by EXIF", header.is_turned),
                    ("several frames", header.has_frames),
                    ("colour profile", header.has_profile),
                    ("wrong suffix", suffix in SUFFIXES and suffix not in own),
                )
                if holds
            ]
        return _Seen(
            digest=hashlib.sha256(shape + content).digest(),
            look=look_of(pixels),
            size=(pixels.shape[0], pixels.shape[1]),
            bytes=len(content),
            format="array" if header is None else header.format,
            mode="RGB" if header is None else header.mode,
            traits=tuple(traits),
        )


class _Found:
    """What is kept of N images, in a few arrays."""

    def __init__(self, images: int) -> None:
        self.digests = np.zeros((images, 4), np.uint64)
        self.has_digest = np.zeros(images, np.bool_)
        self.hashes = np.zeros(images, np.uint64)
        self.has_hash = np.zeros(images, np.bool_)
        self.pictures = np.zeros((images, 256), np.uint8)
        self.sizes = np.zeros((images, 2), np.int32)
        self.bytes = np.zeros(images, np.int64)
        self.formats: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        self.traits: Counter[str] = Counter()
        self._reasons: dict[int, str] = {}

    def add(self, number: int, seen: _Seen) -> None:
        self.bytes[number] = seen.bytes
        if seen.reason:
            self._reasons[number] = seen.reason
            return
        self.digests[number] = np.frombuffer(seen.digest, np.uint64)
        self.has_digest[number] = True
        self.sizes[number] = seen.size
        if seen.look is not None:
            self.hashes[number] = seen.look.hash
            self.pictures[number] = np.frombuffer(seen.look.picture, np.uint8)
            self.has_hash[number] = True
        self.formats[seen.format] += 1
        self.modes[seen.mode] += 1
        self.traits.update(seen.traits)

    def reasons(self) -> list[tuple[int, str]]:
        return sorted(self._reasons.items())


def _copies(
    every: _Everything, found: _Found, most: int
) -> tuple[list[tuple[int, Copy]], list[tuple[int, Copy]]]:
    """Find images with the bytes of a training image, and those that merely look like one."""
    train = len(every.train)
    first = _first_of_each(found.digests, found.has_digest)
    # The first of its kind is held out only where no training image is of that kind.
    has_original = (first >= 0) & (first < train) & (first != np.arange(len(first)))
    twins = find_twins(found.hashes, found.has_hash, found.pictures, train=train, most=most)
    resembling = (twins.twin >= 0) & ~has_original

    def is_same_class(number: int, other: int) -> bool:
        names = every.class_name(number), every.class_name(other)
        return names[0] == names[1] or "" in names

    def listed(
        which: NDArray[np.bool_], of: Integers, bits: Integers | None
    ) -> list[tuple[int, Copy]]:
        return [
            (
                number,
                Copy(
                    name=every.name(number),
                    of=every.name(int(of[number])),
                    bits=None if bits is None else int(bits[number]),
                    is_same_class=is_same_class(number, int(of[number])),
                ),
            )
            for number in np.flatnonzero(which).tolist()
        ]

    return listed(has_original, first, None), listed(resembling, twins.twin, twins.distance)


def _first_of_each(digests: NDArray[np.uint64], has_digest: NDArray[np.bool_]) -> Integers:
    """For each of N digests [N, 4], find the first that equals it; -1 where there is no digest."""
    known = np.flatnonzero(has_digest)
    order = known[np.lexsort((known, *digests[known].T))]
    ordered = digests[order]
    starts = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])[: len(order)]
    first = np.full(len(digests), -1, np.int64)
    first[order] = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
    return first


def _group(source: Source, lengths: Integers) -> Group:
    return Group(
        images=len(source),
        bytes=int(lengths.sum()),
        classes=class_counts(source),
        fingerprint=source.fingerprint,
    )


def _left_out(splits: Splits) -> list[Broken]:
    """List entries that are no files. Two parts of one folder know the same ones."""
    train, held_out = splits.train, splits.held_out
    lost = {"train": train.left_out} if isinstance(train, Choosy) else {}
    if isinstance(held_out, Choosy) and held_out.left_out is not lost.get("train"):
        lost["held out"] = held_out.left_out
    parts: tuple[Part, Part] = ("train", "held out")
    return [
        Broken(part, name, reason)
        for part in parts
        for name, reason in sorted(lost.get(part, {}).items())
    ]


def _skipped(splits: Splits) -> dict[str, int]:
    """Count files that were passed by. Two parts of one folder know the same ones."""
    parts = [part for part in (splits.train, splits.held_out) if isinstance(part, Choosy)]
    counts = {id(part.skipped): part.skipped for part in parts}
    total: Counter[str] = Counter()
    for skipped in counts.values():
        total.update(skipped)
    return dict(total.most_common())

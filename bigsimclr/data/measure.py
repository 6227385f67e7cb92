"""Count and measure the images of a data set: sizes, colours, and how fast they decode here."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from bigsimclr.data import Source, Splits
from bigsimclr.data.decode import UnreadableImageError, decode
from bigsimclr.data.processes import in_processes
from bigsimclr.data.scan import Spread, class_counts, spread
from bigsimclr.data.stored import stored_image
from bigsimclr.errors import DataError

_BAND: Final = 1 << 20  # pixels whose squares are summed at a time, which bounds the memory

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Statistics:
    """What the training images are like.

    Attributes:
        images: Training images.
        held_out: Held-out images; they are not measured.
        measured: Images that were read and decoded; those that cannot be are left out.
        unreadable: Images that cannot be read or decoded, of those that were tried.
        bytes: Of all measured images as they are stored.
        width: Pixels.
        height: Pixels.
        size: Bytes of one stored image.
        classes: Training images of each class.
        mean: Red, green and blue in [0, 1], over all pixels of all measured images.
        deviation: Standard deviation of the same.
        decode_seconds: Time of one core that decoding took, reading not counted; 0 where the
            source holds pixels already.
        read_seconds: Time of one core that reading took, waiting for the disk not counted.
        fingerprint: Of the training images.
        held_out_fingerprint: Of the held-out images; empty where there are none.
    """

    images: int
    held_out: int
    measured: int
    unreadable: int
    bytes: int
    width: Spread
    height: Spread
    size: Spread
    classes: dict[str, int]
    mean: Channels
    deviation: Channels
    decode_seconds: float
    read_seconds: float
    fingerprint: str
    held_out_fingerprint: str

    @property
    def decoded_per_core_second(self) -> float | None:
        """Images that one core decodes in a second; None where nothing is decoded."""
        return self.measured / self.decode_seconds if self.decode_seconds else None


def measure(
    splits: Splits,
    *,
    max_pixels: int,
    sample: int | None = None,
    workers: int = 0,
    tell: Callable[[int], None] = lambda _: None,
) -> Statistics:
    """Measure the training images of a data set.

    Sums are whole numbers, so that the result does not depend on the order of the images.

    Args:
        splits: the images.
        max_pixels: images that declare more cannot be read.
        sample: images to measure, at equal distances; None measures all.
        workers: processes; 0 works in this one.
        tell: is told the number of images done, after each.

    Raises:
        DataError: no image can be read.
    """
    source = splits.train
    count = len(source) if sample is None else min(sample, len(source))
    chosen = np.linspace(0, len(source) - 1, count).round().astype(np.int64)

    def look(number: int) -> _Look | None:
        return _look(source, int(chosen[number]), max_pixels)

    total = _Total(count)
    found = in_processes(look, count, workers=workers, on_death=lambda _number, _reason: None)
    for done, (number, one) in enumerate(found, start=1):
        if one is not None:
            total.add(number, one)
        tell(done)
    known = total.bytes > 0
    width, height = spread(total.sizes[known, 1]), spread(total.sizes[known, 0])
    size = spread(total.bytes[known])
    if width is None or height is None or size is None:
        raise DataError(f"none of {count} images can be read; bigsimclr data scan says why")
    return Statistics(
        images=len(source),
        held_out=0 if splits.held_out is None else len(splits.held_out),
        measured=int(known.sum()),
        unreadable=count - int(known.sum()),
        bytes=int(total.bytes.sum()),
        width=width,
        height=height,
        size=size,
        classes=class_counts(source),
        mean=total.mean(),
        deviation=total.deviation(),
        decode_seconds=total.decode_nanoseconds / 1e9,
        read_seconds=total.read_nanoseconds / 1e9,
        fingerprint=source.fingerprint,
        held_out_fingerprint="" if splits.held_out is None else splits.held_out.fingerprint,
    )


@dataclass(frozen=True)
class _Look:
    """What is kept of one image."""

    size: tuple[int, int]  # height, width
    bytes: int
    sums: tuple[int, ...]  # of the red, green and blue values
    squares: tuple[int, ...]
    read_nanoseconds: int
    decode_nanoseconds: int


def _look(source: Source, index: int, max_pixels: int) -> _Look | None:
    start = time.thread_time_ns()
    try:
        stored = stored_image(source, index)
        read = time.thread_time_ns()
        pixels = decode(stored, max_pixels=max_pixels)
    except UnreadableImageError:
        return None
    decoded = time.thread_time_ns()
    is_encoded = isinstance(stored, bytes)
    flat = pixels.reshape(-1, 3)
    sums, squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
    for begin in range(0, len(flat), _BAND):
        band = flat[begin : begin + _BAND].astype(np.int64)
        sums += band.sum(axis=0)
        squares += (band * band).sum(axis=0)
    return _Look(
        size=(pixels.shape[0], pixels.shape[1]),
        bytes=len(stored) if isinstance(stored, bytes) else stored.nbytes,
        sums=tuple(sums.tolist()),
        squares=tuple(squares.tolist()),
        read_nanoseconds=read - start,
        decode_nanoseconds=decoded - read if is_encoded else 0,
    )


class _Total:
    """Sums over images, in whole numbers of any length."""

    def __init__(self, images: int) -> None:
        self.sizes = np.zeros((images, 2), np.int32)
        self.bytes = np.zeros(images, np.int64)
        self.read_nanoseconds = self.decode_nanoseconds = 0
        self._pixels = 0
        self._sums = [0, 0, 0]
        self._squares = [0, 0, 0]

    def add(self, number: int, look: _Look) -> None:
        self.sizes[number], self.bytes[number] = look.size, look.bytes
        self.read_nanoseconds += look.read_nanoseconds
        self.decode_nanoseconds += look.decode_nanoseconds
        self._pixels += look.size[0] * look.size[1]
        self._sums = [a + b for a, b in zip(self._sums, look.sums, strict=True)]
        self._squares = [a + b for a, b in zip(self._squares, look.squares, strict=True)]

    def mean(self) -> Channels:
        red, green, blue = (total / (255 * self._pixels) for total in self._sums)
        return red, green, blue

    def deviation(self) -> Channels:
        # n x (sum of squares) - (sum)^2 is exact in whole numbers, where floats would cancel.
        red, green, blue = (
            (self._pixels * square - total * total) ** 0.5 / (255 * self._pixels)
            for total, square in zip(self._sums, self._squares, strict=True)
        )
        return red, green, blue

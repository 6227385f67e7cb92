"""Read, decode and crop a chunk of images; this is what worker processes do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from bigsimclr.augment import ViewSettings
from bigsimclr.augment.draws import Draws, centre_draws, draw_views
from bigsimclr.augment.host import crop_resize_one
from bigsimclr.data import Source
from bigsimclr.data.decode import Jpeg, UnreadableImageError, decode, decode_unless_plain
from bigsimclr.data.names import printable
from bigsimclr.data.order import AnyOrder, Cut
from bigsimclr.data.slots import Slots
from bigsimclr.data.stored import stored_image
from bigsimclr.errors import BigSimCLRError

Integers = NDArray[np.int64]
T = TypeVar("T")

_MOST_SUBSTITUTES = 100  # tries before an image is given up; each try is another image
_HELD_PIXELS = 1 << 24  # held at once while a chunk is read, encoded or decoded (48 MiB)


@dataclass(frozen=True)
class Chunk:
    """What is known of some images of a batch whose crops were written where they were wanted."""

    draws: Draws
    labels: Integers  # [b]
    indices: Integers  # [b] images shown, by their index in the source
    unreadable: dict[str, str] = field(default_factory=dict)  # name -> reason
    failure: str = ""  # why nothing could be read; then the chunk is empty

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Reading:
    """How images are read and cropped, in training and in evaluation."""

    source: Source
    order: AnyOrder | None  # None: positions count through `indices` and nothing is random
    indices: Integers  # [M]
    labels: Integers  # [N] by index in the source
    settings: ViewSettings
    views: int
    max_pixels: int
    turbo: bool = False  # whether libjpeg-turbo itself decodes plain JPEGs


class ChunkReader(Dataset[Chunk]):
    """Chunks by number; holds nothing that a worker process changes but its slots.

    Args:
        reading: how images are read.
        cut: which images a chunk shows.
        count: chunks there are.
        slots: where worker processes write crops.
    """

    def __init__(self, reading: Reading, cut: Cut, count: int, slots: Slots | None) -> None:
        self.reading = reading
        self.cut = cut
        self.count = count
        self.slots = slots

    def __len__(self) -> int:
        return self.count

    @override
    def __getitem__(self, number: int) -> Chunk:
        """Read chunk `number` into its part of its step's slot."""
        if self.slots is None:
            raise AssertionError("only worker processes ask for items, and they have slots")
        step, piece = divmod(number, self.cut.chunks_per_step)
        return self.read(number, self.slots.of(step)[:, piece * self.cut.chunk :])

    @torch.inference_mode()
    def read(self, number: int, out: Tensor) -> Chunk:
        """Read chunk `number`; errors meant for the user come back as text, not as exceptions.

        An exception that crosses a process border arrives with the worker's traceback in front.

        Args:
            number: counted from the first step's first chunk.
            out: float32 [V, n, 3, H, W] with n at least the chunk's images; the first of them are
                filled.
        """
        reading, positions = self.reading, self.cut.piece(number)
        try:
            try:
                return _read_chunk(reading, positions, out, late=True)
            except UnreadableImageError:
                return _read_chunk(reading, positions, out, late=False)
        except BigSimCLRError as error:
            return nothing(reading, str(error))


def nothing(reading: Reading, failure: str) -> Chunk:
    """Describe a chunk of which nothing could be read."""
    return described(reading, [], draws_for(reading, [], []), {}, failure=failure)


def image_at(
    source: Source, index: int, *, max_pixels: int, turbo: bool = False
) -> NDArray[np.uint8]:
    """Read and decode one image to uint8 [h, w, 3].

    Raises:
        UnreadableImageError: it cannot be read or decoded.
    """
    image = image_or_jpeg_at(source, index, max_pixels=max_pixels)
    return _pixels(image, max_pixels=max_pixels, turbo=turbo)


def image_or_jpeg_at(source: Source, index: int, *, max_pixels: int) -> NDArray[np.uint8] | Jpeg:
    """Read one image, and decode it unless it is a plain JPEG.

    Raises:
        UnreadableImageError: it cannot be read or decoded.
    """
    return decode_unless_plain(stored_image(source, index), max_pixels=max_pixels)


def _pixels(image: NDArray[np.uint8] | Jpeg, *, max_pixels: int, turbo: bool) -> NDArray[np.uint8]:
    if not isinstance(image, Jpeg):
        return image
    if turbo:
        from bigsimclr.data.turbo import decode_plain

        pixels = decode_plain(image)
        if pixels is not None:
            return pixels
    return decode(image.encoded, max_pixels=max_pixels)


def wanted(reading: Reading, positions: Integers) -> list[tuple[int, int]]:
    """Return epoch and index of the images that belong to some positions."""
    if reading.order is None:
        epochs, indices = np.zeros_like(positions), reading.indices[positions]
    else:
        epochs, indices = reading.order.at(positions)
    return list(zip(epochs.tolist(), indices.tolist(), strict=True))


def readable(
    reading: Reading,
    read: Callable[[int], T],
    *,
    epoch: int,
    index: int,
    unreadable: dict[str, str],  # name -> reason; what cannot be read is added
) -> tuple[int, T] | None:
    """Return image `index` or, in training, the first substitute that can be read."""
    shown = index
    for attempt in range(_MOST_SUBSTITUTES):
        try:
            return shown, read(shown)
        except UnreadableImageError as error:
            unreadable[printable(reading.source.name(shown))] = str(error)
        if reading.order is None:
            return None
        shown = reading.order.substitute(epoch=epoch, index=index, attempt=attempt)
    # The caller counts the names found so far against the limit before it misses the image.
    return None


def draws_for(
    reading: Reading, asked: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]]
) -> Draws:
    """Draw the views of some images.

    Args:
        reading: how images are read.
        asked: epoch and index of each image that was asked for: a substitute shows other views
            than it does in its own place, perhaps in the same batch.
        sizes: height and width of each image that is shown.
    """
    measured = np.array(sizes, np.int32).reshape(-1, 2)
    if reading.order is None or not asked:
        return centre_draws(reading.settings, measured)
    epochs, indices = np.array(asked, np.int64).T
    return draw_views(
        reading.settings,
        seed=reading.order.seed,
        epochs=epochs,
        indices=indices,
        sizes=measured,
        views=reading.views,
    )


def crop(
    reading: Reading, image: NDArray[np.uint8], draws: Draws, row: int, *, out: Tensor
) -> None:
    """Cut all views [V, 3, H, W] of one image, whose draws are in one row."""
    for view in range(draws.views):
        crop_resize_one(image, draws.boxes[view, row], reading.settings.resize, out=out[view])


def _read_chunk(reading: Reading, positions: Integers, out: Tensor, *, late: bool) -> Chunk:
    """Read some images, and decode plain JPEGs late: a crop is cheaper of pixels just decoded.

    Views are drawn before that, so nothing can stand any more for a JPEG that turns out to be
    damaged behind its header.

    Raises:
        UnreadableImageError: there is one, and it was to be decoded late.
    """
    shown: list[int] = []
    draws: list[Draws] = []
    unreadable: dict[str, str] = {}
    group = _Group()

    def read(index: int) -> NDArray[np.uint8] | Jpeg:
        if late:
            return image_or_jpeg_at(reading.source, index, max_pixels=reading.max_pixels)
        return image_at(reading.source, index, max_pixels=reading.max_pixels, turbo=reading.turbo)

    def finish_group() -> None:
        own = draws_for(reading, group.asked, [image.shape[:2] for image in group.images])
        for row, image in enumerate(group.images):
            at = len(shown) - len(group.images) + row
            pixels = _pixels(image, max_pixels=reading.max_pixels, turbo=reading.turbo)
            crop(reading, pixels, own, row, out=out[:, at])
        draws.append(own)

    for epoch, index in wanted(reading, positions):
        found = readable(reading, read, epoch=epoch, index=index, unreadable=unreadable)
        if found is None:
            continue
        shown.append(found[0])
        group.add((epoch, index), found[1])
        if group.pixels > _HELD_PIXELS:
            finish_group()
            group = _Group()
    if group.images:
        finish_group()
    drawn = Draws.stack(draws) if draws else draws_for(reading, [], [])
    return described(reading, shown, drawn, unreadable)


class _Group:
    """Images whose views are drawn together."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.images: list[NDArray[np.uint8] | Jpeg] = []
        self.pixels = 0

    def add(self, asked: tuple[int, int], image: NDArray[np.uint8] | Jpeg) -> None:
        self.asked.append(asked)
        self.images.append(image)
        self.pixels += image.shape[0] * image.shape[1]


def described(
    reading: Reading,
    shown: list[int],
    draws: Draws,
    unreadable: dict[str, str],
    *,
    failure: str = "",
) -> Chunk:
    """Say what became of a chunk."""
    indices = np.array(shown, np.int64)
    return Chunk(
        draws=draws,
        labels=reading.labels[indices],
        indices=indices,
        unreadable=unreadable,
        failure=failure,
    )

"""Read, decode and crop a chunk of images; this is what worker processes do."""

from dataclasses import dataclass, field

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
from bigsimclr.data.decode import UnreadableImageError, decode
from bigsimclr.data.names import printable
from bigsimclr.data.order import Cut, Order
from bigsimclr.data.slots import Slots
from bigsimclr.errors import BigSimCLRError

Integers = NDArray[np.int64]

_MOST_SUBSTITUTES = 100  # tries before an image is given up; each try is another image
_DECODED_PIXELS = 1 << 24  # decoded pixels held at once while a chunk is read (48 MiB)
_NO_SIZES = np.empty((0, 2), np.int32)


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
    order: Order | None  # None: positions count through `indices` and nothing is random
    indices: Integers  # [M]
    labels: Integers  # [N] by index in the source
    settings: ViewSettings
    views: int
    max_pixels: int


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
        """Read chunk `number` into its slot."""
        if self.slots is None:
            raise AssertionError("only worker processes ask for items, and they have slots")
        return self.read(number, self.slots.of(number))

    @torch.inference_mode()
    def read(self, number: int, out: Tensor) -> Chunk:
        """Read chunk `number`; errors meant for the user come back as text, not as exceptions.

        An exception that crosses a process border arrives with the worker's traceback in front.

        Args:
            number: counted from the first step's first chunk.
            out: float32 [V, n, 3, H, W] with n at least the chunk's images; the first of them are
                filled.
        """
        try:
            return _read_chunk(self.reading, self.cut.piece(number), out)
        except BigSimCLRError as error:
            return _described(self.reading, [], [], {}, failure=str(error))


def image_at(source: Source, index: int, *, max_pixels: int) -> NDArray[np.uint8]:
    """Read and decode one image to uint8 [h, w, 3].

    Raises:
        UnreadableImageError: it cannot be read or decoded.
    """
    try:
        sample = source.read(index)
    except UnreadableImageError:
        raise
    except (OSError, BigSimCLRError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImageError(printable(text)) from error
    return decode(sample.image, max_pixels=max_pixels)


def _read_chunk(reading: Reading, positions: Integers, out: Tensor) -> Chunk:
    if reading.order is None:
        epochs, wanted = np.zeros_like(positions), reading.indices[positions]
    else:
        epochs, wanted = reading.order.at(positions)
    shown: list[int] = []
    draws: list[Draws] = []
    unreadable: dict[str, str] = {}
    group = _Group()
    for epoch, index in zip(epochs.tolist(), wanted.tolist(), strict=True):
        found = _readable(reading, epoch, index, unreadable)
        if found is None:
            continue
        shown.append(found[0])
        group.add(epoch, index, found[1])
        if group.pixels > _DECODED_PIXELS:
            draws.append(_crop(reading, group, out[:, len(shown) - len(group.images) :]))
            group = _Group()
    if group.images:
        draws.append(_crop(reading, group, out[:, len(shown) - len(group.images) :]))
    return _described(reading, shown, draws, unreadable)


def _readable(
    reading: Reading, epoch: int, index: int, unreadable: dict[str, str]
) -> tuple[int, NDArray[np.uint8]] | None:
    """Return image `index` or, in training, the first substitute that can be read."""
    shown = index
    for attempt in range(_MOST_SUBSTITUTES):
        try:
            return shown, image_at(reading.source, shown, max_pixels=reading.max_pixels)
        except UnreadableImageError as error:
            unreadable[printable(reading.source.name(shown))] = str(error)
        if reading.order is None:
            return None
        shown = reading.order.substitute(epoch=epoch, index=index, attempt=attempt)
    # The caller counts the names found so far against the limit before it misses the image.
    return None


class _Group:
    """Decoded images that are cropped together."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.indices: list[int] = []
        self.images: list[NDArray[np.uint8]] = []
        self.pixels = 0

    def add(self, epoch: int, index: int, image: NDArray[np.uint8]) -> None:
        self.epochs.append(epoch)
        self.indices.append(index)
        self.images.append(image)
        self.pixels += image.shape[0] * image.shape[1]


def _crop(reading: Reading, group: _Group, out: Tensor) -> Draws:
    """Draw views for a group of images, and write their crops to the first images of `out`."""
    sizes = np.array([image.shape[:2] for image in group.images], np.int32)
    if reading.order is None:
        draws = centre_draws(reading.settings, sizes)
    else:
        # Keyed by the image that was asked for: a substitute shows other views than it does in
        # its own place, perhaps in the same batch.
        draws = draw_views(
            reading.settings,
            seed=reading.order.seed,
            epochs=np.array(group.epochs, np.int64),
            indices=np.array(group.indices, np.int64),
            sizes=sizes,
            views=reading.views,
        )
    for row, image in enumerate(group.images):
        for view in range(draws.views):
            crop_resize_one(
                image, draws.boxes[view, row], reading.settings.resize, out=out[view, row]
            )
    return draws


def _described(
    reading: Reading,
    shown: list[int],
    draws: list[Draws],
    unreadable: dict[str, str],
    *,
    failure: str = "",
) -> Chunk:
    indices = np.array(shown, np.int64)
    return Chunk(
        draws=Draws.stack(draws) if draws else centre_draws(reading.settings, _NO_SIZES),
        labels=reading.labels[indices],
        indices=indices,
        unreadable=unreadable,
        failure=failure,
    )

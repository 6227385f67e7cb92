"""Plain JPEGs that the training process decodes, all others as always: what workers do then."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from typing_extensions import override

from bigsimclr.data.chunks import (
    Chunk,
    Integers,
    Reading,
    crop,
    described,
    draws_for,
    image_or_jpeg_at,
    nothing,
    readable,
    wanted,
)
from bigsimclr.data.decode import Jpeg
from bigsimclr.data.order import Cut
from bigsimclr.errors import BigSimCLRError


@dataclass
class LateChunk:
    """Some images of a batch; n of the b are cropped already, the others only read."""

    chunk: Chunk
    jpegs: list[NDArray[np.uint8]] = field(default_factory=list)  # encoded, [bytes] each
    jpeg_rows: list[int] = field(default_factory=list)  # where in the chunk they belong
    crops: list[NDArray[np.float32]] = field(default_factory=list)  # n of [V, 3, H, W]
    crop_rows: list[int] = field(default_factory=list)

    @property
    def boxes(self) -> NDArray[np.int32]:
        """Return the crops [V, b - n, 4] of the JPEGs."""
        return self.chunk.draws.boxes[:, self.jpeg_rows]


class LateReader(Dataset[LateChunk]):
    """Chunks by number, as `ChunkReader` has them, before plain JPEGs are decoded."""

    def __init__(self, reading: Reading, cut: Cut, count: int) -> None:
        self._reading = reading
        self._cut = cut
        self._count = count

    def __len__(self) -> int:
        return self._count

    @override
    @torch.inference_mode()
    def __getitem__(self, number: int) -> LateChunk:
        """Read chunk `number`; errors meant for the user come back as text."""
        try:
            return _read(self._reading, self._cut.piece(number))
        except BigSimCLRError as error:
            return LateChunk(nothing(self._reading, str(error)))


def _read(reading: Reading, positions: Integers) -> LateChunk:
    shown: list[int] = []
    asked: list[tuple[int, int]] = []
    sizes: list[tuple[int, int]] = []
    unreadable: dict[str, str] = {}
    late = LateChunk(nothing(reading, ""))
    read = partial(image_or_jpeg_at, reading.source, max_pixels=reading.max_pixels)
    side = reading.settings.image_size
    for epoch, index in wanted(reading, positions):
        found = readable(reading, read, epoch=epoch, index=index, unreadable=unreadable)
        if found is None:
            continue
        row, image = len(shown), found[1]
        shown.append(found[0])
        asked.append((epoch, index))
        sizes.append(image.shape[:2])
        if isinstance(image, Jpeg):
            late.jpegs.append(np.frombuffer(image.encoded, np.uint8))
            late.jpeg_rows.append(row)
        else:
            # At once and alone, so that no decoded image waits; what is drawn is the same.
            views = torch.empty(reading.views, 3, side, side)
            crop(reading, image, draws_for(reading, asked[-1:], sizes[-1:]), 0, out=views)
            late.crops.append(views.numpy())
            late.crop_rows.append(row)
    late.chunk = described(reading, shown, draws_for(reading, asked, sizes), unreadable)
    return late

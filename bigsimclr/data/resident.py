"""Small data sets whole on the training device: decoded once, then nothing is read or copied.

Shapes: N images of H x W pixels.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from bigsimclr.data import EqualImages, Sample, Source
from bigsimclr.data.chunks import image_at
from bigsimclr.data.decode import UnreadableImageError
from bigsimclr.data.names import printable
from bigsimclr.data.order import Arranged
from bigsimclr.data.workers import from_workers
from bigsimclr.errors import DataError

_KEY = "input.resident"
_PIECE = 512  # images decoded at a time
_AHEAD = 4  # pieces prepared ahead, per worker


class Resident:
    """Show a source whose pixels were decoded and brought to a device.

    Args:
        source: names, labels and classes of the images.
        pixels: [N, H, W, 3] uint8, on any device.
    """

    def __init__(self, source: Source, pixels: Tensor) -> None:
        self._source = source
        self._pixels = pixels
        self.classes = source.classes
        self.labels = source.labels
        self.fingerprint = source.fingerprint
        self.arrangement = source.arrangement if isinstance(source, Arranged) else None
        self.image_size: tuple[int, int] | None = (pixels.shape[1], pixels.shape[2])

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        """Name image `index` as its source does."""
        return self._source.name(index)

    def read(self, index: int) -> Sample:
        """Return image `index`, decoded."""
        image = self._pixels[index].cpu().numpy()
        return Sample(image=image, label=int(self.labels[index]), index=index)

    def gather(self, indices: NDArray[np.int64]) -> Tensor:
        """Return the images of `indices` as one tensor [B, H, W, 3] on the device."""
        rows = torch.from_numpy(indices)
        if self._pixels.is_cuda:
            # Pinned, so that the copy of the numbers does not wait for the device.
            rows = rows.pin_memory().to(self._pixels.device, non_blocking=True)
        return self._pixels.index_select(0, rows)


def make_resident(
    source: Source, *, device: torch.device, workers: int, max_pixels: int
) -> Resident:
    """Decode all images of a source and bring them to a device.

    Args:
        source: images that are all of one size.
        device: where they are kept; 3 x H x W bytes for each.
        workers: processes that decode; 0 decodes in this one.
        max_pixels: images that declare more are refused.

    Raises:
        DataError: an image cannot be read, sizes differ, memory is short, or a worker died.
    """
    if isinstance(source, EqualImages):
        everything = np.arange(len(source), dtype=np.int64)
        return Resident(source, _placed(torch.from_numpy(source.read_many(everything)), device))
    reader = _Decoder(source, max_pixels)
    parts: list[Tensor] = []
    with closing(_pieces(reader, workers)) as pieces:
        for piece in pieces:
            if piece.failure:
                raise DataError(piece.failure)
            shape = piece.pixels.shape[1:]
            if parts and shape != parts[0].shape[1:]:
                raise DataError(_unequal(source, len(parts) * _PIECE, shape, parts[0].shape[1:]))
            parts.append(torch.from_numpy(piece.pixels))
    return Resident(source, _placed(torch.cat(parts), device))


@dataclass(frozen=True)
class _Piece:
    pixels: NDArray[np.uint8]  # [b, H, W, 3]
    failure: str = ""  # why there are none


class _Decoder(Dataset[_Piece]):
    """Pieces of decoded images by number."""

    def __init__(self, source: Source, max_pixels: int) -> None:
        self._source = source
        self._max_pixels = max_pixels

    def __len__(self) -> int:
        return math.ceil(len(self._source) / _PIECE)

    @override
    def __getitem__(self, number: int) -> _Piece:
        """Decode a piece; errors come back as text, since exceptions bring a worker's traceback."""
        images: list[NDArray[np.uint8]] = []
        first = number * _PIECE
        for index in range(first, min(first + _PIECE, len(self._source))):
            try:
                image = image_at(self._source, index, max_pixels=self._max_pixels)
            except UnreadableImageError as error:
                name = printable(self._source.name(index))
                return _failed(f"{_KEY}: {name} cannot be read: {error}; mend it or remove it")
            if images and image.shape != images[0].shape:
                return _failed(_unequal(self._source, index, image.shape, images[0].shape))
            images.append(image)
        return _Piece(np.stack(images))


def _pieces(reader: _Decoder, workers: int) -> Generator[_Piece, None, None]:
    if workers:
        yield from from_workers(reader, len(reader), workers=workers, ahead=_AHEAD * workers)
    else:
        yield from map(reader.__getitem__, range(len(reader)))


def _failed(reason: str) -> _Piece:
    return _Piece(np.empty((0, 0, 0, 3), np.uint8), reason)


def _unequal(source: Source, index: int, found: Sequence[int], first: Sequence[int]) -> str:
    return (
        f"{_KEY}: {printable(source.name(index))} is {found[0]}x{found[1]} where the first image "
        f"is {first[0]}x{first[1]}; only images of one size can be kept on the device: {_KEY}=false"
    )


def _placed(
    pixels: Tensor,  # uint8 [N, H, W, 3]
    device: torch.device,
) -> Tensor:
    try:
        return pixels.to(device)
    except torch.OutOfMemoryError as error:
        raise DataError(
            f"{_KEY}: {pixels.nbytes:,} bytes of images do not fit on {device}; {_KEY}=false"
        ) from error

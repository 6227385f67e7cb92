"""Crops of single images on the host, for sources whose images differ in size."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bigsimclr.augment.resize import Resize, taps


def crop_resize_one(
    image: npt.NDArray[np.uint8],
    box: npt.NDArray[np.int32],
    resize: Resize,
    *,
    out: Tensor,
) -> None:
    """Crop one image and resize the crop.

    Args:
        image: uint8 [h,w,3].
        box: int32 [4], crop as (y, x, height, width) in pixels.
        resize: Which kernel.
        out: float32 [3,H,W] to be filled, nominally in [0, 1] but not clipped: the kernel
            overshoots at edges.
    """
    y, x, height, width = box.tolist()
    channels, rows, columns = out.shape
    pixels = torch.from_numpy(image[y : y + height, x : x + width].astype(np.float32, order="C"))
    vertical, horizontal = _taps(height, rows, resize), _taps(width, columns, resize)
    down = _four_by_four(pixels.view(height, -1), vertical, vertical.weight_of_bytes)
    turned = down.view(rows, width, channels).permute(1, 2, 0).reshape(width, -1)
    across = _four_by_four(turned, horizontal, horizontal.weight)
    out.copy_(across.view(columns, channels, rows).permute(1, 2, 0))


@dataclass(frozen=True)
class _Taps:
    index: Tensor  # int32 [4*size], the rows that are read, four for each output row
    weight: Tensor  # float32 [4*size]
    weight_of_bytes: Tensor  # float32 [4*size], a 255th of it
    first: Tensor  # int32 [size], where the four of an output row begin


def _four_by_four(
    rows: Tensor,  # float32 [length,n]
    chosen: _Taps,
    weight: Tensor,  # float32 [4*size]
) -> Tensor:  # float32 [size,n]
    """Return weighted sums of four rows: an embedding bag, in one pass over memory."""
    sums: Tensor = torch.embedding_bag(
        rows, chosen.index, chosen.first, mode=0, per_sample_weights=weight
    )[0]
    return sums


@lru_cache(maxsize=2048)  # 12 KiB each for views of 224 pixels
def _taps(length: int, size: int, resize: Resize) -> _Taps:
    first, weights = taps(np.array([length], np.int64), size, resize)
    # Weightless taps may lie outside the crop.
    index = np.clip(first[0, :, None] + np.arange(4), 0, length - 1)
    weight = torch.from_numpy(weights.reshape(-1))
    return _Taps(
        index=torch.from_numpy(index.astype(np.int32).reshape(-1)),
        weight=weight,
        weight_of_bytes=weight / 255,
        first=_each_fourth(size),
    )


@lru_cache(maxsize=16)
def _each_fourth(size: int) -> Tensor:
    return torch.arange(0, 4 * size, 4, dtype=torch.int32)

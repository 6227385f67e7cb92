"""Crops of single images on the host, for sources whose images differ in size."""

from dataclasses import dataclass, replace
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
    down = _four_by_four(pixels.view(height, -1), _taps(height, rows, resize, bytes_=True))
    turned = down.view(rows, width, channels).permute(1, 2, 0).reshape(width, -1)
    across = _four_by_four(turned, _taps(width, columns, resize, bytes_=False))
    out.copy_(across.view(columns, channels, rows).permute(1, 2, 0))


@dataclass(frozen=True)
class _Taps:
    index: Tensor  # int32 [4*size], the rows that are read, four for each output row
    weight: Tensor  # float32 [4*size]
    first: Tensor  # int32 [size], where the four of an output row begin


def _four_by_four(
    rows: Tensor,  # float32 [length,n]
    chosen: _Taps,
) -> Tensor:  # float32 [size,n]
    """Return weighted sums of four rows: an embedding bag, in one pass over memory."""
    sums: Tensor = torch.embedding_bag(
        rows, chosen.index, chosen.first, mode=0, per_sample_weights=chosen.weight
    )[0]
    return sums


@lru_cache(maxsize=2048)  # 8 KiB each for views of 224 pixels
def _taps(length: int, size: int, resize: Resize, *, bytes_: bool) -> _Taps:
    if bytes_:
        found = _taps(length, size, resize, bytes_=False)
        return replace(found, weight=found.weight / 255)
    first, weight = taps(np.array([length], np.int64), size, resize)
    # Weightless taps may lie outside the crop.
    index = np.clip(first[0, :, None] + np.arange(4), 0, length - 1)
    return _Taps(
        index=torch.from_numpy(index.astype(np.int32).reshape(-1)),
        weight=torch.from_numpy(weight.reshape(-1)),
        first=torch.arange(0, 4 * size, 4, dtype=torch.int32),
    )

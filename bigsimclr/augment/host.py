"""Crops of single images on the host, for sources whose images differ in size."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from bigsimclr.augment.resize import Resize, taps


@torch.inference_mode()
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
    crop = np.array(image[y : y + height, x : x + width], order="C")
    pixels = torch.from_numpy(crop).view(height, width * channels).to(torch.float32)
    # Each output row is a weighted sum of four input rows: what an embedding bag computes in one
    # pass over memory.
    index, weight = _taps_of_bytes(height, rows, resize)
    down = F.embedding_bag(index, pixels, mode="sum", per_sample_weights=weight)
    turned = down.view(rows, width, channels).permute(1, 2, 0).reshape(width, channels * rows)
    index, weight = _taps_of_floats(width, columns, resize)
    across = F.embedding_bag(index, turned, mode="sum", per_sample_weights=weight)
    out.copy_(across.view(columns, channels, rows).permute(1, 2, 0))


@lru_cache(maxsize=1024)  # 7 KiB each for views of 224 pixels
def _taps_of_floats(length: int, size: int, resize: Resize) -> tuple[Tensor, Tensor]:
    first, weight = taps(np.array([length], np.int64), size, resize)
    # Weightless taps may lie outside the crop.
    index = np.clip(first[0, :, None] + np.arange(4), 0, length - 1).astype(np.int32)
    return torch.from_numpy(index), torch.from_numpy(weight[0])


@lru_cache(maxsize=1024)
def _taps_of_bytes(length: int, size: int, resize: Resize) -> tuple[Tensor, Tensor]:
    index, weight = _taps_of_floats(length, size, resize)
    return index, weight / 255

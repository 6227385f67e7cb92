"""Colour operations on batches of images [N,3,H,W], with TensorFlow's definitions.

All factors are given per image. No operation clips on its own; `jitter` clips after each.

Source: google-research/simclr data_util.py, color_jitter_rand and to_grayscale, and the kernels of
tf.image.adjust_contrast, adjust_saturation and adjust_hue.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GREY_WEIGHTS: Final = (0.2989, 0.5870, 0.1140)


def brightness_(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply each image by its factor, in place.

    Args:
        images: [N,3,H,W].
        factors: [N].

    Returns:
        `images`.
    """
    return images.mul_(factors.view(-1, 1, 1, 1))


def contrast_(images: Tensor, factors: Tensor) -> Tensor:
    """Stretch each channel about its own mean over the image, in place.

    Args:
        images: [N,3,H,W].
        factors: [N].

    Returns:
        `images`.
    """
    mean = images.mean(dim=(2, 3), keepdim=True)
    return images.sub_(mean).mul_(factors.view(-1, 1, 1, 1)).add_(mean)


def saturation_(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply the HSV saturation and clip it to [0, 1], in place.

    Hue and value stay, so every channel moves along its line to the value: c' = v + g (c - v),
    where g is the ratio of the new saturation to the old.

    Args:
        images: [N,3,H,W].
        factors: [N], not negative.

    Returns:
        `images`.
    """
    high, low = _extremes(images)
    spread = (high - low).clamp_(min=torch.finfo(images.dtype).tiny)
    ratio = torch.minimum(high.clamp(min=0).div_(spread), factors.view(-1, 1, 1, 1))
    return images.sub_(high).mul_(ratio).add_(high)


def hue_(images: Tensor, shifts: Tensor) -> Tensor:
    """Rotate the HSV hue, keeping value and saturation, in place.

    Args:
        images: [N,3,H,W].
        shifts: [N], in turns.

    Returns:
        `images`.
    """
    red, green, blue = images.split(1, dim=1)
    high, low = _extremes(images)
    spread = high - low
    inverse = spread.clamp(min=torch.finfo(images.dtype).tiny).reciprocal_()
    # The hue in sixths of a turn, from the two channels that are not the largest.
    hue = torch.where(
        red == high,
        (green - blue).mul_(inverse),
        torch.where(
            green == high,
            (blue - red).mul_(inverse).add_(2),
            (red - green).mul_(inverse).add_(4),
        ),
    ).add_(shifts.view(-1, 1, 1, 1), alpha=6)
    for channel, offset in enumerate((5, 3, 1)):
        position = hue + offset
        position.sub_(position.div(6).floor_(), alpha=6)
        fall = position.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
        images[:, channel : channel + 1] = torch.addcmul(high, fall, spread, value=-1)
    return images


def grey(images: Tensor) -> Tensor:
    """Weigh the channels to grey.

    Args:
        images: [N,3,H,W].

    Returns:
        [N,1,H,W].
    """
    red, green, blue = images.split(1, dim=1)
    first, second, third = _GREY_WEIGHTS
    total: Tensor = red * first
    return total.add_(green, alpha=second).add_(blue, alpha=third)


_OPERATIONS: Final = (brightness_, contrast_, saturation_, hue_)


def jitter_(
    images: Tensor,
    rows: npt.NDArray[np.int64],
    *,
    order: npt.NDArray[np.uint8],
    factors: npt.NDArray[np.float32],
) -> Tensor:
    """Apply the four operations to some images, each image in its own order, in place.

    In each of the four turns the images are sorted by operation, so that an operation works on one
    contiguous slice: as many kernels for a thousand images as for four, and no image is computed
    that does not need it.

    Args:
        images: [N,3,H,W]; clipped to [0, 1] after every operation.
        rows: int64 [J], the images to jitter, each at most once.
        order: uint8 [J,4], the operation of each turn; 0 brightness, 1 contrast, 2 saturation,
            3 hue.
        factors: float32 [J,4], by operation.

    Returns:
        `images`.
    """
    if not rows.size:
        return images
    current, source = images, rows
    for turn in range(4):
        operations = order[:, turn]
        sort = np.argsort(operations, kind="stable")
        current = current.index_select(0, on_device(source[sort], images))
        values = on_device(factors[sort, operations[sort]], images).to(images.dtype)
        start = 0
        for operation, count in enumerate(np.bincount(operations, minlength=4).tolist()):
            if count:
                piece = slice(start, start + count)
                _OPERATIONS[operation](current[piece], values[piece]).clamp_(0, 1)
            start += count
        source = np.argsort(sort)
    return images.index_copy_(0, on_device(rows, images), current[on_device(source, images)])


def on_device(values: npt.NDArray[np.generic], like: Tensor) -> Tensor:
    """Copy a small host array beside a tensor without waiting for the device.

    Args:
        values: Any numeric array.
        like: A tensor on the target device.

    Returns:
        The values, same shape and type.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if like.device.type != "cuda":
        return tensor.to(like.device)
    return tensor.pin_memory().to(like.device, non_blocking=True)


def _extremes(images: Tensor) -> tuple[Tensor, Tensor]:
    # [N,3,H,W] -> largest and smallest channel, [N,1,H,W] each.
    red, green, blue = images.split(1, dim=1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    return high, low

"""Colours, grey, flip and blur of all views of a batch in three launches, whatever is drawn.

The same function in plain PyTorch: `bigsimclr.augment.device`, from the crop onwards, with the
operations of `bigsimclr.augment.colour`. Nothing here has a gradient.

Shapes: V views of B images, N = V x B view-major; H, W height and width in pixels.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bigsimclr.kernels.colour import colour
from bigsimclr.kernels.soften import soften

# Columns of the packed decisions: four factors, sigma, and the code of everything that is a whole
# number. Its bits from the lowest: 0 flip, 1 jitter, 2 grey, 3 blur, 4 to 11 the operation of each
# turn, 12 to 13 the turn of the contrast; float32 holds 24 bits exactly.
_CONTRAST: Final = 1


@dataclass(frozen=True)
class Tiles:
    """What a program of each launch works on at a time, and with what."""

    pixels: int  # of each thread
    blocks: int  # of all threads' pixels, one after the other
    warps: int  # at most; fewer where a view has fewer pixels
    blur_values: int  # 3 x W of each row that a program blurs
    blur_block: int  # values at a time
    blur_warps: int


TILES: Final = Tiles(pixels=4, blocks=7, warps=8, blur_values=21504, blur_block=1024, blur_warps=8)
"""A program colours a seventh of a view of 224 pixels, 7 blocks without a remainder. One blurs 32
rows, for which it reads up to 11 beyond either end: with much fewer, all would be read twice."""


def pack(
    *,
    flip: npt.NDArray[np.bool_],
    jitter: npt.NDArray[np.bool_],
    order: npt.NDArray[np.uint8],
    factors: npt.NDArray[np.float32],
    grey: npt.NDArray[np.bool_],
    blur: npt.NDArray[np.bool_],
    sigma: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Pack what was drawn for every view into one array, so that one copy brings it to a device.

    Args:
        flip: bool [V,B], mirrored left to right.
        jitter: bool [V,B], colours jittered.
        order: uint8 [V,B,4], the operation of each turn; 0 brightness, 1 contrast, 2 saturation,
            3 hue.
        factors: float32 [V,B,4], by operation.
        grey: bool [V,B], turned grey.
        blur: bool [V,B], blurred.
        sigma: float32 [V,B], standard deviation of the blur in pixels.

    Returns:
        float32 [V*B,6].
    """
    code = flip + 2 * jitter + 4 * grey + 8 * blur
    for turn in range(4):
        code = code + (order[..., turn].astype(np.int64) << (4 + 2 * turn))
    code = code + (np.argmax(order == _CONTRAST, axis=-1) << 12)
    packed = np.concatenate([factors, sigma[..., None], code[..., None]], axis=-1)
    return packed.reshape(-1, 6).astype(np.float32)


@torch.no_grad()
def distort(
    crops: Tensor,
    decisions: Tensor,
    *,
    radius: int,
    dtype: torch.dtype = torch.float32,
    tiles: Tiles = TILES,
) -> Tensor:
    """Jitter, make grey, clip, blur, clip and flip each crop as decided for it.

    A Gaussian has no taps where they would weigh nothing, beyond six standard deviations: a NaN
    pixel spreads that far, and not over the whole of 2 x radius + 1.

    Args:
        crops: [V,B,3,H,W] with any strides, of any float type; computed in float32.
        decisions: float32 [V*B,6] on the same device, by `pack`.
        radius: Taps of the blur on either side of the centre; 0: nothing is blurred, and what the
            decisions say of it is passed over.
        dtype: Type of the result.
        tiles: Of the launches.

    Returns:
        [V*B,3,H,W] in [0, 1], channels_last; all of the first view, then all of the second.

    Raises:
        ValueError: a shape is another one, the decisions are no packed float32, or the radius is
            negative.
    """
    if crops.ndim != 5 or crops.shape[2] != 3:
        raise ValueError(f"crops must be [V,B,3,H,W]; got {list(crops.shape)}")
    views, images, _, height, width = crops.shape
    count = views * images
    if decisions.shape != (count, 6) or decisions.dtype != torch.float32:
        raise ValueError(
            f"decisions must be float32 [{count},6]; got {decisions.dtype} {list(decisions.shape)}"
        )
    if radius < 0:
        raise ValueError(f"radius must not be negative; got {radius}")
    shape = (count, 3, height, width)
    layout = torch.channels_last
    found = torch.empty(shape, dtype=dtype, device=crops.device, memory_format=layout)
    if not found.numel():
        return found
    decisions = decisions.contiguous()
    # Only what belongs to blurred views is ever touched.
    coloured = torch.empty_like(found, dtype=torch.float32) if radius else found
    colour(
        crops,
        decisions,
        coloured=coloured,
        found=found,
        pixels=tiles.pixels,
        blocks=tiles.blocks,
        warps=tiles.warps,
        softens=radius > 0,
    )
    if radius:
        soften(
            coloured,
            decisions,
            found=found,
            radius=radius,
            values=tiles.blur_values,
            block=tiles.blur_block,
            warps=tiles.blur_warps,
        )
    return found

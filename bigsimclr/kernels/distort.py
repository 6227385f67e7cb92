"""Colours, grey, flip and blur of all views of a batch in two launches, whatever is drawn.

The same function in plain PyTorch: `bigsimclr.augment.device`, from the crop onwards, with the
operations of `bigsimclr.augment.colour`. Nothing here has a gradient.

Shapes: V views of B images, N = V x B view-major; H, W height and width in pixels.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from bigsimclr.kernels.soften import soften

# Columns of the packed decisions: four factors, sigma, and the code of everything that is a whole
# number. Its bits from the lowest: 0 flip, 1 jitter, 2 grey, 3 blur, 4 to 11 the operation of each
# turn, 12 to 13 the turn of the contrast; float32 holds 24 bits exactly.
_COLUMNS = tl.constexpr(6)
_CONTRAST: Final = 1

# The smallest normal float32, as in the plain code: a spread of zero is divided by.
_TINY = tl.constexpr(2.0**-126)


@dataclass(frozen=True)
class Tiles:
    """What a program of either launch works on at a time, and with what."""

    pixels: int  # of each thread
    warps: int  # at most; fewer where a view has fewer pixels
    blur_values: int  # 3 x W of each row that a program blurs
    blur_block: int  # values at a time
    blur_warps: int


TILES: Final = Tiles(pixels=4, warps=8, blur_values=21504, blur_block=1024, blur_warps=8)
"""A program blurs 32 rows of 224 pixels, 21 blocks without a remainder. It reads up to 11 rows
beyond either end, so with much fewer rows everything would be read twice."""


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
    block = min(triton.next_power_of_2(height * width), 32 * tiles.warps * tiles.pixels)
    _colour[(count,)](
        crops,
        decisions,
        coloured,
        found,
        images,
        *crops.stride(),
        HEIGHT=height,
        WIDTH=width,
        FLAT=crops.stride(3) == width * crops.stride(4),
        SOFTENS=radius > 0,
        BLOCK=block,
        num_warps=max(block // (32 * tiles.pixels), 1),
        num_stages=1,
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


@triton.jit
def _larger(first, second):
    return tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(first, second):
    return tl.minimum(first, second, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clip(values):
    return _smaller(_larger(values, 0.0), 1.0)


@triton.jit
def _saturate(values):
    # A NaN becomes zero.
    return tl.minimum(tl.maximum(values, 0.0), 1.0)


@triton.jit
def _turn(
    red,
    green,
    blue,
    turn,
    operation,
    brightness,
    contrast,
    saturation,
    hue_shift,
    red_mean,
    green_mean,
    blue_mean,
):
    # One operation of the jitter, and the clip after it.
    if operation == 0:
        red = _clip(red * brightness)
        green = _clip(green * brightness)
        blue = _clip(blue * brightness)
    elif operation == 1:
        red = _clip((red - red_mean) * contrast + red_mean)
        green = _clip((green - green_mean) * contrast + green_mean)
        blue = _clip((blue - blue_mean) * contrast + blue_mean)
    else:
        high = _larger(_larger(red, green), blue)
        spread = high - _smaller(_smaller(red, green), blue)
        inverse = 1.0 / _larger(spread, _TINY)
        if operation == 2:
            ratio = _smaller(_larger(high, 0.0) * inverse, saturation)
            red = (red - high) * ratio + high
            green = (green - high) * ratio + high
            blue = (blue - high) * ratio + high
        else:
            # In sixths of a turn, from 0 to 6. A pixel with a NaN has one in `high` as well.
            hue = 6.0 * hue_shift + tl.where(
                red == high,
                (green - blue) * inverse,
                tl.where(
                    green == high,
                    (blue - red) * inverse + 2.0,
                    (red - green) * inverse + 4.0,
                ),
            )
            hue -= 6.0 * tl.floor(hue * (1 / 6))
            red = high - _saturate(2.0 - tl.abs(hue - 3.0)) * spread
            green = high - _saturate(tl.abs(hue - 2.0) - 1.0) * spread
            blue = high - _saturate(tl.abs(hue - 4.0) - 1.0) * spread
        # Neither leaves [0, 1] by more than its rounding, except with a crop that does.
        if turn == 0:
            red = _clip(red)
            green = _clip(green)
            blue = _clip(blue)
    return red, green, blue


@triton.jit
def _turns(
    red,
    green,
    blue,
    count,
    code,
    brightness,
    contrast,
    saturation,
    hue_shift,
    red_mean,
    green_mean,
    blue_mean,
):
    for turn in range(count):
        operation = (code >> (4 + 2 * turn)) & 3
        red, green, blue = _turn(
            red,
            green,
            blue,
            turn,
            operation,
            brightness,
            contrast,
            saturation,
            hue_shift,
            red_mean,
            green_mean,
            blue_mean,
        )
    return red, green, blue


@triton.jit
def _pixels(
    first,
    place,
    channel_stride,
    row_stride,
    column_stride,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FLAT: tl.constexpr,
):
    # Three channels in float32; past the last pixel, zeros.
    if FLAT:
        where = first + place * column_stride
    else:
        where = first + (place // WIDTH) * row_stride + (place % WIDTH) * column_stride
    if PIXELS % BLOCK == 0:
        red = tl.load(where)
        green = tl.load(where + channel_stride)
        blue = tl.load(where + 2 * channel_stride)
    else:
        inside = place < PIXELS
        red = tl.load(where, mask=inside, other=0.0)
        green = tl.load(where + channel_stride, mask=inside, other=0.0)
        blue = tl.load(where + 2 * channel_stride, mask=inside, other=0.0)
    return red.to(tl.float32), green.to(tl.float32), blue.to(tl.float32)


@triton.jit
def _put(target, start, red, green, blue, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    # Pixels beside each other in channels_last. The channels change threads for it, so that
    # neighbouring threads write neighbouring values: a fourth of them has none to write. One
    # thread's values lie in one row of these, at constant distances.
    ROWS: tl.constexpr = min(BLOCK, 16)
    COLUMNS: tl.constexpr = BLOCK // ROWS
    colours = tl.join(tl.join(red, blue), tl.join(green, blue)).reshape(ROWS, COLUMNS, 4)
    colours = colours.permute(1, 0, 2).to(target.dtype.element_ty)
    column = tl.arange(0, COLUMNS)[:, None, None]
    row = tl.arange(0, ROWS)[None, :, None]
    channel = tl.arange(0, 4)[None, None, :]
    inside = channel < 3
    if PIXELS % BLOCK:
        inside = inside & (start + row * COLUMNS + column < PIXELS)
    where = target + 3 * start + (row * (3 * COLUMNS) + (3 * column + channel))
    tl.store(where, colours, mask=inside)


@triton.jit
def _means(
    crop,
    code,
    brightness,
    saturation,
    hue_shift,
    channel_stride,
    row_stride,
    column_stride,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FLAT: tl.constexpr,
):
    # What the contrast stretches about: the means of what the turns before it leave, which is black
    # of black. Zeros without a look at the pixels where nothing is jittered.
    lanes = tl.arange(0, BLOCK)
    red_sum = tl.zeros([BLOCK], tl.float32)
    green_sum = tl.zeros([BLOCK], tl.float32)
    blue_sum = tl.zeros([BLOCK], tl.float32)
    before = (code >> 12) & 3
    for start in range(0, ((code >> 1) & 1) * PIXELS, BLOCK):
        red, green, blue = _pixels(
            crop,
            start + lanes,
            channel_stride,
            row_stride,
            column_stride,
            PIXELS,
            WIDTH,
            BLOCK,
            FLAT,
        )
        red, green, blue = _turns(
            red, green, blue, before, code, brightness, 0.0, saturation, hue_shift, 0.0, 0.0, 0.0
        )
        red_sum += red
        green_sum += green
        blue_sum += blue
    return tl.sum(red_sum, 0) / PIXELS, tl.sum(green_sum, 0) / PIXELS, tl.sum(blue_sum, 0) / PIXELS


# The last batch of an evaluation has its own number of images, and needs no build of its own.
@triton.jit(do_not_specialize=["images"])
def _colour(
    crops,
    decisions,
    coloured,
    found,
    images,
    view_stride,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    FLAT: tl.constexpr,
    SOFTENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program for each view: twice over its pixels if it is jittered, else once. The second time
    # from the last to the first, since the last ones may still lie in a cache.
    PIXELS: tl.constexpr = HEIGHT * WIDTH
    row = tl.program_id(0).to(tl.int64)
    decision = decisions + row * _COLUMNS
    code = tl.load(decision + 5).to(tl.int32)
    brightness = tl.load(decision)
    contrast = tl.load(decision + 1)
    saturation = tl.load(decision + 2)
    hue_shift = tl.load(decision + 3)
    turns = 4 * ((code >> 1) & 1)
    crop = crops + row // images * view_stride + row % images * image_stride
    coloured += row * (3 * PIXELS)
    found += row * (3 * PIXELS)
    lanes = tl.arange(0, BLOCK)

    red_mean, green_mean, blue_mean = _means(
        crop,
        code,
        brightness,
        saturation,
        hue_shift,
        channel_stride,
        row_stride,
        column_stride,
        PIXELS,
        WIDTH,
        BLOCK,
        FLAT,
    )
    for done in range(0, PIXELS, BLOCK):
        start = (PIXELS - 1) // BLOCK * BLOCK - done
        place = start + lanes
        # The Gaussian is symmetric: flipped before it is as flipped after it.
        if code & 1:
            place += WIDTH - 1 - 2 * (place % WIDTH)
            red, green, blue = _pixels(
                crop, place, channel_stride, row_stride, column_stride, PIXELS, WIDTH, BLOCK, FLAT
            )
        else:
            red, green, blue = _pixels(
                crop, place, channel_stride, row_stride, column_stride, PIXELS, WIDTH, BLOCK, FLAT
            )
        red, green, blue = _turns(
            red,
            green,
            blue,
            turns,
            code,
            brightness,
            contrast,
            saturation,
            hue_shift,
            red_mean,
            green_mean,
            blue_mean,
        )
        if (code >> 2) & 1:
            red = 0.2989 * red + 0.5870 * green + 0.1140 * blue
            green = red
            blue = red
        red = _clip(red)
        green = _clip(green)
        blue = _clip(blue)
        if SOFTENS:
            if (code >> 3) & 1:
                _put(coloured, start, red, green, blue, PIXELS, BLOCK)
            else:
                _put(found, start, red, green, blue, PIXELS, BLOCK)
        else:
            _put(found, start, red, green, blue, PIXELS, BLOCK)

"""Jitter, grey and flip of all views of a batch in two launches, whatever is drawn.

The same function in plain PyTorch: `bigsimclr.augment.device`, with the operations of
`bigsimclr.augment.colour`. Nothing here has a gradient.

Shapes: V views of B images, N = V x B view-major; H, W height and width in pixels.
"""

import triton
import triton.language as tl
from torch import Tensor

# Columns of the packed decisions, which `bigsimclr.kernels.distort` describes.
COLUMNS = tl.constexpr(6)
CODE = tl.constexpr(5)

# The smallest normal float32, as in the plain code: a spread of zero is divided by.
_TINY = tl.constexpr(2.0**-126)


def colour(
    crops: Tensor,
    decisions: Tensor,
    *,
    coloured: Tensor,
    found: Tensor,
    pixels: int,
    blocks: int,
    warps: int,
    softens: bool,
) -> None:
    """Jitter, make grey, clip and flip each crop as decided for it.

    Args:
        crops: [V,B,3,H,W] with any strides, of any float type; computed in float32.
        decisions: float32 [N,6], contiguous.
        coloured: float32 [N,3,H,W], channels_last: where a view goes that is to be blurred.
        found: [N,3,H,W], channels_last: where the others go.
        pixels: Of each thread at a time.
        blocks: Of a program, one after the other.
        warps: At most; fewer where a view has fewer pixels.
        softens: Whether any view is to be blurred, whatever is decided.
    """
    _, images, _, height, width = crops.shape
    block = min(triton.next_power_of_2(height * width), 32 * warps * pixels)
    pieces = triton.cdiv(height * width, block * blocks)
    grid = (found.shape[0], pieces)
    warps = max(block // (32 * pixels), 1)
    flat = crops.stride(3) == width * crops.stride(4)
    sums = decisions.new_empty(*grid, 3)
    _sum_up[grid](
        crops,
        decisions,
        sums,
        images,
        *crops.stride(),
        HEIGHT=height,
        WIDTH=width,
        FLAT=flat,
        BLOCK=block,
        BLOCKS=blocks,
        num_warps=warps,
        num_stages=1,
    )
    _colour[grid](
        crops,
        decisions,
        sums,
        coloured,
        found,
        images,
        *crops.stride(),
        HEIGHT=height,
        WIDTH=width,
        FLAT=flat,
        SOFTENS=softens,
        BLOCK=block,
        BLOCKS=blocks,
        num_warps=warps,
        num_stages=1,
    )


@triton.jit
def _larger(first, second):
    return tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(first, second):
    return tl.minimum(first, second, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clip(values):
    """Bring values into 0 to 1; NaN stays."""
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
        red = clip(red * brightness)
        green = clip(green * brightness)
        blue = clip(blue * brightness)
    elif operation == 1:
        red = clip((red - red_mean) * contrast + red_mean)
        green = clip((green - green_mean) * contrast + green_mean)
        blue = clip((blue - blue_mean) * contrast + blue_mean)
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
            red = clip(red)
            green = clip(green)
            blue = clip(blue)
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
    # Clipped pixels beside each other in channels_last. The channels change threads for it, so that
    # neighbouring threads write neighbouring values: a fourth of them has none to write. One
    # thread's values lie in one row of these, at constant distances.
    ROWS: tl.constexpr = min(BLOCK, 16)
    COLUMNS: tl.constexpr = BLOCK // ROWS
    colours = tl.join(tl.join(red, blue), tl.join(green, blue)).reshape(ROWS, COLUMNS, 4)
    colours = clip(colours.permute(1, 0, 2)).to(target.dtype.element_ty)
    column = tl.arange(0, COLUMNS)[:, None, None]
    row = tl.arange(0, ROWS)[None, :, None]
    channel = tl.arange(0, 4)[None, None, :]
    inside = channel < 3
    if PIXELS % BLOCK:
        inside = inside & (start + row * COLUMNS + column < PIXELS)
    where = target + 3 * start + (row * (3 * COLUMNS) + (3 * column + channel))
    tl.store(where, colours, mask=inside)


# The last batch of an evaluation has its own number of images, and needs no build of its own.
@triton.jit(do_not_specialize=["images"])
def _sum_up(
    crops,
    decisions,
    sums,
    images,
    view_stride,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # What the contrast stretches about is the means of what the turns before it leave, which is
    # black of black. One program sums over some pixels of a view, if it is jittered.
    PIXELS: tl.constexpr = HEIGHT * WIDTH
    view = tl.program_id(0).to(tl.int64)
    decision = decisions + view * COLUMNS
    code = tl.load(decision + CODE).to(tl.int32)
    if (code >> 1) & 1:
        brightness = tl.load(decision)
        saturation = tl.load(decision + 2)
        hue = tl.load(decision + 3)
        before = (code >> 12) & 3
        crop = crops + view // images * view_stride + view % images * image_stride
        lanes = tl.arange(0, BLOCK)
        red_sum = tl.zeros([BLOCK], tl.float32)
        green_sum = tl.zeros([BLOCK], tl.float32)
        blue_sum = tl.zeros([BLOCK], tl.float32)
        first = tl.program_id(1) * BLOCK * BLOCKS
        for start in range(first, tl.minimum(first + BLOCK * BLOCKS, PIXELS), BLOCK):
            place = start + lanes
            red, green, blue = _pixels(
                crop, place, channel_stride, row_stride, column_stride, PIXELS, WIDTH, BLOCK, FLAT
            )
            red, green, blue = _turns(
                red, green, blue, before, code, brightness, 0.0, saturation, hue, 0.0, 0.0, 0.0
            )
            red_sum += red
            green_sum += green
            blue_sum += blue
        # Zeros past the last pixel stay black, whatever comes before the contrast.
        sums += (view * tl.num_programs(1) + tl.program_id(1)) * 3
        tl.store(sums, tl.sum(red_sum, 0))
        tl.store(sums + 1, tl.sum(green_sum, 0))
        tl.store(sums + 2, tl.sum(blue_sum, 0))


@triton.jit
def _flipped(
    crop,
    place,
    flips,
    channel_stride,
    row_stride,
    column_stride,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FLAT: tl.constexpr,
):
    # The Gaussian is symmetric: flipped before it is as flipped after it. Both ways load for
    # themselves: places that may be mirrored would be read one by one where none is.
    if flips:
        place += WIDTH - 1 - 2 * (place % WIDTH)
        red, green, blue = _pixels(
            crop, place, channel_stride, row_stride, column_stride, PIXELS, WIDTH, BLOCK, FLAT
        )
    else:
        red, green, blue = _pixels(
            crop, place, channel_stride, row_stride, column_stride, PIXELS, WIDTH, BLOCK, FLAT
        )
    return red, green, blue


@triton.jit
def _mean(sums, PIXELS: tl.constexpr, PIECES: tl.constexpr):
    piece = tl.arange(0, triton.next_power_of_2(PIECES))
    return tl.sum(tl.load(sums + 3 * piece, mask=piece < PIECES, other=0.0), 0) / PIXELS


@triton.jit(do_not_specialize=["images"])
def _colour(
    crops,
    decisions,
    sums,
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
    BLOCKS: tl.constexpr,
):
    # One program for some pixels of a view. The pixels that were summed up last come first, since
    # they may still lie in a cache.
    PIXELS: tl.constexpr = HEIGHT * WIDTH
    PIECES: tl.constexpr = triton.cdiv(PIXELS, BLOCK * BLOCKS)
    view = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    decision = decisions + view * COLUMNS
    code = tl.load(decision + CODE).to(tl.int32)
    brightness = tl.load(decision)
    contrast = tl.load(decision + 1)
    saturation = tl.load(decision + 2)
    hue = tl.load(decision + 3)
    turns = 4 * ((code >> 1) & 1)
    red_mean = 0.0
    green_mean = 0.0
    blue_mean = 0.0
    if turns:
        sums += view * PIECES * 3
        red_mean = _mean(sums, PIXELS, PIECES)
        green_mean = _mean(sums + 1, PIXELS, PIECES)
        blue_mean = _mean(sums + 2, PIXELS, PIECES)
    crop = crops + view // images * view_stride + view % images * image_stride
    first = (PIECES - 1 - tl.program_id(1)) * BLOCK * BLOCKS
    for start in range(first, tl.minimum(first + BLOCK * BLOCKS, PIXELS), BLOCK):
        red, green, blue = _flipped(
            crop, start + tl.arange(0, BLOCK), code & 1, channel_stride, row_stride, column_stride,
            PIXELS, WIDTH, BLOCK, FLAT,
        )  # fmt: skip
        red, green, blue = _turns(
            red, green, blue, turns, code, brightness, contrast, saturation, hue,
            red_mean, green_mean, blue_mean,
        )  # fmt: skip
        if (code >> 2) & 1:
            red = 0.2989 * red + 0.5870 * green + 0.1140 * blue
            green = red
            blue = red
        if (code >> 3) & (1 if SOFTENS else 0):
            _put(coloured + view * (3 * PIXELS), start, red, green, blue, PIXELS, BLOCK)
        else:
            _put(found + view * (3 * PIXELS), start, red, green, blue, PIXELS, BLOCK)

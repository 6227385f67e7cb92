"""The 3x3 max-pool of stride 2 behind the stem, which remembers where a maximum was in one byte.

The plain code is `bigsimclr.models.resnet.SameMaxPool`. What wins is as in PyTorch: of equal values
the first in the order of rows and columns, of several NaN the last, and never the padding. Where
all of a window is -inf its first value counts as the largest, as on a CPU.

Both kernels go down a strip of windows, row by row. Forward the lowest row of inputs is kept for
the windows below, whose upper row it is: of three rows two are read. Backward each program writes
the four inputs in the upper left corner of each of its windows, which are in no more than four
windows; what the windows above give is kept from the row before. Each input is written once.

Shapes: N images, C channels, H x W positions, H' x W' windows: half as many, rounded up.
Tap t of a window is its row t // 3 and column t % 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable
from typing_extensions import override

from bigsimclr.kernels import norm_statistics


@dataclass(frozen=True)
class Tiles:
    """What a program works on at a time, and with what."""

    rows: int  # of windows, one after the other
    columns: int  # windows side by side
    channels: int  # where there are as many
    warps: int


FORWARD: Final = Tiles(rows=8, columns=8, channels=64, warps=2)
"""Channels of 128 bytes in 16 bits, a whole line of the cache; of each tap a thread reads 16 bytes.
Of the six that it reads for a row of windows, four come from memory and two from the lines of its
neighbours: 64 bytes of each thread are under way, 32 KB and more where a processor holds eight
programs, and 3.3 TB/s with 0.7 us of latency want 18. Seven tiles make the 56 columns of 224 pixels
without a remainder; 8 rows of windows read 17 rows of inputs, one of them again."""
BACKWARD: Final = Tiles(rows=8, columns=8, channels=64, warps=2)
"""Of five bytes that move, four are written, and nothing waits for them."""


@triton.jit
def _largest_of_row(line, place, channels, exists, has_first, has_third):
    """Return the largest of three neighbours as float32, and which it is."""
    nothing = -float("inf")  # larger than nothing: the padding behind the end never wins
    value = tl.load(line + place, mask=exists & has_first, other=nothing).to(tl.float32)
    second = tl.load(line + channels + place, mask=exists, other=nothing).to(tl.float32)
    third = tl.load(line + 2 * channels + place, mask=exists & has_third, other=nothing)
    third = third.to(tl.float32)
    wins = (second > value) | (second != second) | ~has_first  # NaN wins
    value = tl.where(wins, second, value)
    column = tl.where(wins, 1, 0)
    wins = (third > value) | (third != third)
    return tl.where(wins, third, value), tl.where(wins, 2, column)


@triton.jit
def _locate(number, down, across, channels, ROWS, COLUMNS, CHANNELS):
    """Return image, first row of windows, windows of a row, and channels of a program."""
    strips = tl.cdiv(channels, CHANNELS)
    tiles = tl.cdiv(across, COLUMNS)
    bands = tl.cdiv(down, ROWS)
    strip = number % strips
    number //= strips
    tile = number % tiles
    number //= tiles
    column = (tile * COLUMNS + tl.arange(0, COLUMNS))[:, None]
    channel = (strip * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    return (number // bands).to(tl.int64), number % bands * ROWS, column, channel


@triton.jit(do_not_specialize=["height", "width"])
def take_maxima(
    inputs,
    outputs,
    taps,
    height,
    width,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write the largest value of each window, and its tap unless nobody asks for it."""
    down, across = tl.cdiv(height, 2), tl.cdiv(width, 2)
    image, begin, column, channel = _locate(
        tl.program_id(0), down, across, channels, ROWS, COLUMNS, CHANNELS
    )
    left = 2 * column - width % 2
    place = left * channels + channel
    has_first, has_third = left >= 0, left + 2 < width
    target = column * channels + channel
    is_window = (channel < channels) & (column < across)

    top = 2 * begin - height % 2
    step = width.to(tl.int64) * channels  # a row of inputs
    line = inputs + (image * height + top) * step
    exists = is_window & (top >= 0)
    best, tap = _largest_of_row(line, place, channels, exists, has_first, has_third)
    for row in range(begin, tl.minimum(begin + ROWS, down)):
        line += step
        middle, middle_tap = _largest_of_row(line, place, channels, is_window, has_first, has_third)
        line += step
        exists = is_window & (top + 2 < height)
        lowest, lowest_tap = _largest_of_row(line, place, channels, exists, has_first, has_third)
        wins = (middle > best) | (middle != middle) | (top < 0)
        best = tl.where(wins, middle, best)
        tap = tl.where(wins, 3 + middle_tap, tap)
        wins = (lowest > best) | (lowest != lowest)
        best = tl.where(wins, lowest, best)
        begin_of_row = (image * down + row) * across * channels
        tl.store(outputs + begin_of_row + target, best.to(outputs.dtype.element_ty), mask=is_window)
        if taps is not None:
            tap = tl.where(wins, 6 + lowest_tap, tap)
            tl.store(taps + begin_of_row + target, tap.to(tl.uint8), mask=is_window)
        best, tap = lowest, lowest_tap
        top += 2


@triton.jit
def _load_windows(gradient, taps, begin, place, exists):
    """Return the gradients of windows, and their taps; 9 where there is no window."""
    slope = tl.load(gradient + begin + place, mask=exists, other=0.0).to(tl.float32)
    return slope, tl.load(taps + begin + place, mask=exists, other=9).to(tl.int32)


@triton.jit(do_not_specialize=["height", "width"])
def pass_gradients(
    gradient,
    taps,
    input_gradient,
    height,
    width,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write each input's sum of the gradients of the windows that it won."""
    down, across = tl.cdiv(height, 2), tl.cdiv(width, 2)
    # Backwards: what comes after the pool in the network was just written, up to its end, and what
    # comes before begins to read where this ends.
    image, begin, column, channel = _locate(
        tl.num_programs(0) - 1 - tl.program_id(0), down, across, channels, ROWS, COLUMNS, CHANNELS
    )
    is_window = (channel < channels) & (column < across)
    place = column * channels + channel
    has_before = is_window & (column > 0)
    left = 2 * column - width % 2
    target = left * channels + channel
    is_left = is_window & (left >= 0)

    step = across.to(tl.int64) * channels  # a row of windows
    line = (image * down + begin - 1) * step
    is_above = begin > 0
    slope, tap = _load_windows(gradient, taps, line, place, is_window & is_above)
    before, before_tap = _load_windows(
        gradient, taps, line, place - channels, has_before & is_above
    )
    # What the windows above give to the upper row.
    above_left = tl.where(before_tap == 8, before, 0.0) + tl.where(tap == 6, slope, 0.0)
    above_right = tl.where(tap == 7, slope, 0.0)
    top = 2 * begin - height % 2
    for _ in range(begin, tl.minimum(begin + ROWS, down)):
        line += step
        slope, tap = _load_windows(gradient, taps, line, place, is_window)
        before, before_tap = _load_windows(gradient, taps, line, place - channels, has_before)
        upper = input_gradient + (image * height + top) * width * channels + target
        lower = upper + width.to(tl.int64) * channels
        kind = input_gradient.dtype.element_ty
        is_row = top >= 0
        # One after the other, as PyTorch adds them.
        above_left += tl.where(before_tap == 2, before, 0.0)
        above_left += tl.where(tap == 0, slope, 0.0)
        above_right += tl.where(tap == 1, slope, 0.0)
        tl.store(upper, above_left.to(kind), mask=is_left & is_row)
        tl.store(upper + channels, above_right.to(kind), mask=is_window & is_row)
        here_left = tl.where(before_tap == 5, before, 0.0) + tl.where(tap == 3, slope, 0.0)
        tl.store(lower, here_left.to(kind), mask=is_left)
        tl.store(lower + channels, tl.where(tap == 4, slope, 0.0).to(kind), mask=is_window)
        above_left = tl.where(before_tap == 8, before, 0.0) + tl.where(tap == 6, slope, 0.0)
        above_right = tl.where(tap == 7, slope, 0.0)
        top += 2


def max_pool(
    inputs: Tensor,  # [N, C, H, W] in channels_last
) -> Tensor:  # [N, C, H', W']
    """Take the maximum of each window, padded as TensorFlow's SAME.

    Even sizes are padded by one at the end only, odd sizes on both sides. For the backward pass a
    byte is kept for each result, and nothing where no gradient is asked for.

    Raises:
        ValueError: the kernels do not take the inputs.
    """
    if torch.is_grad_enabled() and inputs.requires_grad:
        outputs: Tensor = _MaxPool.apply(inputs)
        return outputs
    return take_largest(inputs, remembers=False)[0]


def suits(
    inputs: Tensor,  # [N, C, H, W]
) -> bool:
    """Say whether the kernels take a tensor: by its type, and by how it lies in memory."""
    return inputs.ndim == 4 and norm_statistics.suits(inputs)


def take_largest(
    inputs: Tensor,  # [N, C, H, W] in channels_last
    *,
    remembers: bool,
    tiles: Tiles = FORWARD,
) -> tuple[Tensor, Tensor | None]:  # [N, C, H', W'] as inputs, and uint8
    """Take the forward pass; no gradient flows.

    Args:
        inputs: what to pool.
        remembers: return each maximum's tap as well, for the backward pass.
        tiles: what a program works on.

    Raises:
        ValueError: the kernels do not take the inputs.
    """
    if not suits(inputs):
        raise ValueError(
            f"inputs {list(inputs.shape)} {inputs.dtype} with strides {inputs.stride()}: the "
            "kernels take [N, C, H, W] in channels_last, of 32 or 16 bits"
        )
    images, channels, height, width = inputs.shape
    shape = images, channels, (height + 1) // 2, (width + 1) // 2
    outputs = _empty(shape, inputs, inputs.dtype)
    taps = _empty(shape, inputs, torch.uint8) if remembers else None
    programs, strip = _sides(inputs.shape, tiles)
    take_maxima[(programs,)](
        inputs,
        outputs,
        taps,
        height,
        width,
        channels,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        CHANNELS=strip,
        num_warps=tiles.warps,
    )
    return outputs, taps


def differentiate_inputs(
    gradient: Tensor,  # [N, C, H', W'] in channels_last
    taps: Tensor,  # [N, C, H', W'] uint8 in channels_last
    extent: tuple[int, int],  # H, W
    *,
    tiles: Tiles = BACKWARD,
) -> Tensor:  # [N, C, H, W] as gradient
    """Take the backward pass."""
    shape = (*gradient.shape[:2], *extent)
    input_gradient = _empty(shape, gradient, gradient.dtype)
    programs, strip = _sides(shape, tiles)
    pass_gradients[(programs,)](
        gradient,
        taps,
        input_gradient,
        *extent,
        gradient.shape[1],
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        CHANNELS=strip,
        num_warps=tiles.warps,
    )
    return input_gradient


class _MaxPool(Function):
    """The gradient of `max_pool`."""

    @staticmethod
    @override
    def forward(ctx: FunctionCtx, inputs: Tensor) -> Tensor:
        outputs, taps = take_largest(inputs, remembers=True)
        ctx.save_for_backward(taps)  # type: ignore[arg-type]
        ctx.extent = inputs.shape[2:]  # type: ignore[attr-defined] # a context takes any attribute
        return outputs

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        (taps,) = ctx.saved_tensors  # type: ignore[attr-defined]
        upstream = gradient.contiguous(memory_format=torch.channels_last)
        return differentiate_inputs(upstream, taps, ctx.extent)  # type: ignore[attr-defined]


def _sides(
    shape: Sequence[int],  # N, C, H, W
    tiles: Tiles,
) -> tuple[int, int]:
    """Return how many programs there are, and the channels of each."""
    images, channels, height, width = shape
    strip = min(tiles.channels, 1 << (channels - 1).bit_length())
    bands = triton.cdiv((height + 1) // 2, tiles.rows)
    across = triton.cdiv((width + 1) // 2, tiles.columns)
    return images * bands * across * triton.cdiv(channels, strip), strip


def _empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    last = torch.channels_last
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=last)

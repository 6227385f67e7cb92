"""Gaussian blur of those views of a batch that are to be blurred, in one launch.

The same function in plain PyTorch is in `bigsimclr.augment`. Nothing here has a gradient.

Shapes: N views; H, W height and width in pixels. A view lies in memory as H rows of W pixels of
three channels, so that a tap lies 3 x W values further down, or 3 further right.
"""

import triton
import triton.language as tl
from torch import Tensor

from bigsimclr.kernels.colour import CODE, COLUMNS, clip

# Columns of the packed decisions, which `bigsimclr.kernels.distort` describes.
_SIGMA = tl.constexpr(4)
_BLUR = tl.constexpr(3)

# Beyond six standard deviations lie 2e-9 of a Gaussian, a thirtieth of a float32's rounding. With
# sigma uniform in 0.1 to 2.0 that leaves 14 of the 23 taps at 224 pixels, on average.
_REACH = tl.constexpr(6.0)
# Rows that are blurred down at once: each line that is read gives a tap of every one.
_TOGETHER = tl.constexpr(4)


def soften(
    coloured: Tensor,
    decisions: Tensor,
    *,
    found: Tensor,
    radius: int,
    values: int,
    block: int,
    warps: int,
) -> None:
    """Blur and clip the views that are to be blurred; the others are left as they are.

    Args:
        coloured: float32 [N,3,H,W], channels_last. Only what belongs to blurred views is read.
        decisions: float32 [N,6], contiguous.
        found: [N,3,H,W], channels_last: where the result goes.
        radius: Taps on either side of the centre, at least 1.
        values: Of the rows of a program, 3 x W each.
        block: Values at a time.
        warps: Of a program.
    """
    count, _, height, width = coloured.shape
    together = _TOGETHER.value
    rows = min(max(values // (3 * width) // together, 1) * together, height)
    pieces = triton.cdiv(height, rows)
    gap = triton.cdiv(3 * radius, 4) * 4
    taps = triton.next_power_of_2(2 * radius + 1)
    room = gap + rows * (3 * width + gap)
    _soften[(count, pieces)](
        coloured,
        coloured.new_empty(count, pieces, taps),
        coloured.new_empty(count, pieces, room),
        found,
        decisions,
        HEIGHT=height,
        WIDTH=width,
        RADIUS=radius,
        ROWS=rows,
        GAP=gap,
        TAPS=taps,
        BLOCK=block,
        num_warps=warps,
        num_stages=1,
    )


@triton.jit
def _line(where, row, further, HEIGHT: tl.constexpr, LINE: tl.constexpr, EDGE: tl.constexpr):
    # Some values of the line so many rows further down; zeros beyond the first and the last one.
    if EDGE:
        row += further
        line = tl.load(where + further * LINE, mask=(row >= 0) & (row < HEIGHT), other=0.0)
    else:
        line = tl.load(where + further * LINE)
    return line


@triton.jit
def _down(where, row, weights, reach, HEIGHT: tl.constexpr, LINE: tl.constexpr, EDGE: tl.constexpr):
    # The Gaussian down columns whose centres lie in four successive rows, from `row`. Line t from
    # the uppermost on is tap t of the first result, tap t - 1 of the second and so on. A tap of
    # weight zero would still spread a NaN, so that the ends are written out.
    one = tl.load(weights)
    two = tl.load(weights + 1)
    three = tl.load(weights + 2)
    line = _line(where, row, -reach, HEIGHT, LINE, EDGE)
    first = one * line
    line = _line(where, row, 1 - reach, HEIGHT, LINE, EDGE)
    first += two * line
    second = one * line
    line = _line(where, row, 2 - reach, HEIGHT, LINE, EDGE)
    first += three * line
    second += two * line
    third = one * line
    fourth = tl.zeros_like(first)
    for tap in range(3, 2 * reach + 1):
        four = tl.load(weights + tap)
        line = _line(where, row, tap - reach, HEIGHT, LINE, EDGE)
        first += four * line
        second += three * line
        third += two * line
        fourth += one * line
        one = two
        two = three
        three = four
    line = _line(where, row, reach + 1, HEIGHT, LINE, EDGE)
    second += three * line
    third += two * line
    fourth += one * line
    line = _line(where, row, reach + 2, HEIGHT, LINE, EDGE)
    third += three * line
    fourth += two * line
    line = _line(where, row, reach + 3, HEIGHT, LINE, EDGE)
    fourth += three * line
    return first, second, third, fourth


@triton.jit
def _across(where, weights, reach, RADIUS: tl.constexpr):
    # The Gaussian along a line; left and right of it lie zeros enough. Written out, so that every
    # distance is a constant of an instruction.
    weights += reach
    total = tl.load(weights) * tl.load(where)
    for distance in tl.static_range(1, RADIUS + 1):
        if distance <= reach:
            before = tl.load(where - 3 * distance)
            after = tl.load(where + 3 * distance)
            total += tl.load(weights + distance) * (before + after)
    return total


@triton.jit
def _tabulate(weights, sigma, reach, TAPS: tl.constexpr):
    # The weights of all taps, from the first to the last; their sum is one.
    taps = tl.arange(0, TAPS)
    distance = (taps - reach).to(tl.float32)
    values = tl.where(taps <= 2 * reach, tl.exp(distance * distance * (-0.5 / (sigma * sigma))), 0)
    tl.store(weights + taps, values / tl.sum(values, 0))


@triton.jit
def _all_down(
    coloured,
    between,
    weights,
    reach,
    top,
    rows,
    HEIGHT: tl.constexpr,
    LINE: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    TOGETHER: tl.constexpr = _TOGETHER
    lanes = tl.arange(0, BLOCK)
    groups = (rows + TOGETHER - 1) // TOGETHER
    for start in range(0, groups * LINE, BLOCK):
        place = start + lanes
        row = place // LINE * TOGETHER
        column = place % LINE
        where = coloured + (top + row) * LINE + column
        uppermost = top + start // LINE * TOGETHER - reach
        lowest = top + (start + BLOCK - 1) // LINE * TOGETHER + TOGETHER - 1 + reach
        if (uppermost >= 0) & (lowest < HEIGHT):
            first, second, third, fourth = _down(
                where, top + row, weights, reach, HEIGHT, LINE, EDGE=False
            )
        else:
            first, second, third, fourth = _down(
                where, top + row, weights, reach, HEIGHT, LINE, EDGE=True
            )
        target = between + row * PITCH + column
        tl.store(target, first, mask=row < rows)
        tl.store(target + PITCH, second, mask=row + 1 < rows)
        tl.store(target + 2 * PITCH, third, mask=row + 2 < rows)
        tl.store(target + 3 * PITCH, fourth, mask=row + 3 < rows)


@triton.jit
def _all_across(
    between,
    found,
    weights,
    reach,
    rows,
    RADIUS: tl.constexpr,
    LINE: tl.constexpr,
    GAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Taps are not aligned for wide loads: neighbours belong to neighbouring threads, and the
    # four values of a thread lie far from each other.
    spread = tl.arange(0, BLOCK // 4)[:, None] + tl.arange(0, 4)[None, :] * (BLOCK // 4)
    for start in range(0, rows * LINE, BLOCK):
        place = tl.max_contiguous(start + spread, [1, 1])
        held = tl.minimum(place, rows * LINE - 1)
        source = between + held + held // LINE * GAP
        value = _across(source, weights, reach, RADIUS)
        target = found + place
        tl.store(target, clip(value).to(found.dtype.element_ty), mask=place < rows * LINE)


@triton.jit
def _soften(
    coloured,
    weights,
    between,
    found,
    decisions,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    RADIUS: tl.constexpr,
    ROWS: tl.constexpr,
    GAP: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program for some rows of a view: down into memory of its own, then across. There every
    # line has zeros before it and after it, so that no tap across is looked at for its bounds.
    LINE: tl.constexpr = 3 * WIDTH
    VIEW: tl.constexpr = HEIGHT * LINE
    PITCH: tl.constexpr = LINE + GAP
    view = tl.program_id(0).to(tl.int64)
    decision = decisions + view * COLUMNS
    code = tl.load(decision + CODE).to(tl.int32)
    if (code >> _BLUR) & 1:
        sigma = tl.load(decision + _SIGMA)
        reach = tl.minimum((sigma * _REACH).to(tl.int32) + 1, RADIUS)
        program = view * tl.num_programs(1) + tl.program_id(1)
        weights += program * TAPS
        between += program * (GAP + ROWS * PITCH)
        coloured += view * VIEW
        found += view * VIEW
        _tabulate(weights, sigma, reach, TAPS)
        lanes = tl.arange(0, BLOCK)
        for start in range(0, (ROWS + 1) * GAP, BLOCK):
            place = start + lanes
            zero = between + place // GAP * PITCH + place % GAP
            tl.store(zero, tl.zeros([BLOCK], tl.float32), mask=place < (ROWS + 1) * GAP)
        between += GAP
        # The weights are read by all threads of this program, and by no other program.
        tl.debug_barrier()

        top = tl.program_id(1) * ROWS
        rows = tl.minimum(HEIGHT - top, ROWS)
        _all_down(coloured, between, weights, reach, top, rows, HEIGHT, LINE, PITCH, BLOCK)
        # So are the rows.
        tl.debug_barrier()
        _all_across(between, found + top * LINE, weights, reach, rows, RADIUS, LINE, GAP, BLOCK)

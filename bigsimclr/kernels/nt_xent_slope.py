"""The Triton kernels of NT-Xent's backward pass; names and shapes are those of `nt_xent_sums`."""

import triton
import triton.language as tl

from bigsimclr.kernels.nt_xent_rows import SHORTEST, lift_of
from bigsimclr.kernels.nt_xent_sums import (
    listed,
    load_numbers,
    load_rows,
    meetings,
    multiply,
    place,
)

NOTHING = tl.constexpr(-1e30)
"""The cosine of what is no negative; minus infinity less itself would be no number."""


@triton.jit
def _entries(scores, by_row, by_column, row_top, column_top, scale, lift, ONLINE: tl.constexpr):
    """Return 2^lift times the derivative of the loss by each score, but for the factor 1 / T."""
    if ONLINE:
        # A sum of entries is at least 1 here, so that no share outgrows its weight.
        lifted = tl.exp2(lift)
        as_row = (by_row * lifted)[:, None] * tl.exp2((scores - row_top[:, None]) * scale)
        as_column = (by_column * lifted)[None, :]
        return as_row + as_column * tl.exp2((scores - column_top[None, :]) * scale)
    # In the exponent, where it costs nothing and no factor by itself grows too large.
    return tl.exp2(scores * scale - (scale - lift)) * (by_row[:, None] + by_column[None, :])


@triton.jit
def _add_products(total, entries, right, right_rest, SPLIT: tl.constexpr):
    """Add entries times columns; SPLIT keeps the digits that 16 bits drop of either."""
    rounded = entries.to(right.dtype)
    total = tl.dot(rounded, right, total, input_precision="ieee")
    if SPLIT:
        rest = (entries - rounded.to(tl.float32)).to(right.dtype)
        total = tl.dot(rounded, right_rest, total, input_precision="ieee")
        total = tl.dot(rest, right, total, input_precision="ieee")
    return total


@triton.jit
def _add_tile(
    total, view, number, near_row, left, left_rest, rows, row_rests, row_begin, row_count,
    columns, column_rests, by_row, row_top, column_shares, column_tops, lift, count, scale,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr, ONLINE: tl.constexpr, EVEN: tl.constexpr,
    MARKED: tl.constexpr, QUEUED: tl.constexpr,
):  # fmt: skip
    """Add the part of one tile of columns; MARKED blanks what is no negative.

    Those of a queue are QUEUED: negatives of all, and no anchors, so that they have no share.
    """
    start = number * COLUMNS
    begin = view * count + start
    right, right_rest = load_rows(
        columns, column_rests, begin, count - start, COLUMNS, WIDTH, SPLIT, EVEN
    )
    by_column = tl.zeros([COLUMNS], tl.float32)
    if not QUEUED:
        by_column = load_numbers(column_shares, begin, count - start, COLUMNS, EVEN)
    column_top = by_column + 1.0  # no cosine is larger; without a share, nothing may overflow
    if ONLINE:
        if not QUEUED:
            column_top = load_numbers(column_tops, begin, count - start, COLUMNS, EVEN)
    scores = multiply(
        left, left_rest, right, right_rest, rows, row_rests, row_begin, row_count,
        columns, column_rests, begin, count - start, WIDTH, ROWS, COLUMNS, SPLIT,
    )  # fmt: skip
    column = tl.arange(0, COLUMNS)
    if MARKED:
        same = (near_row - start + tl.arange(0, ROWS))[:, None] == column[None, :]
        scores = tl.where(same, NOTHING, scores)
    entries = _entries(scores, by_row, by_column, row_top, column_top, scale, lift, ONLINE)
    if not EVEN:
        # Beyond the end there are zeros to multiply with, but an entry might overflow 16 bits.
        is_row = tl.arange(0, ROWS) < row_count
        is_inside = is_row[:, None] & (column < count - start)[None, :]
        entries = tl.where(is_inside, entries, 0.0)
    return _add_products(total, entries, right, right_rest, SPLIT)


@triton.jit
def slope(
    rows, row_rests, columns, column_rests, queue, queue_rests,
    shares, tops, column_shares, column_tops, peaks, parts,
    pairs, column_pairs, queued, peak_count, position, chunk, scale,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr, HAS_QUEUE: tl.constexpr, ONLINE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Make a tile of rows' scores with a chunk of columns again, and add up what they weigh.

    EVEN says that tiles fill the views; the queue they may not.

    Shapes:
        rows, row_rests: [2B, W].
        columns, column_rests: [2N, W].
        queue, queue_rests: [Q, W].
        shares, tops: [2B], of the rows; tops ONLINE only.
        column_shares, column_tops: [2N].
        peaks: [peak_count] as `lift_of` takes them; by that power of two parts are too large.
        parts: [P, 2B, W] out: derivatives by the unit rows, but for the factor 1 / T.
        position: of the first row.
        chunk: column tiles of a program.
    """
    own_view, row_start = place(tl.program_id(0), pairs, ROWS)
    row_begin, row_count = own_view * pairs + row_start, pairs - row_start
    left, left_rest = load_rows(rows, row_rests, row_begin, row_count, ROWS, WIDTH, SPLIT, EVEN)
    lift = lift_of(peaks, peak_count)
    by_row = load_numbers(shares, row_begin, row_count, ROWS, EVEN)
    row_top = by_row
    if ONLINE:
        row_top = load_numbers(tops, row_begin, row_count, ROWS, EVEN)
    near_row = position + row_start
    per_view = tl.cdiv(column_pairs, COLUMNS)
    first, near = meetings(near_row, ROWS, per_view, COLUMNS)
    begin = tl.program_id(1) * chunk
    end = begin + chunk
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for index in range(begin, tl.minimum(end, 2 * near)):
        view, number = listed(index, first, near, per_view, MARKED=True)
        total = _add_tile(
            total, view, number, near_row, left, left_rest, rows, row_rests, row_begin, row_count,
            columns, column_rests, by_row, row_top, column_shares, column_tops, lift,
            column_pairs, scale,
            WIDTH, ROWS, COLUMNS, SPLIT, ONLINE, EVEN, MARKED=True, QUEUED=False,
        )  # fmt: skip
    for index in range(tl.maximum(begin, 2 * near), tl.minimum(end, 2 * per_view)):
        view, number = listed(index, first, near, per_view, MARKED=False)
        total = _add_tile(
            total, view, number, near_row, left, left_rest, rows, row_rests, row_begin, row_count,
            columns, column_rests, by_row, row_top, column_shares, column_tops, lift,
            column_pairs, scale,
            WIDTH, ROWS, COLUMNS, SPLIT, ONLINE, EVEN, MARKED=False, QUEUED=False,
        )  # fmt: skip
    if HAS_QUEUE:
        begin = tl.maximum(begin - 2 * per_view, 0)
        end = tl.minimum(end - 2 * per_view, tl.cdiv(queued, COLUMNS))
        for number in range(begin, end):
            total = _add_tile(
                total, 0, number, 0, left, left_rest, rows, row_rests, row_begin, row_count,
                queue, queue_rests, by_row, row_top, shares, tops, lift, queued, scale,
                WIDTH, ROWS, COLUMNS, SPLIT, ONLINE, EVEN=False, MARKED=False, QUEUED=True,
            )  # fmt: skip
    row = tl.arange(0, ROWS)[:, None]
    at = (tl.program_id(1).to(tl.int64) * 2 * pairs + row_begin) * WIDTH
    at = at + row * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(parts + at, total, mask=row < row_count)


@triton.jit
def leave_unit_sphere(
    parts,  # [P, 2B, W]
    weights,  # [2B]
    peaks,  # [peak_count] as `lift_of` takes them; by that power of two parts are too large
    first,  # [B, D] projections
    second,  # [B, D]
    first_slope,  # [B, D] out; both may lie where the only part does
    second_slope,  # [B, D] out
    upstream,  # [] gradient of the loss
    pairs,
    count,  # P
    peak_count,
    factor,  # 1 / (T B)
    first_stride,
    second_stride,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Turn the negatives' parts into the gradient of projections, whose positives stay float32."""
    view, row_start = place(tl.program_id(0), pairs, SIDE)
    inside = row_start + tl.arange(0, SIDE)
    is_row = inside < pairs
    row = (view * pairs + inside).to(tl.int64)
    width = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([SIDE, WIDTH], tl.float32)
    for part in range(count):
        at = (tl.cast(part, tl.int64) * 2 * pairs + row)[:, None] * WIDTH + width
        total += tl.load(parts + at, mask=is_row[:, None], other=0.0)
    total *= tl.exp2(-lift_of(peaks, peak_count))
    weight = tl.load(weights + row, mask=is_row, other=0.0)
    weight += tl.load(weights + (1 - 2 * view) * pairs + row, mask=is_row, other=0.0)
    at = inside.to(tl.int64)[:, None]
    of_first = is_row[:, None] & (width < D) & (view == 0)
    of_second = is_row[:, None] & (width < D) & (view == 1)
    partner = tl.load(second + at * second_stride + width, mask=of_first, other=0.0).to(tl.float32)
    partner += tl.load(first + at * first_stride + width, mask=of_second, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sum(partner * partner, 1), SHORTEST)
    total -= partner * (weight * tl.rsqrt(length))[:, None]
    own = tl.load(first + at * first_stride + width, mask=of_first, other=0.0).to(tl.float32)
    own += tl.load(second + at * second_stride + width, mask=of_second, other=0.0).to(tl.float32)
    length = tl.sum(own * own, 1)
    inverse = tl.rsqrt(tl.maximum(length, SHORTEST))
    # Along itself a projection only grows, unless it is so short that its length is held.
    along_itself = tl.where(length < SHORTEST, 0.0, tl.sum(own * total, 1) * inverse * inverse)
    total = (total - own * along_itself[:, None]) * inverse[:, None]
    total *= factor * tl.load(upstream).to(tl.float32)
    at = at * D + width
    tl.store(first_slope + at, total, mask=of_first)
    tl.store(second_slope + at, total, mask=of_second)

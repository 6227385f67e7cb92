"""The Triton kernel of NT-Xent's backward pass; names and shapes are those of `nt_xent_sums`."""

import triton
import triton.language as tl

from bigsimclr.kernels.nt_xent_sums import (
    SHORTEST,
    load_rows,
    meet,
    multiply,
    place,
)


@triton.jit
def _entries(scores, by_row, by_column, row_top, column_top, scale, ONLINE: tl.constexpr):
    """Return the derivative of the loss by each score, but for the factor 1 / T."""
    if ONLINE:
        as_row = by_row[:, None] * tl.exp2((scores - row_top[:, None]) * scale)
        return as_row + by_column[None, :] * tl.exp2((scores - column_top[None, :]) * scale)
    return tl.exp2((scores - 1.0) * scale) * (by_row[:, None] + by_column[None, :])


@triton.jit
def _add_products(total, entries, right, right_rest, SPLIT: tl.constexpr):
    """Add entries times columns; SPLIT keeps the digits that bf16 drops of either."""
    rounded = entries.to(right.dtype)
    total = tl.dot(rounded, right, total, input_precision="ieee")
    if SPLIT:
        rest = (entries - rounded.to(tl.float32)).to(right.dtype)
        total = tl.dot(rounded, right_rest, total, input_precision="ieee")
        total = tl.dot(rest, right, total, input_precision="ieee")
    return total


@triton.jit
def _leave_unit_sphere(
    total, weight, view, is_row, inside, first, second, first_stride, second_stride,
    D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Turn the negatives' part into the gradient of projections, whose positives stay float32."""
    width = tl.arange(0, WIDTH)[None, :]
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
    return (total - own * along_itself[:, None]) * inverse[:, None], of_first, of_second


@triton.jit
def slope(
    rows, row_rests, columns, column_rests, queue, queue_rests,
    weights, shares, tops, column_shares, column_tops,
    first, second, first_slope, second_slope, upstream,
    pairs, column_pairs, queued, position, scale, factor, first_stride, second_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr, HAS_QUEUE: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    """Make a tile of rows' scores again, and from them the whole gradient of its projections.

    Shapes:
        rows, row_rests: [2B, W].
        columns, column_rests: [2N, W].
        queue, queue_rests: [Q, W].
        weights, shares, tops: [2B], of the rows; tops ONLINE only.
        column_shares, column_tops: [2N].
        first, second: [B, D] projections.
        first_slope, second_slope: [B, D] out.
        upstream: [] gradient of the loss.
        position: of the first row.
        factor: 1 / (T B).
    """
    view, row_start = place(tl.program_id(0), pairs, ROWS)
    inside = row_start + tl.arange(0, ROWS)
    is_row = inside < pairs
    row = (view * pairs + inside).to(tl.int64)
    left, left_rest = load_rows(rows, row_rests, row, is_row, WIDTH, SPLIT)
    by_row = tl.load(shares + row, mask=is_row, other=0.0)
    row_top = by_row
    if ONLINE:
        row_top = tl.load(tops + row, mask=is_row, other=1.0)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for number in range(2 * tl.cdiv(column_pairs, COLUMNS)):
        side, start = place(number, column_pairs, COLUMNS)
        along = start + tl.arange(0, COLUMNS)
        is_column = along < column_pairs
        column = (side * column_pairs + along).to(tl.int64)
        right, right_rest = load_rows(columns, column_rests, column, is_column, WIDTH, SPLIT)
        by_column = tl.load(column_shares + column, mask=is_column, other=0.0)
        column_top = by_column
        if ONLINE:
            column_top = tl.load(column_tops + column, mask=is_column, other=1.0)
        scores = multiply(
            left, left_rest, right, right_rest,
            rows, row_rests, row, is_row, columns, column_rests, column, is_column,
            WIDTH, ROWS, COLUMNS, SPLIT,
        )  # fmt: skip
        entries = _entries(scores, by_row, by_column, row_top, column_top, scale, ONLINE)
        special = meet(position + row_start, ROWS, start, COLUMNS)
        if special | (start + COLUMNS > column_pairs):
            blank = (position + inside)[:, None] == along[None, :]
            entries = tl.where(blank | ~is_column[None, :], 0.0, entries)
        total = _add_products(total, entries, right, right_rest, SPLIT)
    if HAS_QUEUE:
        total = _add_queue(
            total, left, left_rest, rows, row_rests, row, is_row, queue, queue_rests, queued,
            by_row, row_top, scale, WIDTH, ROWS, COLUMNS, SPLIT, ONLINE,
        )  # fmt: skip
    weight = tl.load(weights + row, mask=is_row, other=0.0)
    weight += tl.load(weights + (1 - 2 * view) * pairs + row, mask=is_row, other=0.0)
    total, of_first, of_second = _leave_unit_sphere(
        total, weight, view, is_row, inside, first, second, first_stride, second_stride, D, WIDTH
    )
    total *= factor * tl.load(upstream).to(tl.float32)
    at = inside.to(tl.int64)[:, None] * D + tl.arange(0, WIDTH)[None, :]
    tl.store(first_slope + at, total, mask=of_first)
    tl.store(second_slope + at, total, mask=of_second)


@triton.jit
def _add_queue(
    total, left, left_rest, rows, row_rests, row, is_row, queue, queue_rests, queued,
    by_row, row_top, scale, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    """Add the queue's part: its rows are negatives of every anchor, and no anchors themselves."""
    nothing = tl.zeros([COLUMNS], tl.float32)
    for number in range(tl.cdiv(queued, COLUMNS)):
        along = number * COLUMNS + tl.arange(0, COLUMNS)
        is_column = along < queued
        column = along.to(tl.int64)
        right, right_rest = load_rows(queue, queue_rests, column, is_column, WIDTH, SPLIT)
        scores = multiply(
            left, left_rest, right, right_rest,
            rows, row_rests, row, is_row, queue, queue_rests, column, is_column,
            WIDTH, ROWS, COLUMNS, SPLIT,
        )  # fmt: skip
        entries = _entries(scores, by_row, nothing, row_top, nothing, scale, ONLINE)
        entries = tl.where(is_column[None, :], entries, 0.0)
        total = _add_products(total, entries, right, right_rest, SPLIT)
    return total

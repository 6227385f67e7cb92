"""The Triton kernels before and after NT-Xent's sums, with names and shapes of `nt_xent_sums`.

The backward pass multiplies derivatives in float16, whose numbers go from 2^-24 up to 65504. One is
at most the sum of two anchors' weights, so all are lifted by the power of two that brings the
largest weight, if it is above 1e-20, to 2^14 or its half. What is smaller than 2^-37 of that weight
is lost.
"""

import triton
import triton.language as tl

from bigsimclr.kernels.nt_xent_sums import fixed_entries, place

SHORTEST = tl.constexpr(1e-12)
"""Squared lengths below count as this one, as in the plain loss."""
SAFE_RATIO = tl.constexpr(1e30)
LOG_2 = tl.constexpr(0.6931471805599453)
LARGEST_EXPONENT = tl.constexpr(14)
LEAST_WEIGHT = tl.constexpr(1e-20)
PIECES = tl.constexpr(16)
"""Pieces that are loaded together while they are added up."""
PEAKS = tl.constexpr(512)
"""Peaks that are loaded together."""


@triton.jit
def normalise(
    first,  # [B, D] projections
    second,  # [B, D]
    units,  # [2B, W] out: divided by their lengths
    rests,  # [2B, W] out, where SPLIT: what the type of `units` left of them
    positives,  # [B] out: cosine of the two views, float32
    pairs,
    first_stride,
    second_stride,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Divide projections by their lengths."""
    pair = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    column = tl.arange(0, WIDTH)
    known = (pair < pairs)[:, None] & (column < D)[None, :]
    row = pair.to(tl.int64)[:, None]
    cosine = tl.zeros([SIDE, WIDTH], tl.float32) + 1.0
    for view in tl.static_range(2):
        if view == 0:
            values = tl.load(first + row * first_stride + column[None, :], mask=known, other=0.0)
        else:
            values = tl.load(second + row * second_stride + column[None, :], mask=known, other=0.0)
        values = values.to(tl.float32)
        length = tl.sum(values * values, 1)
        unit = values * tl.rsqrt(tl.maximum(length, SHORTEST))[:, None]
        cosine *= unit
        at = (view * pairs + row) * WIDTH + column[None, :]
        stored = (pair < pairs)[:, None]
        rounded = unit.to(units.dtype.element_ty)
        tl.store(units + at, rounded, mask=stored)
        if SPLIT:
            tl.store(rests + at, unit - rounded.to(tl.float32), mask=stored)
    tl.store(positives + pair, tl.sum(cosine, 1), mask=pair < pairs)


@triton.jit
def collect(
    pieces,  # [stripes, 2B]
    largest,  # [stripes, 2B], ONLINE only
    mirrored,  # [band, 2B], SYMMETRIC only
    sums,  # [2B] in and out: not in where FIRST, not out where LAST
    tops,  # [2B] likewise, ONLINE only, but always out: the cosine that was subtracted
    positives,  # [B] cosines; this and what follows LAST only
    losses,  # [2B] out: of each anchor, over B
    weights,  # [2B] out: share of the negatives in negatives and positive together
    shares,  # [2B] out: the weight over the negatives' sum
    peaks,  # [programs] out: largest weight of each
    pairs,
    stripes,
    first_tile,  # of the band
    band,
    scale,
    TILE: tl.constexpr,
    SIDE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ONLINE: tl.constexpr,
):
    """Add pieces to the sums of SIDE rows of a TILE, always in the same order.

    The FIRST pieces find nothing there; the LAST ones turn sums into losses.
    """
    view, row_start = place(tl.program_id(0), pairs, SIDE)
    tile = view * tl.cdiv(pairs, TILE) + row_start // TILE
    inside = row_start + tl.arange(0, SIDE)
    is_row = inside < pairs
    row = (view * pairs + inside).to(tl.int64)
    total = tl.zeros([SIDE], tl.float32)
    top = tl.full([SIDE], float("-inf"), tl.float32)
    if not FIRST:
        total = tl.load(sums + row, mask=is_row, other=0.0)
    if ONLINE:
        if not FIRST:
            top = tl.load(tops + row, mask=is_row, other=float("-inf"))
        total, top = _join(total, top, pieces, largest, row, is_row, pairs, stripes, scale)
        if LAST:
            top = tl.where(total == 0.0, 1.0, top)  # no negative at all
        tl.store(tops + row, top, mask=is_row)
    else:
        total += _added(pieces, row, is_row, pairs, stripes)
        if SYMMETRIC:
            total += _mirrored(mirrored, tile, row, is_row, pairs, first_tile, band, TILE)
    if LAST:
        positive = tl.load(positives + inside, mask=is_row, other=0.0)
        loss, weight, share = _finished(total, top, positive, scale, ONLINE)
        tl.store(losses + row, loss / pairs, mask=is_row)
        tl.store(weights + row, weight, mask=is_row)
        tl.store(shares + row, share, mask=is_row)
        # What is no number comes to the gradient by its share.
        peak = tl.max(tl.where(is_row & (weight > 0.0), weight, 0.0), 0)
        tl.store(peaks + tl.program_id(0), peak)
    else:
        tl.store(sums + row, total, mask=is_row)


@triton.jit
def _join(total, top, pieces, largest, row, is_row, pairs, stripes, scale):
    """Add pieces whose largest cosines differ."""
    for number in range(stripes):
        at = tl.cast(number, tl.int64) * 2 * pairs + row
        next_top = tl.load(largest + at, mask=is_row, other=float("-inf"))
        piece = tl.load(pieces + at, mask=is_row, other=0.0)
        higher = tl.maximum(top, next_top)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total *= tl.exp2((top - shift) * scale)
        total += piece * tl.exp2((next_top - shift) * scale)
        top = higher
    return total, top


@triton.jit
def _added(pieces, row, is_row, pairs, stripes):
    """Add the pieces of all stripes."""
    total = tl.zeros(row.shape, tl.float32)
    for start in range(0, stripes, PIECES):
        some = start + tl.arange(0, PIECES)
        known = (some < stripes)[:, None] & is_row[None, :]
        at = some.to(tl.int64)[:, None] * (2 * pairs) + row[None, :]
        total += tl.sum(tl.load(pieces + at, mask=known, other=0.0), 0)
    return total


@triton.jit
def _mirrored(mirrored, tile, row, is_row, pairs, first_tile, band, TILE: tl.constexpr):
    """Add what the row tiles of a band found that met this one: it is in the half behind them."""
    total = tl.zeros(row.shape, tl.float32)
    per_view = tl.cdiv(pairs, TILE)
    for start in range(0, band, PIECES):
        some = start + tl.arange(0, PIECES)
        other = first_tile + some
        distance = (tile - other + 2 * per_view) % (2 * per_view)
        met = (distance > 0) & (distance < per_view + (other < per_view).to(tl.int32))
        known = (met & (some < band))[:, None] & is_row[None, :]
        at = some.to(tl.int64)[:, None] * (2 * pairs) + row[None, :]
        total += tl.sum(tl.load(mirrored + at, mask=known, other=0.0), 0)
    return total


@triton.jit
def _finished(total, top, positive, scale, ONLINE: tl.constexpr):
    """Return losses log(1 + negatives / positive), without cancellation, weights and shares."""
    if ONLINE:
        # A sum is at least 1, the largest entry itself, unless there is no negative at all.
        is_alone = total == 0.0
        above = tl.log(tl.where(is_alone, 1.0, total)) + (top - positive) * scale * LOG_2
        # log(1 + e^x) from the side that does not overflow.
        small = tl.exp(-tl.abs(above))
        loss = tl.where(above > 0, above, 0.0) + _log1p(small)
        weight = tl.where(above > 0, 1.0, small) / (1.0 + small)
        loss = tl.where(is_alone, 0.0, loss)
        weight = tl.where(is_alone, 0.0, weight)
        share = weight / tl.where(is_alone, 1.0, total)
    else:
        entry = fixed_entries(positive, scale)
        ratio = total / entry
        is_large = ratio >= SAFE_RATIO
        large = tl.log(tl.where(is_large, total, 1.0)) - (positive - 1.0) * scale * LOG_2
        loss = tl.where(is_large, large, _log1p(ratio))
        share = 1.0 / (total + entry)
        weight = total * share
    return loss, weight, share


@triton.jit
def _log1p(value):
    """Return log(1 + value) to the last digits also where value is tiny."""
    grown = 1.0 + value
    # What rounding made of the sum is divided out again (Kahan's trick).
    correction = value / tl.where(grown == 1.0, 1.0, grown - 1.0)
    return tl.where(grown == 1.0, value, tl.log(grown) * correction)


@triton.jit
def lift_of(
    peaks,  # [count] whose largest is the largest weight of all ranks
    count,
):
    """Return the exponent of the power of two by which derivatives are lifted."""
    peak = tl.cast(0.0, tl.float32)
    for start in range(0, count, PEAKS):
        at = start + tl.arange(0, PEAKS)
        peak = tl.maximum(peak, tl.max(tl.load(peaks + at, mask=at < count, other=0.0), 0))
    return tl.floor(-tl.log2(tl.maximum(peak, LEAST_WEIGHT))) + LARGEST_EXPONENT

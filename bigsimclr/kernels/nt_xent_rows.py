"""The Triton kernels before and after NT-Xent's sums, with names and shapes of `nt_xent_sums`.

The backward pass multiplies derivatives in float16, whose numbers go from 2^-24 up to 65504. One is
at most the sum of two anchors' weights, so all are lifted by the power of two that brings the
largest weight to 2^14 or its half. What is smaller than 2^-37 of that weight is lost.
"""

import triton
import triton.language as tl

from bigsimclr.kernels.nt_xent_sums import fixed_entries

SHORTEST = tl.constexpr(1e-12)
"""Squared lengths below count as this one, as in the plain loss."""
SAFE_RATIO = tl.constexpr(1e30)
LOG_2 = tl.constexpr(0.6931471805599453)
LARGEST_EXPONENT = tl.constexpr(14)
LEAST_WEIGHT = tl.constexpr(1e-20)
PEAKS = tl.constexpr(256)
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
def finish(
    sums,  # [2B] of the negatives' entries
    tops,  # [2B] in and out, ONLINE only: the cosine that was subtracted
    positives,  # [B] cosines
    losses,  # [2B] out: of each anchor, over B
    weights,  # [2B] out: share of the negatives in negatives and positive together
    shares,  # [2B] out: the weight over the negatives' sum
    peaks,  # [programs] out: largest weight of each
    pairs,
    scale,
    SIDE: tl.constexpr,
    ONLINE: tl.constexpr,
):
    """Turn sums into losses log(1 + negatives / positive), without cancellation."""
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    known = row < 2 * pairs
    total = tl.load(sums + row, mask=known, other=1.0)
    positive = tl.load(positives + row % pairs, mask=known, other=0.0)
    if ONLINE:
        top = tl.load(tops + row, mask=known, other=0.0)
        # A sum is at least 1, the largest entry itself, unless there is no negative at all.
        is_alone = total == 0.0
        top = tl.where(is_alone, 1.0, top)
        tl.store(tops + row, top, mask=known)
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
    tl.store(losses + row, loss / pairs, mask=known)
    tl.store(weights + row, weight, mask=known)
    tl.store(shares + row, share, mask=known)
    tl.store(peaks + tl.program_id(0), tl.max(tl.where(known, weight, 0.0), 0))


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


@triton.jit
def _log1p(value):
    """Return log(1 + value) to the last digits also where value is tiny."""
    grown = 1.0 + value
    # What rounding made of the sum is divided out again (Kahan's trick).
    correction = value / tl.where(grown == 1.0, 1.0, grown - 1.0)
    return tl.where(grown == 1.0, value, tl.log(grown) * correction)

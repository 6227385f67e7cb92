"""The Triton kernels of NT-Xent's forward pass; `kernels.nt_xent` launches them.

Shapes and names: B pairs on this rank, N of all ranks; a *position* numbers the pairs of all ranks.
Rows are this rank's views [2B, W], columns those of all ranks [2N, W], each first views, then
second ones; W is the width, padded with zeros to a power of two. Tiles never straddle the two
views, so that in any tile an anchor meets itself or its positive where positions are equal.

A score is a cosine s; scale = log2(e) / T. With a fixed offset, entries are 2^((s - 1) scale),
which no |s| <= 1 lets overflow; ONLINE puts a row's largest cosine in the place of the 1, for low
temperatures. Differences of cosines are taken before they are scaled. Sums over columns come in
pieces that are added in a fixed order: no atomics, and equal bits every time.
"""

import triton
import triton.language as tl

SHORTEST = tl.constexpr(1e-12)
"""Squared lengths below count as this one, as in the plain loss."""
SAFE_RATIO = tl.constexpr(1e30)
PIECES = tl.constexpr(16)
"""Pieces that are loaded together while they are added up."""
WHOLE = tl.constexpr(128)
"""Values of a row up to which a tile of rows stays in registers; wider ones come in chunks."""
CHUNK = tl.constexpr(64)
LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def place(tile, count, SIDE: tl.constexpr):
    """Return a tile's view, and the number of its first entry in that view."""
    per_view = tl.cdiv(count, SIDE)
    view = tile // per_view
    return view, (tile - view * per_view) * SIDE


@triton.jit
def load_rows(units, rests, rows, known, WIDTH: tl.constexpr, SPLIT: tl.constexpr):
    """Load rows of [.., WIDTH] and what was rounded away of them; unknown ones are zeros."""
    at = rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    values = tl.load(units + at, mask=known[:, None], other=0.0)
    rest = values
    if SPLIT:
        rest = tl.load(rests + at, mask=known[:, None], other=0.0)
    return values, rest


@triton.jit
def meet(first, length, second, other_length):
    """Say whether two ranges share a number."""
    return (first < second + other_length) & (second < first + length)


@triton.jit
def _products(left, left_rest, right, right_rest, SPLIT: tl.constexpr):
    """Multiply rows with columns; SPLIT adds what bf16 left of either, for float32's digits."""
    right_ = tl.trans(right)
    product = tl.dot(left, right_, input_precision="ieee")
    if SPLIT:
        product += tl.dot(left, tl.trans(right_rest), input_precision="ieee")
        product += tl.dot(left_rest, right_, input_precision="ieee")
    return product


@triton.jit
def multiply(
    left, left_rest, right, right_rest,
    rows, row_rests, row, is_row, columns, column_rests, column, is_column,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Return the cosines of a tile; of rows too wide to be held, from a chunk at a time."""
    if WIDTH <= WHOLE:
        return _products(left, left_rest, right, right_rest, SPLIT)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, WIDTH, CHUNK):
        within = start + tl.arange(0, CHUNK)[None, :]
        at, along = row[:, None] * WIDTH + within, column[:, None] * WIDTH + within
        one = tl.load(rows + at, mask=is_row[:, None], other=0.0)
        other = tl.load(columns + along, mask=is_column[:, None], other=0.0)
        one_rest, other_rest = one, other
        if SPLIT:
            one_rest = tl.load(row_rests + at, mask=is_row[:, None], other=0.0)
            other_rest = tl.load(column_rests + along, mask=is_column[:, None], other=0.0)
        product += _products(one, one_rest, other, other_rest, SPLIT)
    return product


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
def add_up(
    rows, row_rests, columns, column_rests, pieces, largest, mirrored,
    pairs, column_pairs, position, first_tile, stripe, scale,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VIEWS: tl.constexpr,
    SPLIT: tl.constexpr, SYMMETRIC: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    """Add up the entries of the negatives in one tile of rows and one stripe of columns.

    VIEWS is 2 for views and 1 for a queue, whose columns are negatives of every row. SYMMETRIC
    makes the tiles on and above the diagonal only, and adds their columns as well.

    Shapes:
        rows, row_rests: [2B, W].
        columns, column_rests: [VIEWS x N, W].
        pieces: [stripes, 2B] out, sums of a stripe's entries; ONLINE: of those less the largest.
        largest: [stripes, 2B] out, ONLINE only: the largest cosine of each row in a stripe.
        mirrored: [band, 2B] out, SYMMETRIC only: sums over a row tile's rows, for its columns.
        position: of the first row.
        first_tile: of the rows of this launch.
        stripe: column tiles of a program.
    """
    tile = first_tile + tl.program_id(0)
    view, row_start = place(tile, pairs, ROWS)
    inside = row_start + tl.arange(0, ROWS)
    is_row = inside < pairs
    row = (view * pairs + inside).to(tl.int64)
    left, left_rest = load_rows(rows, row_rests, row, is_row, WIDTH, SPLIT)
    begin = tl.program_id(1) * stripe
    end = tl.minimum(begin + stripe, VIEWS * tl.cdiv(column_pairs, COLUMNS))
    if SYMMETRIC:
        begin = tl.maximum(begin, tile)
    sums = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for number in range(begin, end):
        side, start = place(number, column_pairs, COLUMNS)
        along = start + tl.arange(0, COLUMNS)
        is_column = along < column_pairs
        column = (side * column_pairs + along).to(tl.int64)
        right, right_rest = load_rows(columns, column_rests, column, is_column, WIDTH, SPLIT)
        scores = multiply(
            left, left_rest, right, right_rest,
            rows, row_rests, row, is_row, columns, column_rests, column, is_column,
            WIDTH, ROWS, COLUMNS, SPLIT,
        )  # fmt: skip
        special = start + COLUMNS > column_pairs
        if VIEWS == 2:
            special |= meet(position + row_start, ROWS, start, COLUMNS)
        if SYMMETRIC:
            special |= row_start + ROWS > pairs
        if special:
            blank = ~is_column[None, :] | ~is_row[:, None]
            if VIEWS == 2:
                blank |= (position + inside)[:, None] == along[None, :]
            scores = tl.where(blank, float("-inf"), scores)
        if ONLINE:
            higher = tl.maximum(top, tl.max(scores, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)  # inf - inf is no number
            sums = sums * tl.exp2((top - shift) * scale)
            sums += tl.sum(tl.exp2((scores - shift[:, None]) * scale), 1)
            top = higher
        else:
            entries = tl.exp2((scores - 1.0) * scale)
            sums += tl.sum(entries, 1)
            if SYMMETRIC:
                if number > tile:
                    at = tl.program_id(0).to(tl.int64) * 2 * pairs
                    tl.store(mirrored + at + column, tl.sum(entries, 0), mask=is_column)
    at = tl.program_id(1).to(tl.int64) * 2 * pairs
    tl.store(pieces + at + row, sums, mask=is_row)
    if ONLINE:
        tl.store(largest + at + row, top, mask=is_row)


@triton.jit
def collect(
    pieces,  # [stripes, 2B]
    largest,  # [stripes, 2B], ONLINE only
    mirrored,  # [band, 2B], SYMMETRIC only
    sums,  # [2B] in and out
    tops,  # [2B] in and out, ONLINE only
    pairs,
    stripes,
    first_tile,  # of the band
    band,
    scale,
    SIDE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ONLINE: tl.constexpr,
):
    """Add pieces to the sums, always in the same order."""
    tile = tl.program_id(0)
    view, row_start = place(tile, pairs, SIDE)
    inside = row_start + tl.arange(0, SIDE)
    is_row = inside < pairs
    row = (view * pairs + inside).to(tl.int64)
    total = tl.load(sums + row, mask=is_row, other=0.0)
    if ONLINE:
        top = tl.load(tops + row, mask=is_row, other=float("-inf"))
        for number in range(stripes):
            at = tl.cast(number, tl.int64) * 2 * pairs + row
            next_top = tl.load(largest + at, mask=is_row, other=float("-inf"))
            piece = tl.load(pieces + at, mask=is_row, other=0.0)
            higher = tl.maximum(top, next_top)
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total *= tl.exp2((top - shift) * scale)
            total += piece * tl.exp2((next_top - shift) * scale)
            top = higher
        tl.store(tops + row, top, mask=is_row)
    else:
        some = tl.arange(0, PIECES)
        for start in range(0, stripes, PIECES):
            known = ((start + some) < stripes)[:, None] & is_row[None, :]
            at = (start + some).to(tl.int64)[:, None] * (2 * pairs) + row[None, :]
            total += tl.sum(tl.load(pieces + at, mask=known, other=0.0), 0)
        if SYMMETRIC:
            # Only row tiles before this one have it among their columns.
            above = tl.minimum(band, tile - first_tile)
            for start in range(0, above, PIECES):
                known = ((start + some) < above)[:, None] & is_row[None, :]
                at = (start + some).to(tl.int64)[:, None] * (2 * pairs) + row[None, :]
                total += tl.sum(tl.load(mirrored + at, mask=known, other=0.0), 0)
    tl.store(sums + row, total, mask=is_row)


@triton.jit
def finish(
    sums,  # [2B] of the negatives' entries
    tops,  # [2B] in and out, ONLINE only: the cosine that was subtracted
    positives,  # [B] cosines
    losses,  # [2B] out
    weights,  # [2B] out: share of the negatives in negatives and positive together
    shares,  # [2B] out: the weight over the negatives' sum
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
        entry = tl.exp2((positive - 1.0) * scale)
        ratio = total / entry
        is_large = ratio >= SAFE_RATIO
        large = tl.log(tl.where(is_large, total, 1.0)) - (positive - 1.0) * scale * LOG_2
        loss = tl.where(is_large, large, _log1p(ratio))
        share = 1.0 / (total + entry)
        weight = total * share
    tl.store(losses + row, loss, mask=known)
    tl.store(weights + row, weight, mask=known)
    tl.store(shares + row, share, mask=known)


@triton.jit
def _log1p(value):
    """Return log(1 + value) to the last digits also where value is tiny."""
    grown = 1.0 + value
    # What rounding made of the sum is divided out again (Kahan's trick).
    correction = value / tl.where(grown == 1.0, 1.0, grown - 1.0)
    return tl.where(grown == 1.0, value, tl.log(grown) * correction)

"""The Triton kernels of NT-Xent's sums; `kernels.nt_xent` launches them.

Shapes and names: B pairs on this rank, N of all ranks; a *position* numbers the pairs of all ranks.
Rows are this rank's views [2B, W], columns those of all ranks [2N, W], each first views, then
second ones; W is the width, padded with zeros to a power of two. Tiles never straddle the two
views, so that in any tile an anchor meets itself or its positive where positions are equal.

A score is a cosine s; scale = log2(e) / T. With a fixed offset, entries are 2^((s - 1) scale),
which no |s| <= 1 lets overflow; ONLINE puts a row's largest cosine in the place of the 1, for low
temperatures. Sums over columns come in pieces that are added in a fixed order: no atomics, and
equal bits every time.
"""

import triton
import triton.language as tl

WHOLE = tl.constexpr(128)
"""Values of a row up to which a tile of rows stays in registers; wider ones come in chunks."""
CHUNK = tl.constexpr(64)


@triton.jit
def place(tile, count, SIDE: tl.constexpr):
    """Return a tile's view, and the number of its first entry in that view."""
    per_view = tl.cdiv(count, SIDE)
    view = tile // per_view
    return view, (tile - view * per_view) * SIDE


@triton.jit
def load_rows(
    units, rests, begin, count,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Load SIDE rows of [.., WIDTH] from `begin` on, and what was rounded away of them.

    Of those only `count` exist, unless the tiles are EVEN; the others are zeros.
    """
    row = tl.arange(0, SIDE)[:, None]
    at = row * WIDTH + tl.arange(0, WIDTH)[None, :]
    start = tl.cast(begin, tl.int64) * WIDTH
    if EVEN:
        values = tl.load(units + start + at)
    else:
        values = tl.load(units + start + at, mask=row < count, other=0.0)
    rest = values
    if SPLIT:
        if EVEN:
            rest = tl.load(rests + start + at)
        else:
            rest = tl.load(rests + start + at, mask=row < count, other=0.0)
    return values, rest


@triton.jit
def load_numbers(pointer, begin, count, SIDE: tl.constexpr, EVEN: tl.constexpr):
    """Load a number for each of some rows; zero where there is none."""
    at = tl.arange(0, SIDE)
    if EVEN:
        return tl.load(pointer + begin + at)
    return tl.load(pointer + begin + at, mask=at < count, other=0.0)


@triton.jit
def meetings(begin, length, per_view, SIDE: tl.constexpr):
    """Say where a range of positions lies among tiles of a view: the first tile, and how many."""
    count = (begin % SIDE + length - 1) // SIDE + 1
    return begin // SIDE, tl.minimum(count, per_view)


@triton.jit
def listed(index, first, near, per_view, MARKED: tl.constexpr):
    """Return view and tile of the index-th tile of columns.

    First come the MARKED ones, in which a row may meet itself or its positive: `near` tiles of each
    view from `first` on. Then come the others of both views; a view's last is followed by its
    first. Nothing in those has to be looked for, which is most of the work.
    """
    if MARKED:
        view = (index >= near).to(tl.int32)
        tile = first + index - view * near
    else:
        others = per_view - near
        view = (index - 2 * near >= others).to(tl.int32)
        tile = first + index - near - view * others
    return view, tl.where(tile >= per_view, tile - per_view, tile)


@triton.jit
def _products(left, left_rest, right, right_rest, SPLIT: tl.constexpr):
    """Multiply rows with columns; SPLIT adds what 16 bits left of either, for float32's digits."""
    right_ = tl.trans(right)
    product = tl.dot(left, right_, input_precision="ieee")
    if SPLIT:
        product += tl.dot(left, tl.trans(right_rest), input_precision="ieee")
        product += tl.dot(left_rest, right_, input_precision="ieee")
    return product


@triton.jit
def multiply(
    left, left_rest, right, right_rest,
    rows, row_rests, row_begin, row_count, columns, column_rests, column_begin, column_count,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Return the cosines of a tile; of rows too wide to be held, from a chunk at a time."""
    if WIDTH <= WHOLE:
        return _products(left, left_rest, right, right_rest, SPLIT)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[:, None]
    at = tl.cast(row_begin, tl.int64) * WIDTH + row * WIDTH
    along = tl.cast(column_begin, tl.int64) * WIDTH + column * WIDTH
    for start in range(0, WIDTH, CHUNK):
        within = start + tl.arange(0, CHUNK)[None, :]
        one = tl.load(rows + at + within, mask=row < row_count, other=0.0)
        other = tl.load(columns + along + within, mask=column < column_count, other=0.0)
        one_rest, other_rest = one, other
        if SPLIT:
            one_rest = tl.load(row_rests + at + within, mask=row < row_count, other=0.0)
            other_rest = tl.load(
                column_rests + along + within, mask=column < column_count, other=0.0
            )
        product += _products(one, one_rest, other, other_rest, SPLIT)
    return product


@triton.jit
def fixed_entries(scores, scale):
    """Return 2^((s - 1) scale); the GPU rounds the exponent once."""
    return tl.exp2(scores * scale - scale)


@triton.jit
def _opposite(index, tile, per_view, MARKED: tl.constexpr):
    """Return view and tile of the index-th tile of columns of a tile of rows, as in a circle.

    The tiles of both views lie on a circle. Each meets itself and the half that follows it, so that
    every two meet once and all have as much to do. MARKED are the tile opposite, which holds the
    positives and counts for the first view only, and the tile itself.
    """
    distance = per_view * (1 - index) if MARKED else index - 1
    other = tile + distance
    other = tl.where(other >= 2 * per_view, other - 2 * per_view, other)
    view = (other >= per_view).to(tl.int32)
    return view, other - view * per_view, distance


@triton.jit
def _add_tile(
    sums, top, index, tile, first, near, left, left_rest, rows, row_rests, row_begin, row_start,
    columns, column_rests, mirrored, pairs, column_pairs, position, scale,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
    SYMMETRIC: tl.constexpr, ONLINE: tl.constexpr, EVEN: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    """Add up the entries of one tile; MARKED blanks what is no negative."""
    per_view = tl.cdiv(column_pairs, COLUMNS)
    distance = 0
    if SYMMETRIC:
        view, number, distance = _opposite(index, tile, per_view, MARKED)
    else:
        view, number = listed(index, first, near, per_view, MARKED)
    start = number * COLUMNS
    begin = view * column_pairs + start
    right, right_rest = load_rows(
        columns, column_rests, begin, column_pairs - start, COLUMNS, WIDTH, SPLIT, EVEN
    )
    scores = multiply(
        left, left_rest, right, right_rest,
        rows, row_rests, row_begin, pairs - row_start,
        columns, column_rests, begin, column_pairs - start, WIDTH, ROWS, COLUMNS, SPLIT,
    )  # fmt: skip
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    is_column = column < column_pairs - start
    if MARKED:
        same = (position + row_start - start + row)[:, None] == column[None, :]
        scores = tl.where(same, float("-inf"), scores)
    if not EVEN:
        blank = ~is_column[None, :]
        if SYMMETRIC:
            blank |= (row >= pairs - row_start)[:, None]
        scores = tl.where(blank, float("-inf"), scores)
    if ONLINE:
        higher = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # inf - inf is no number
        sums = sums * tl.exp2((top - shift) * scale)
        sums += tl.sum(tl.exp2((scores - shift[:, None]) * scale), 1)
        top = higher
    else:
        entries = fixed_entries(scores, scale)
        sums += tl.sum(entries, 1)
        if SYMMETRIC:
            at = tl.program_id(0).to(tl.int64) * 2 * pairs + begin
            kept = is_column
            if MARKED:
                kept = is_column & (distance > 0)
            tl.store(mirrored + at + column, tl.sum(entries, 0), mask=kept)
    return sums, top


@triton.jit
def add_up(
    rows, row_rests, columns, column_rests, pieces, largest, mirrored,
    pairs, column_pairs, position, first_tile, stripe, scale,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VIEWS: tl.constexpr,
    SPLIT: tl.constexpr, SYMMETRIC: tl.constexpr, ONLINE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add up the entries of the negatives in one tile of rows and one stripe of columns.

    VIEWS is 2 for views and 1 for a queue, whose columns are negatives of every row. SYMMETRIC
    makes every two tiles meet once, and adds columns as well as rows. EVEN says that tiles fill the
    views.

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
    row_begin = view * pairs + row_start
    left, left_rest = load_rows(
        rows, row_rests, row_begin, pairs - row_start, ROWS, WIDTH, SPLIT, EVEN
    )
    per_view = tl.cdiv(column_pairs, COLUMNS)
    begin = tl.program_id(1) * stripe
    end = begin + stripe
    first, near, marked = 0, 0, 0
    if SYMMETRIC:
        end = tl.minimum(end, per_view + 1)
        begin = tl.maximum(begin, view)  # the second view leaves the tile opposite to the first
        marked = 2
    else:
        end = tl.minimum(end, VIEWS * per_view)
        if VIEWS == 2:
            first, near = meetings(position + row_start, ROWS, per_view, COLUMNS)
            marked = 2 * near
    sums = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    if VIEWS == 2:
        for index in range(begin, tl.minimum(end, marked)):
            sums, top = _add_tile(
                sums, top, index, tile, first, near,
                left, left_rest, rows, row_rests, row_begin, row_start,
                columns, column_rests, mirrored, pairs, column_pairs, position, scale,
                WIDTH, ROWS, COLUMNS, SPLIT, SYMMETRIC, ONLINE, EVEN, MARKED=True,
            )  # fmt: skip
    for index in range(tl.maximum(begin, marked), end):
        sums, top = _add_tile(
            sums, top, index, tile, first, near,
            left, left_rest, rows, row_rests, row_begin, row_start,
            columns, column_rests, mirrored, pairs, column_pairs, position, scale,
            WIDTH, ROWS, COLUMNS, SPLIT, SYMMETRIC, ONLINE, EVEN, MARKED=False,
        )  # fmt: skip
    row = tl.arange(0, ROWS)
    is_row = row < pairs - row_start
    at = tl.program_id(1).to(tl.int64) * 2 * pairs + row_begin
    tl.store(pieces + at + row, sums, mask=is_row)
    if ONLINE:
        tl.store(largest + at + row, top, mask=is_row)

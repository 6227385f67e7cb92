"""NT-Xent in tiles: logits are made, used and dropped tile by tile, forward and backward.

Nothing of size 2B x 2B is ever held. The forward pass keeps one sum per anchor; the backward pass
makes the logits again. Two routes give the same numbers:

* symmetric: s_ij = s_ji, so only tiles on and above the diagonal are made, and each serves its
  rows and its columns. It needs exp(s_ij) to fit the number format, which a bound on s guarantees,
  and all rows in one process.
* shifted: whole rows, less their own logarithm of sums, for any temperature and any norm. Of
  several processes each has the rows of its own anchors, and all columns. Since s_ij = s_ji, it
  finds its rows' whole gradient by itself, as soon as it knows the others' sums and weights.

Notation: z rows, s = z z' / T logits, p positives, r_i sums of exp(s_ij) over the negatives of i.
loss_i = log(1 + r_i / exp(p_i)), so with w_i = r_i / (r_i + exp(p_i))

    d loss_i / d s_ij = w_i exp(s_ij) / r_i        d loss_i / d p_i = -w_i
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from typing_extensions import override

from bigsimclr.world import World

SAFE_LOGIT = 40.0
"""exp(±40), and sums of 10^20 of them, are normal float32 numbers; above it rows are shifted."""


def tiled_anchor_losses(
    rows: Tensor,  # [2B, D] first views, then second views
    constants: Tensor,  # [Q, D] further negatives of every anchor, without gradient; Q may be 0
    *,
    temperature: float,
    row_chunk: int,
    largest: float,
    world: World,
) -> Tensor:
    """Return every anchor's loss [2B]; differentiable once, with respect to `rows`.

    Over several ranks these are the losses of this rank's anchors against all ranks' rows. Their
    gradient is that of the sum over ranks, which gathers rows without a gradient of their own.

    Args:
        rows: What is compared, as it is compared.
        constants: What it is compared with besides.
        temperature: Divides the inner products.
        row_chunk: Side of a tile of the symmetric route; anchors per chunk of the shifted one.
        largest: A bound on the absolute value of every logit; decides about the route.
        world: The ranks, each with as many rows.
    """
    pairs = rows.shape[0] // 2
    positives = (rows[:pairs] * rows[pairs:]).sum(1).repeat(2) / temperature
    route = _Symmetric if largest <= SAFE_LOGIT and world.size == 1 else _Shifted
    losses: Tensor = route.apply(  # type: ignore[no-untyped-call]
        rows, positives, constants, temperature, row_chunk, world
    )
    return losses


class _Saved(FunctionCtx):
    """What the forward pass leaves to the backward pass, beside the saved tensors."""

    saved_tensors: tuple[Tensor, ...]
    temperature: float
    row_chunk: int
    world: World


class _Symmetric(Function):
    """Losses from plain sums of exponentials; every tile serves its rows and its columns."""

    @staticmethod
    @override
    def forward(
        ctx: _Saved,
        rows: Tensor,
        positives: Tensor,
        constants: Tensor,
        temperature: float,
        row_chunk: int,
        world: World,
    ) -> Tensor:
        ctx.temperature, ctx.row_chunk = temperature, row_chunk
        sums = torch.zeros_like(positives)
        scaled = rows / temperature
        for row, column, tile in _upper_tiles(scaled, rows, row_chunk):
            sums[row] += tile.sum(1)
            if row != column:
                sums[column] += tile.sum(0)
        for row, _, tile in _constant_tiles(scaled, constants, row_chunk):
            sums[row] += tile.sum(1)
        ctx.save_for_backward(rows, positives, constants, sums)
        return torch.log1p(sums / positives.exp())

    @staticmethod
    @override
    def backward(ctx: _Saved, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        rows, positives, constants, sums = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            # r_i + exp(p_i) is never 0; r_i alone is, where an anchor has no negative.
            share = gradient / (sums + positives.exp())
            scaled = rows / ctx.temperature
            slopes = torch.zeros_like(rows)
            for row, column, tile in _upper_tiles(scaled, rows, ctx.row_chunk):
                tile.mul_(share[row, None] + share[None, column])
                slopes[row].addmm_(tile, scaled[column])
                if row != column:
                    slopes[column].addmm_(tile.T, scaled[row])
            for row, column, tile in _constant_tiles(scaled, constants, ctx.row_chunk):
                tile.mul_(share[row, None])
                slopes[row].addmm_(tile, constants[column], alpha=1.0 / ctx.temperature)
            return slopes, -share * sums, None, None, None, None


class _Shifted(Function):
    """Losses from logarithms of sums, whole rows at a time; safe for logits of any size."""

    @staticmethod
    @override
    def forward(
        ctx: _Saved,
        rows: Tensor,
        positives: Tensor,
        constants: Tensor,
        temperature: float,
        row_chunk: int,
        world: World,
    ) -> Tensor:
        ctx.temperature, ctx.row_chunk, ctx.world = temperature, row_chunk, world
        columns = world.gather_views(rows)
        sums = torch.empty_like(positives)
        for row, logits in _row_logits(rows, columns, constants, ctx):
            sums[row] = logits.logsumexp(1)
        # Without a negative the logarithm is -inf; a finite stand-in keeps inf - inf away.
        sums.clamp_(min=torch.finfo(sums.dtype).min)
        ctx.save_for_backward(rows, positives, columns, constants, sums)
        return -F.logsigmoid(positives - sums)

    @staticmethod
    @override
    def backward(ctx: _Saved, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        rows, positives, columns, constants, sums = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            weights = gradient * torch.sigmoid(sums - positives)
            known = ctx.world.gather_views(torch.stack([sums, weights], dim=1))
            all_sums, all_weights = known.unbind(1)
            slopes = torch.empty_like(rows)
            views = len(columns)
            for row, logits in _row_logits(rows, columns, constants, ctx):
                as_row = (logits - sums[row, None]).exp_().mul_(weights[row, None])
                # The same logits seen from their columns; constants are no anchors.
                as_column = logits[:, :views].sub_(all_sums).exp_().mul_(all_weights)
                as_row[:, :views] += as_column
                slopes[row] = as_row[:, :views] @ columns + as_row[:, views:] @ constants
            return slopes / ctx.temperature, -weights, None, None, None, None


def _refuse_second_derivative() -> None:
    """Stop a backward pass that is itself recorded.

    `torch.autograd.function.once_differentiable` lets it pass where the incoming gradient is a
    constant, as for any loss, and the second derivative would silently lack this loss's part.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "NT-Xent in chunks is differentiable once; row_chunk=None has second derivatives"
        )


def _upper_tiles(
    scaled: Tensor,  # [M, D] rows / T
    rows: Tensor,  # [M, D]
    side: int,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the tiles of exp(logits) on and above the diagonal, 0 where there is no negative.

    A tile is valid until the next one is asked for; the caller may change it.
    """
    pairs = rows.shape[0] // 2
    blocks = _blocks(rows.shape[0], side)
    buffer = _buffer(rows, side, rows.shape[0])
    for number, row in enumerate(blocks):
        for column in blocks[number:]:
            tile = _exponentials(buffer, scaled[row], rows[column])
            _blank(tile, row.start - column.start, pairs, value=0.0)
            yield row, column, tile


def _constant_tiles(
    scaled: Tensor,  # [M, D] rows / T
    constants: Tensor,  # [Q, D]
    side: int,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the tiles of exp(logits) between anchors and constants, all of them negatives."""
    buffer = _buffer(scaled, side, constants.shape[0])
    for row in _blocks(scaled.shape[0], side):
        for column in _blocks(constants.shape[0], side):
            yield row, column, _exponentials(buffer, scaled[row], constants[column])


def _row_logits(
    rows: Tensor,  # [2B, D] of this rank
    columns: Tensor,  # [M, D] of all ranks
    constants: Tensor,  # [Q, D]
    how: _Saved,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of logits [row_chunk, M + Q], -inf where there is no negative."""
    pairs, world = len(columns) // 2, how.world
    # Anchors whose columns are neighbours, too: with other ranks' between them, those of one view.
    run = len(rows) if world.size == 1 else len(rows) // 2
    for start in range(0, len(rows), run):
        for block in _blocks(run, how.row_chunk):
            row = slice(start + block.start, start + block.stop)
            logits = torch.cat([rows[row] @ columns.T, rows[row] @ constants.T], dim=1)
            logits /= how.temperature
            first = (start // run) * pairs + world.rank * run + block.start  # its column
            _blank(logits[:, : 2 * pairs], first, pairs, value=-torch.inf)
            yield row, logits


def _blank(tile: Tensor, offset: int, pairs: int, *, value: float) -> None:
    """Overwrite an anchor with itself and with its positive.

    Args:
        tile: Logits of some anchors and some columns.
        offset: First anchor less first column.
        pairs: Distance between an anchor and its positive.
        value: What stands for "no negative".
    """
    for diagonal in (offset - pairs, offset, offset + pairs):
        if -tile.shape[0] < diagonal < tile.shape[1]:
            tile.diagonal(diagonal).fill_(value)


def _exponentials(buffer: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return exp(left right') in the buffer, without allocating a tile."""
    tile = buffer[: len(left) * len(right)].view(len(left), len(right))
    return torch.mm(left, right.T, out=tile).exp_()


def _buffer(like: Tensor, side: int, columns: int) -> Tensor:
    """Return memory for one tile."""
    return like.new_empty(min(side, like.shape[0]) * min(side, columns))


def _blocks(count: int, side: int) -> list[slice]:
    """Return slices of at most `side` that cover `count`."""
    return [slice(start, min(start + side, count)) for start in range(0, count, side)]

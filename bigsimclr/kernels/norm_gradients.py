"""The gradient of batch norm with what follows it, the sum with a residual and ReLU, in two passes.

The first takes each channel's sums; where there is a residual before the ReLU it also writes the
gradient behind the ReLU, which is the residual's, so that the second need not look at the results.
The forward pass, and what the plain code is, is in `bigsimclr.kernels.norm_act`. Layout, tiles and
the order of sums are as in `bigsimclr.kernels.norm_statistics`.

Shapes: R = N x H x W rows, C channels, P programs along the rows.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigsimclr.kernels.norm_statistics import (
    JOINING_WARPS,
    Matrix,
    Tiles,
    load_channel,
    load_values,
    locate,
)

DIFFERENTIATE: Final = Tiles(values=2048, columns=64, warps=4)
REDUCE: Final = Tiles(values=2048, columns=64, warps=4, stages=3, programs=528)
"""As statistics are taken; of two or three tensors at least 64 KB are on their way."""


@triton.jit
def _activation(centred, scale, bias):
    """Compute again what a ReLU was given."""
    active = centred * scale
    if bias is not None:
        active += bias
    return active


@triton.jit(do_not_specialize=["rows", "programs"])
def reduce(
    gradient,
    inputs,
    outputs,
    mean,
    variance,
    weight,
    bias,
    gated,
    sums,
    rows,
    channels,
    programs,
    epsilon,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write each program's sums of the gradient, and of it times normalised inputs: [P, 2, C].

    Where the results are given, also the gradient that ReLU lets through.
    """
    strips = tl.cdiv(channels, COLUMNS)
    own = tl.program_id(0) // strips
    column = tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, ROWS)[:, None] * channels + column[None, :]
    centre = load_channel(mean, column, channels)
    inverse = tl.rsqrt(load_channel(variance, column, channels) + epsilon)
    scale = load_channel(weight, column, channels) * inverse
    offset = None if bias is None else load_channel(bias, column, channels)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    slope = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in tl.range(own, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        begin, is_inside = locate(tile, rows, column, channels, ROWS)
        upstream = load_values(gradient + begin, place, is_inside)
        if outputs is not None:
            active = load_values(outputs + begin, place, is_inside)
            upstream = tl.where(active <= 0.0, 0.0, upstream)  # NaN passes, as in PyTorch
            tl.store(gated + begin + place, upstream.to(gated.dtype.element_ty), mask=is_inside)
        centred = load_values(inputs + begin, place, is_inside) - centre
        if RELU and outputs is None:
            upstream = tl.where(_activation(centred, scale, offset) <= 0.0, 0.0, upstream)
        total += upstream
        slope += upstream * centred
    target = own * 2 * channels + column[None, :]
    is_channel = (column < channels)[None, :]
    tl.store(sums + target, tl.sum(total, 0)[None, :], mask=is_channel)
    tl.store(sums + channels + target, tl.sum(slope, 0)[None, :] * inverse, mask=is_channel)


@triton.jit(do_not_specialize=["programs"])
def join(
    parts,
    sums,
    columns,
    programs,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add what all programs summed, in their order: [2 C]."""
    part = tl.arange(0, PARTS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < columns
    is_inside = (part < programs) & is_column[None, :]
    values = load_values(parts, part * columns + column[None, :], is_inside)
    tl.store(sums + column, tl.sum(values, 0), mask=is_column)


@triton.jit(do_not_specialize=["rows"])
def differentiate(
    gradient,
    inputs,
    mean,
    variance,
    weight,
    bias,
    totals,
    input_gradient,
    rows,
    channels,
    share,
    epsilon,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write one tile of the gradient of the inputs."""
    strips = tl.cdiv(channels, COLUMNS)
    tile = tl.cdiv(rows, ROWS) - 1 - tl.program_id(0) // strips  # backwards, as in `norm_act.apply`
    column = tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, ROWS)[:, None] * channels + column[None, :]
    begin, is_inside = locate(tile, rows, column, channels, ROWS)
    upstream = load_values(gradient + begin, place, is_inside)
    centred = load_values(inputs + begin, place, is_inside) - load_channel(mean, column, channels)
    inverse = tl.rsqrt(load_channel(variance, column, channels) + epsilon)
    scale = load_channel(weight, column, channels) * inverse
    if RELU:
        offset = None if bias is None else load_channel(bias, column, channels)
        upstream = tl.where(_activation(centred, scale, offset) <= 0.0, 0.0, upstream)
    average = load_channel(totals, column, channels) * share
    slope = load_channel(totals + channels, column, channels) * share * inverse
    values = (upstream - average - centred * slope) * scale
    target = input_gradient + begin + place
    tl.store(target, values.to(input_gradient.dtype.element_ty), mask=is_inside)


def sum_gradients(
    gradient: Tensor,  # as inputs
    inputs: Tensor,  # [N, C] or [N, C, H, W] in channels_last
    outputs: Tensor | None,  # as inputs; where there is a residual before the ReLU
    channels: tuple[Tensor, Tensor, Tensor, Tensor | None],  # [C] mean, variance, weight, bias
    *,
    epsilon: float,
    relu: bool,
    tiles: Tiles = REDUCE,
) -> tuple[Tensor, Tensor]:  # [2, C] float32; as inputs
    """Take the first pass of the backward pass, over this rank's rows.

    Returns:
        The gradients of bias and weight; and the gradient that ReLU lets through, where the outputs
        say so, else the gradient as it came.
    """
    size = Matrix.again(inputs, tiles)
    programs, width = size.programs, 2 * size.channels
    parts = inputs.new_empty((programs, width), dtype=torch.float32)
    gated = None if outputs is None else torch.empty_like(gradient)
    reduce[(programs * size.strips,)](
        gradient,
        inputs,
        outputs,
        *channels,
        gated,
        parts,
        size.rows,
        size.channels,
        programs,
        epsilon,
        RELU=relu,
        ROWS=size.tile_rows,
        COLUMNS=size.tile_columns,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
    )
    sums = inputs.new_empty((2, size.channels), dtype=torch.float32)
    join[((width - 1) // size.joined_columns + 1,)](
        parts,
        sums,
        width,
        programs,
        PARTS=size.parts,
        COLUMNS=size.joined_columns,
        num_warps=JOINING_WARPS,
    )
    return sums, gradient if gated is None else gated


def differentiate_inputs(
    gradient: Tensor,  # as inputs, of `sum_gradients`
    inputs: Tensor,  # [N, C] or [N, C, H, W] in channels_last
    channels: tuple[Tensor, Tensor, Tensor, Tensor | None],  # [C] mean, variance, weight, bias
    totals: Tensor,  # [2, C] float32 of all ranks
    *,
    epsilon: float,
    relu: bool,
    ranks: int,
    tiles: Tiles = DIFFERENTIATE,
) -> Tensor:  # as inputs
    """Take the second pass of the backward pass.

    Args:
        gradient: of the results, or what ReLU let through of it.
        inputs: of the forward pass.
        channels: likewise.
        totals: of the first pass.
        epsilon: added to the variance.
        relu: the gradient still is that of a ReLU's results, without a residual before it.
        ranks: that share the statistics, each with as many rows.
        tiles: how it is cut.
    """
    size = Matrix.again(inputs, tiles)
    input_gradient = torch.empty_like(inputs)
    differentiate[(size.tiles * size.strips,)](
        gradient,
        inputs,
        *channels,
        totals,
        input_gradient,
        size.rows,
        size.channels,
        1.0 / (size.rows * ranks),
        epsilon,
        RELU=relu,
        ROWS=size.tile_rows,
        COLUMNS=size.tile_columns,
        num_warps=tiles.warps,
    )
    return input_gradient

"""Batch norm with what follows it, the sum with a residual and ReLU, in one pass each way.

The plain code is `bigsimclr.models.norm.BatchNorm`, with PyTorch's addition and ReLU behind it. The
statistics are made before, by `bigsimclr.kernels.norm_statistics`, and joined over the ranks; their
gradient is part of this one. Layout, tiles and the order of sums are as there.

Shapes: R = N x H x W rows, C channels, P programs along the rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable
from typing_extensions import override

from bigsimclr.kernels.norm_statistics import (
    DTYPES,
    Matrix,
    Tiles,
    load_channel,
    load_values,
    locate,
)

APPLY: Final = Tiles(values=2048, columns=64, warps=4)
DIFFERENTIATE: Final = APPLY
REDUCE: Final = Tiles(values=2048, columns=64, warps=4, stages=3, programs=528)
"""As statistics are taken; of two or three tensors at least 64 KB are on their way."""


@triton.jit
def _gate(upstream, centred, scale, bias, outputs, place, is_inside):
    """Let a gradient through where ReLU did: its result is known, or computed again."""
    if outputs is None:
        active = centred * scale
        if bias is not None:
            active += bias
    else:
        active = load_values(outputs, place, is_inside)
    return tl.where(active <= 0.0, 0.0, upstream)  # NaN passes, as in PyTorch


@triton.jit(do_not_specialize=["rows"])
def apply(
    inputs,
    mean,
    variance,
    weight,
    bias,
    residual,
    outputs,
    rows,
    channels,
    epsilon,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write one tile of the results."""
    strips = tl.cdiv(channels, COLUMNS)
    # Backwards: what was just summed up to its end may still be in the cache (50 MB of an H100).
    tile = tl.cdiv(rows, ROWS) - 1 - tl.program_id(0) // strips
    column = tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, ROWS)[:, None] * channels + column[None, :]
    begin, is_inside = locate(tile, rows, column, channels, ROWS)
    centred = load_values(inputs + begin, place, is_inside) - load_channel(mean, column, channels)
    spread = load_channel(variance, column, channels)
    scale = load_channel(weight, column, channels) * tl.rsqrt(spread + epsilon)
    values = centred * scale
    if bias is not None:
        values += load_channel(bias, column, channels)
    if residual is not None:
        values += load_values(residual + begin, place, is_inside)
    if RELU:
        values = tl.where(values <= 0.0, 0.0, values)  # NaN stays
    tl.store(outputs + begin + place, values.to(outputs.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["rows", "programs"])
def reduce(
    gradient,
    inputs,
    outputs,
    mean,
    variance,
    weight,
    bias,
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
    """Write each program's sums of the gradient, and of it times normalised inputs: [P, 2, C]."""
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
        centred = load_values(inputs + begin, place, is_inside) - centre
        if RELU:
            kept = None if outputs is None else outputs + begin
            upstream = _gate(upstream, centred, scale, offset, kept, place, is_inside)
        total += upstream
        slope += upstream * centred
    target = own * 2 * channels + column[None, :]
    is_channel = (column < channels)[None, :]
    tl.store(sums + target, tl.sum(total, 0)[None, :], mask=is_channel)
    tl.store(sums + channels + target, tl.sum(slope, 0)[None, :] * inverse, mask=is_channel)


@triton.jit(do_not_specialize=["rows"])
def differentiate(
    gradient,
    inputs,
    outputs,
    mean,
    variance,
    weight,
    bias,
    totals,
    input_gradient,
    residual_gradient,
    rows,
    channels,
    share,
    epsilon,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write one tile of the gradients of the inputs and of the residual."""
    strips = tl.cdiv(channels, COLUMNS)
    tile = tl.cdiv(rows, ROWS) - 1 - tl.program_id(0) // strips  # backwards, as in `apply`
    column = tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, ROWS)[:, None] * channels + column[None, :]
    begin, is_inside = locate(tile, rows, column, channels, ROWS)
    upstream = load_values(gradient + begin, place, is_inside)
    centred = load_values(inputs + begin, place, is_inside) - load_channel(mean, column, channels)
    inverse = tl.rsqrt(load_channel(variance, column, channels) + epsilon)
    scale = load_channel(weight, column, channels) * inverse
    if RELU:
        offset = None if bias is None else load_channel(bias, column, channels)
        kept = None if outputs is None else outputs + begin
        upstream = _gate(upstream, centred, scale, offset, kept, place, is_inside)
    if residual_gradient is not None:
        target = residual_gradient + begin + place
        tl.store(target, upstream.to(residual_gradient.dtype.element_ty), mask=is_inside)
    average = load_channel(totals, column, channels) * share
    slope = load_channel(totals + channels, column, channels) * share * inverse
    values = (upstream - average - centred * slope) * scale
    target = input_gradient + begin + place
    tl.store(target, values.to(input_gradient.dtype.element_ty), mask=is_inside)


def norm_act(
    inputs: Tensor,  # [N, C] or [N, C, H, W] in channels_last
    mean: Tensor,  # [C] float32, over all ranks' rows
    variance: Tensor,  # [C] float32, biased
    weight: Tensor,  # [C]
    bias: Tensor | None,  # [C]
    residual: Tensor | None = None,  # as inputs, of any of the types
    *,
    epsilon: float,
    relu: bool,
    ranks: int = 1,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # as inputs
    """Normalise, scale, add the residual, and cut at zero.

    Gradients flow to inputs, weight, bias and residual. What flows through the statistics is in the
    gradient of the inputs, and none is passed to mean and variance. Of tensors of the inputs' size,
    the inputs are kept for the backward pass, and the result where a residual comes before a ReLU.

    Args:
        inputs: what to normalise.
        mean: of `batch_statistics`, joined over the ranks.
        variance: likewise.
        weight: the scale.
        bias: added after the scale.
        residual: added after the bias.
        epsilon: added to the variance.
        relu: cut at zero.
        ranks: that share the statistics, each with as many rows.
        total: sums a tensor [2, C] over them, in the backward pass; needed where they are several.

    Raises:
        ValueError: the kernels do not take the inputs, or something does not fit them.
    """
    size = Matrix.of(inputs, APPLY)
    for name, values in (("mean", mean), ("variance", variance), ("weight", weight)):
        _check_channels(name, values, size.channels)
    if bias is not None:
        _check_channels("bias", bias, size.channels)
    if residual is not None and (residual.shape != inputs.shape or residual.dtype not in DTYPES):
        raise ValueError(
            f"the residual is {list(residual.shape)} {residual.dtype}, the inputs are "
            f"{list(inputs.shape)}; both need one shape, and 32 or 16 bits"
        )
    if ranks > 1 and total is None:
        raise ValueError(f"{ranks} ranks share statistics; give the function that sums over them")
    outputs: Tensor = _NormAct.apply(
        inputs, mean, variance, weight, bias, residual, _Way(epsilon, relu, ranks, total)
    )
    return outputs


def normalise(
    inputs: Tensor,  # [N, C] or [N, C, H, W] in channels_last
    channels: tuple[Tensor, Tensor, Tensor, Tensor | None],  # [C] mean, variance, weight, bias
    residual: Tensor | None,  # as inputs, in memory too
    *,
    epsilon: float,
    relu: bool,
    tiles: Tiles = APPLY,
) -> Tensor:  # as inputs
    """Take the forward pass; no gradient flows."""
    size = Matrix.of(inputs, tiles)
    outputs = torch.empty_like(inputs)
    apply[(size.tiles * size.strips,)](
        inputs,
        *channels,
        residual,
        outputs,
        size.rows,
        size.channels,
        epsilon,
        RELU=relu,
        ROWS=size.tile_rows,
        COLUMNS=size.tile_columns,
        num_warps=tiles.warps,
    )
    return outputs


def sum_gradients(
    gradient: Tensor,  # as inputs
    inputs: Tensor,  # [N, C] or [N, C, H, W] in channels_last
    outputs: Tensor | None,  # as inputs; where there is a residual before the ReLU
    channels: tuple[Tensor, Tensor, Tensor, Tensor | None],  # [C] mean, variance, weight, bias
    *,
    epsilon: float,
    relu: bool,
    tiles: Tiles = REDUCE,
) -> Tensor:  # [2, C] float32: the gradients of bias and weight
    """Take the first pass of the backward pass: sums over this rank's rows."""
    size = Matrix.of(inputs, tiles)
    sums = inputs.new_empty(size.programs, 2, size.channels, dtype=torch.float32)
    reduce[(size.programs * size.strips,)](
        gradient,
        inputs,
        outputs,
        *channels,
        sums,
        size.rows,
        size.channels,
        size.programs,
        epsilon,
        RELU=relu,
        ROWS=size.tile_rows,
        COLUMNS=size.tile_columns,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
    )
    return sums.sum(0)


def differentiate_inputs(
    gradient: Tensor,  # as inputs
    inputs: Tensor,  # [N, C] or [N, C, H, W] in channels_last
    outputs: Tensor | None,  # as inputs; where there is a residual before the ReLU
    channels: tuple[Tensor, Tensor, Tensor, Tensor | None],  # [C] mean, variance, weight, bias
    totals: Tensor,  # [2, C] float32 of all ranks
    *,
    residual_dtype: torch.dtype | None,  # None: no gradient of a residual is written
    epsilon: float,
    relu: bool,
    ranks: int,
    tiles: Tiles = DIFFERENTIATE,
) -> tuple[Tensor, Tensor | None]:  # as inputs: gradients of inputs and residual
    """Take the second pass of the backward pass."""
    size = Matrix.of(inputs, tiles)
    input_gradient = torch.empty_like(inputs)
    residual_gradient = (
        None if residual_dtype is None else torch.empty_like(inputs, dtype=residual_dtype)
    )
    differentiate[(size.tiles * size.strips,)](
        gradient,
        inputs,
        outputs,
        *channels,
        totals,
        input_gradient,
        residual_gradient,
        size.rows,
        size.channels,
        1.0 / (size.rows * ranks),
        epsilon,
        RELU=relu,
        ROWS=size.tile_rows,
        COLUMNS=size.tile_columns,
        num_warps=tiles.warps,
    )
    return input_gradient, residual_gradient


@dataclass(frozen=True)
class _Way:
    """How to normalise and to differentiate."""

    epsilon: float
    relu: bool
    ranks: int
    total: Callable[[Tensor], Tensor] | None


class _NormAct(Function):
    """The gradient of `norm_act`."""

    @staticmethod
    @override
    def forward(
        ctx: FunctionCtx,
        inputs: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        way: _Way,
    ) -> Tensor:
        outputs = normalise(
            inputs,
            (mean, variance, weight, bias),
            None if residual is None else _as_matrix(residual),
            epsilon=way.epsilon,
            relu=way.relu,
        )
        kept = outputs if way.relu and residual is not None else None
        ctx.save_for_backward(inputs, mean, variance, weight, bias, kept)  # type: ignore[arg-type]
        ctx.way = way  # type: ignore[attr-defined] # a context takes any attribute
        ctx.residual_dtype = None if residual is None else residual.dtype  # type: ignore[attr-defined]
        return outputs

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, *channels, outputs = ctx.saved_tensors  # type: ignore[attr-defined]
        mean, variance, weight, bias = channels
        way: _Way = ctx.way  # type: ignore[attr-defined]
        dtype: torch.dtype | None = ctx.residual_dtype  # type: ignore[attr-defined]
        upstream = _as_matrix(gradient)
        known = (upstream, inputs, outputs, (mean, variance, weight, bias))
        own = sum_gradients(*known, epsilon=way.epsilon, relu=way.relu)
        input_gradient, residual_gradient = differentiate_inputs(
            *known,
            own if way.total is None else way.total(own),
            residual_dtype=dtype if way.relu else None,
            epsilon=way.epsilon,
            relu=way.relu,
            ranks=way.ranks,
        )
        if dtype is not None and not way.relu:
            residual_gradient = gradient.to(dtype)  # as it came
        bias_gradient = None if bias is None else own[0].to(bias.dtype)
        weight_gradient = own[1].to(weight.dtype)
        return input_gradient, None, None, weight_gradient, bias_gradient, residual_gradient, None


def _as_matrix(tensor: Tensor) -> Tensor:
    """Copy a tensor that is no matrix in memory, such as the gradient of a mean."""
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return tensor.contiguous(memory_format=layout)


def _check_channels(name: str, values: Tensor, channels: int) -> None:
    if values.shape != (channels,) or not values.is_contiguous():
        raise ValueError(
            f"{name} is {list(values.shape)} for inputs of {channels} channels; give one value each"
        )

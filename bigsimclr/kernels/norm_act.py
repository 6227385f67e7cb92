"""Batch norm with what follows it, the sum with a residual and ReLU, in one pass each way.

The plain code is `bigsimclr.models.norm.BatchNorm`, with PyTorch's addition and ReLU behind it. The
statistics are made before, by `bigsimclr.kernels.norm_statistics`, and joined over the ranks; their
gradient is part of this one, which `bigsimclr.kernels.norm_gradients` takes. Layout and tiles are
as in the former.

Shapes: R = N x H x W rows, C channels.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable
from typing_extensions import override

from bigsimclr.kernels.norm_gradients import differentiate_inputs, sum_gradients
from bigsimclr.kernels.norm_statistics import (
    DTYPES,
    Matrix,
    Tiles,
    check_channels,
    load_channel,
    load_values,
    locate,
)

APPLY: Final = Tiles(values=2048, columns=64, warps=4)


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
        check_channels(name, values, size.channels)
    if bias is not None:
        check_channels("bias", bias, size.channels)
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
    size = Matrix.again(inputs, tiles)
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


class _Way(NamedTuple):
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
        inputs, mean, variance, weight, bias, outputs = ctx.saved_tensors  # type: ignore[attr-defined]
        way: _Way = ctx.way  # type: ignore[attr-defined]
        dtype: torch.dtype | None = ctx.residual_dtype  # type: ignore[attr-defined]
        channels = mean, variance, weight, bias
        own, upstream = sum_gradients(
            _as_matrix(gradient), inputs, outputs, channels, epsilon=way.epsilon, relu=way.relu
        )
        input_gradient = differentiate_inputs(
            upstream,
            inputs,
            channels,
            own if way.total is None else way.total(own),
            epsilon=way.epsilon,
            relu=way.relu and outputs is None,
            ranks=way.ranks,
        )
        own_bias, own_weight = own.unbind(0)
        return (
            input_gradient,
            None,
            None,
            _as_type(own_weight, weight.dtype),
            None if bias is None else _as_type(own_bias, bias.dtype),
            # As it came, or what ReLU let through of it: each value as it came, or zero. Nothing
            # has been rounded before the residual's type does it.
            None if dtype is None else _as_type(upstream if way.relu else gradient, dtype),
            None,
        )


def _as_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # PyTorch's own check that there is nothing to cast takes the host several times as long.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _as_matrix(tensor: Tensor) -> Tensor:
    """Copy a tensor that is no matrix in memory, such as the gradient of a mean."""
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return tensor.contiguous(memory_format=layout)

"""A pointwise convolution beside a shortcut, whose inputs get one gradient instead of a sum of two.

Autograd lets the convolution write a gradient of its inputs, and then adds it to the shortcut's:
four passes over the widest activations of a block. Here the product that makes the first adds it
to the second where that lies, which are two.

Shapes: N images, C channels in, F channels out, H x W positions.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from typing_extensions import override

from bigsimclr.models.layers import Convolution, computed_in, weight_of


def fork(
    convolution: Convolution,
    inputs: Tensor,  # [N, C, H, W]
) -> tuple[Tensor, Tensor]:  # [N, F, H, W] and [N, C, H, W]
    """Convolve inputs, and return them as well, for the shortcut.

    The values are those of the convolution and the inputs; gradients are theirs to rounding, and of
    first order only. The memory of the shortcut's gradient becomes that of the inputs': whatever
    else reads it must be behind the convolution's results, as a batch norm that adds the shortcut
    is, and a hook that keeps it must copy it. Hooks of the convolution are passed by.

    Args:
        convolution: 1x1, of stride 1.
        inputs: of any type; what does not suit is convolved as ever.
    """
    weight = weight_of(convolution)
    dtype = computed_in(weight)
    if not (torch.is_grad_enabled() and inputs.requires_grad and _suits(inputs, dtype)):
        return convolution(inputs), inputs
    outputs, beside = _Fork.apply(inputs, weight.to(dtype))  # type: ignore[no-untyped-call]
    return outputs, beside


def _suits(inputs: Tensor, dtype: torch.dtype) -> bool:
    # Of float32 PyTorch's convolutions may take TF32 on a GPU where its products do not.
    is_fast = not inputs.is_cuda or inputs.element_size() == 2
    return (
        is_fast
        and inputs.dtype == dtype
        and inputs.is_contiguous(memory_format=torch.channels_last)
    )


class _Fork(Function):
    """The gradient of `fork`."""

    @staticmethod
    @override
    def forward(ctx: FunctionCtx, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(inputs, weight)
        return F.conv2d(inputs, weight), inputs

    @staticmethod
    @override
    @once_differentiable
    def backward(
        ctx: FunctionCtx, gradient: Tensor, beside: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        inputs, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        of_weight = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            of_weight = torch.ops.aten.convolution_backward(
                gradient,
                inputs,
                weight,
                bias_sizes=None,
                stride=[1, 1],
                padding=[0, 0],
                dilation=[1, 1],
                transposed=False,
                output_padding=[0, 0],
                groups=1,
                output_mask=[False, True, False],
            )[1]
        # All who read the shortcut's gradient are done: this one comes from behind them.
        beside = beside.contiguous(memory_format=torch.channels_last)
        _rows(beside).addmm_(_rows(gradient), weight.flatten(1))
        return beside, of_weight


def _rows(
    images: Tensor,  # [N, C, H, W]
) -> Tensor:  # [N x H x W, C]
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])

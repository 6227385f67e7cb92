"""Convolution and dense layers with the official initial values, drawn from an explicit generator.

PyTorch's own layers draw from the global generator when they are built; these never do. On the
meta device nothing is drawn, so that the largest networks can be counted at once.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from typing_extensions import override

TRUNCATION = 2.0
"""Standard deviations at which the normal distribution of a convolution's weights is cut off."""
TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a unit normal distribution that is cut off at two."""
DENSE_STD = 0.01
_SAFE_WIDTH = 16
"""Channels from which on strided 1x1 convolutions are left to oneDNN. Below the width of its blocks
(8 on AVX2, 16 on AVX-512) a gradient is written beyond its buffer (uxlfoundation/oneDNN#6035)."""


class _Rounded(Function):
    """Compute with a rounded copy of a weight, whose gradient is the weight's."""

    @staticmethod
    @override
    def forward(ctx: FunctionCtx, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    @override
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def weight_of(
    layer: "Convolution | Dense",
) -> Tensor:  # as the layer's weight
    """Return what a layer computes with: under autocast its working copy, where it has one."""
    rounded = layer.working
    device = layer.weight.device.type
    if (
        rounded is None
        or not torch.is_autocast_enabled(device)
        or torch.get_autocast_dtype(device) != rounded.dtype
    ):
        return layer.weight
    weight: Tensor = _Rounded.apply(layer.weight, rounded)  # type: ignore[no-untyped-call]
    return weight


class WorkingWeights:
    """16-bit copies of a model's weights, all rounded at once instead of one by one by autocast.

    The weights themselves stay float32: the optimizer updates them, and checkpoints hold them. The
    numbers are those of autocast, to the bit.

    Args:
        model: its convolutions and dense layers compute with the copies under autocast.
        dtype: of the copies; copies are used where autocast wants this type.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        layers = [m for m in model.modules() if isinstance(m, Convolution | Dense)]
        for layer in layers:
            layer.working = torch.empty_like(layer.weight, dtype=dtype, requires_grad=False)
        self._layers = layers
        self.refresh()

    @property
    def copies(self) -> dict[Tensor, Tensor]:
        """Return the copies by their weights."""
        return {layer.weight: layer.working for layer in self._layers if layer.working is not None}

    @torch.no_grad()
    def refresh(self) -> None:
        """Round again what has changed; comes after every change of the weights."""
        copies = [layer.working for layer in self._layers if layer.working is not None]
        torch._foreach_copy_(copies, [layer.weight.detach() for layer in self._layers])


def _truncated_normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    # By the inverse of the distribution: PyTorch's function is another one in every few versions,
    # and some take 100 ns a value, which is minutes for a large network.
    edge = math.erf(TRUNCATION / math.sqrt(2.0))
    values = torch.empty(weight.shape, dtype=torch.float32, device=generator.device)
    values.uniform_(-edge, edge, generator=generator).erfinv_().mul_(std * math.sqrt(2.0))
    values.clamp_(-TRUNCATION * std, TRUNCATION * std)
    with torch.no_grad():
        weight.copy_(values)


def _normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    values = torch.empty(weight.shape, dtype=torch.float32, device=generator.device)
    values.normal_(std=std, generator=generator)
    with torch.no_grad():
        weight.copy_(values)


class Convolution(nn.Conv2d):
    """A convolution without bias, padded by (kernel - 1) / 2 zeros on every side.

    For odd kernels this is the official padding at any stride: SAME at stride 1, and the fixed
    padding of strided convolutions. Weights have standard deviation sqrt(1 / fan_in).

    Source: google-research/simclr resnet.py conv2d_fixed_padding, variance_scaling_initializer.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        kernel: int,
        stride: int = 1,
        generator: torch.Generator,
    ) -> None:
        padding = (kernel - 1) // 2
        super().__init__(in_width, out_width, kernel, stride=stride, padding=padding, bias=False)
        self.working: Tensor | None = None  # see `WorkingWeights`; no part of the state
        if not self.weight.is_meta:
            std = math.sqrt(1.0 / (in_width * kernel * kernel)) / TRUNCATED_STD
            _truncated_normal(self.weight, std, generator)
        self._skips_positions = kernel == 1 and stride > 1 and in_width < _SAFE_WIDTH

    @override
    def forward(
        self,
        images: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, C', H / stride, W / stride], rounded up
        """Convolve."""
        if self._skips_positions:
            # The same sums: what a stride passes over is left out beforehand.
            step = self.stride[0]
            return F.conv2d(images[:, :, ::step, ::step], weight_of(self))
        outputs: Tensor = self._conv_forward(images, weight_of(self), None)
        return outputs

    @override
    def reset_parameters(self) -> None:
        """Do nothing: the constructor draws the weights from its own generator."""


class FirstConvolution(Convolution):
    """A convolution of stride 2 over images, padded as all are.

    After `fuse_first_convolution` images of an even size are folded by a kernel before it, unless
    they want a gradient: the same sums in another order.
    """

    fused = False

    def __init__(self, out_width: int, *, kernel: int, generator: torch.Generator) -> None:
        super().__init__(3, out_width, kernel=kernel, stride=2, generator=generator)

    @override
    def forward(
        self,
        images: Tensor,  # [N, 3, H, W]
    ) -> Tensor:  # [N, C, H / 2, W / 2], rounded up
        """Convolve."""
        if self.fused:
            from bigsimclr.kernels.fold import fold_images, fold_weight, suits

            kernel = self.kernel_size[0]
            if suits(kernel, images):
                weight = weight_of(self)
                folded = fold_images(images, kernel=kernel, dtype=computed_in(weight))
                return F.conv2d(folded, fold_weight(weight))
        return super().forward(images)


def fuse_first_convolution(model: nn.Module) -> None:
    """Let every `FirstConvolution` in `model` fold its images by `bigsimclr.kernels.fold`."""
    for module in model.modules():
        if isinstance(module, FirstConvolution):
            module.fused = True


def computed_in(
    weight: Tensor,  # [F, C, k, k]
) -> torch.dtype:
    """Return the type that a convolution with a weight computes in."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class Dense(nn.Linear):
    """A dense layer with weights from N(0, 0.01), or zero without a generator; its bias is zero.

    Source: google-research/simclr model_util.py linear_layer.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        has_bias: bool,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(in_width, out_width, bias=has_bias)
        self.working: Tensor | None = None
        if self.weight.is_meta:
            return
        if generator is None:
            nn.init.zeros_(self.weight)
        else:
            _normal(self.weight, DENSE_STD, generator)
        if has_bias:
            nn.init.zeros_(self.bias)

    @override
    def forward(
        self,
        inputs: Tensor,  # [N, in_width]
    ) -> Tensor:  # [N, out_width]
        """Multiply, and add the bias."""
        return F.linear(inputs, weight_of(self), self.bias)

    @override
    def reset_parameters(self) -> None:
        """Do nothing: the constructor draws the weights from its own generator."""

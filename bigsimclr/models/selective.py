"""The selective-kernel convolution: two streams, mixed by weights that each image chooses.

Shapes: N images, C channels in, F channels per stream, M channels of the bottleneck, H x W.
"""

import torch
from torch import Tensor, nn
from typing_extensions import override

from bigsimclr.models.anatomy import selective_width
from bigsimclr.models.layers import Convolution
from bigsimclr.models.norm import EPSILON, BatchNorm


class SelectiveKernel(nn.Module):
    """Convolve into two streams, then sum them with per-image, per-channel softmax weights.

    It stands in place of a bottleneck's 3x3 convolution, batch norm and ReLU. The streams are the
    two halves of one 3x3 convolution of doubled width, not kernels of two sizes.

    Source: google-research/simclr resnet.py sk_conv2d.
    """

    fused = False

    def __init__(
        self, in_width: int, width: int, *, stride: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        chosen_width = selective_width(width)
        self.conv = Convolution(in_width, 2 * width, kernel=3, stride=stride, generator=generator)
        self.bn = BatchNorm(2 * width)
        self.reduce = Convolution(width, chosen_width, kernel=1, generator=generator)
        self.reduce_bn = BatchNorm(chosen_width)
        self.expand = Convolution(chosen_width, 2 * width, kernel=1, generator=generator)

    @override
    def forward(
        self,
        inputs: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, F, H / stride, W / stride]
        """Mix the two streams."""
        streams = self.conv(inputs)
        if self.fused and self._is_for_kernels(streams):
            return self._mix_fused(streams)
        streams = self.bn(streams, relu=True)
        # The mean of the sum is the sum of the means: no stream-sized sum is written to memory.
        first_mean, second_mean = streams.mean(dim=(2, 3), keepdim=True).chunk(2, dim=1)
        weights = self._choose(first_mean + second_mean)
        first, second = streams.chunk(2, dim=1)
        mixed: Tensor = first * weights[:, 0] + second * weights[:, 1]
        return mixed

    def _choose(
        self,
        pooled: Tensor,  # [N, F, 1, 1]
    ) -> Tensor:  # [N, 2, F, 1, 1]
        chosen = self.reduce_bn(self.reduce(pooled), relu=True)
        weights: Tensor = self.expand(chosen).unflatten(1, (2, -1)).softmax(dim=1)
        return weights

    def _is_for_kernels(self, streams: Tensor) -> bool:
        from bigsimclr.kernels.norm_statistics import suits

        # Between its two passes, a checkpointed network may have been put in evaluation mode.
        is_repeated = self.bn.note is not None and self.bn.note.written
        return (self.bn.training or is_repeated) and suits(streams)

    def _mix_fused(
        self,
        streams: Tensor,  # [N, 2F, H, W] before batch norm
    ) -> Tensor:  # [N, F, H, W]
        from bigsimclr.kernels.select import Handover, Norm, mix, pool

        bn = self.bn
        if bn.bias is None:
            raise AssertionError("the batch norm of two streams has a bias")
        mean, variance = bn.training_statistics(streams)
        norm = Norm(mean, variance, bn.weight, bn.bias, epsilon=EPSILON, world=bn.world)
        handover = Handover()
        first_mean, second_mean = pool(streams, norm, handover).chunk(2, dim=1)
        pooled = (first_mean + second_mean).to(self.reduce.weight.dtype)
        weights = self._choose(pooled[:, :, None, None])
        return mix(streams, norm, weights.flatten(1), handover)


def fuse_selective_kernels(model: nn.Module) -> None:
    """Let every `SelectiveKernel` in `model` train with the kernels of `bigsimclr.kernels.select`.

    They take channels_last inputs in float32 or 16 bits; all others, and evaluation, stay plain.
    """
    for module in model.modules():
        if isinstance(module, SelectiveKernel):
            module.fused = True

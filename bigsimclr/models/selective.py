"""The selective-kernel convolution: two streams, mixed by weights that each image chooses.

Shapes: N images, C channels in, F channels per stream, M channels of the bottleneck, H x W.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from bigsimclr.models.anatomy import selective_width
from bigsimclr.models.layers import Convolution
from bigsimclr.models.norm import BatchNorm


class SelectiveKernel(nn.Module):
    """Convolve into two streams, then sum them with per-image, per-channel softmax weights.

    It stands in place of a bottleneck's 3x3 convolution, batch norm and ReLU. The streams are the
    two halves of one 3x3 convolution of doubled width, not kernels of two sizes.

    Source: google-research/simclr resnet.py sk_conv2d.
    """

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
        streams = F.relu(self.bn(self.conv(inputs)), inplace=True)
        # The mean of the sum is the sum of the means: no stream-sized sum is written to memory.
        first_mean, second_mean = streams.mean(dim=(2, 3), keepdim=True).chunk(2, dim=1)
        chosen = F.relu(self.reduce_bn(self.reduce(first_mean + second_mean)), inplace=True)
        weights = self.expand(chosen).unflatten(1, (2, -1)).softmax(dim=1)  # [N, 2, F, 1, 1]
        first, second = streams.chunk(2, dim=1)
        mixed: Tensor = first * weights[:, 0] + second * weights[:, 1]
        return mixed

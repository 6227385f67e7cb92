"""ResNet of the official SimCLR code, of any depth and width, with or without selective kernels.

Shapes: N images, H x W pixels or positions, C channels, F = feature width.

Parameter names are those of torchvision and timm (`conv1`, `bn1`, `layer1.0.conv1`,
`layer1.0.downsample.0`). Modules are registered in the order in which the official code creates
its variables, shortcut first, so that the two can be matched by position. Unlike torchvision, the
first block of *every* group has a convolution in its shortcut, also in ResNet-18 and -34.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from bigsimclr.models.anatomy import DEPTHS, EXPANSION, GROUP_WIDTHS, scaled, stem_width
from bigsimclr.models.fork import fork
from bigsimclr.models.layers import Convolution, FirstConvolution
from bigsimclr.models.memory import Recomputed
from bigsimclr.models.norm import BatchNorm
from bigsimclr.models.selective import SelectiveKernel


class SameMaxPool(nn.Module):
    """3x3 max-pool of stride 2, padded as TensorFlow's SAME.

    Even sizes are padded by one at the end only, odd sizes on both sides; padding never wins.

    After `fuse_max_pool` inputs of 16 or 32 bits in channels_last pass kernels of our own.

    Source: google-research/simclr resnet.py resnet_v1_generator.
    """

    fused = False

    @override
    def forward(
        self,
        inputs: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, C, ceil(H / 2), ceil(W / 2)]
        """Take the maximum of each window."""
        if self.fused:
            from bigsimclr.kernels import max_pool

            if max_pool.suits(inputs):
                return max_pool.max_pool(inputs)
        height, width = inputs.shape[-2:]
        # ceil_mode lets the last window hang over the end, which is the padding at the end.
        return F.max_pool2d(inputs, 3, stride=2, padding=(height % 2, width % 2), ceil_mode=True)


class ShortcutPool(nn.Module):
    """The 2x2 average pool of a ResNet-D shortcut, with the official treatment of borders.

    Stride 2 pads odd sizes with a zero at the end, which counts in the mean. Stride 1 also
    reaches one past the end, but there only cells inside the image count.

    Source: google-research/simclr resnet.py bottleneck_block, tf2/resnet.py.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    @override
    def forward(
        self,
        inputs: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, C, ceil(H / stride), ceil(W / stride)]
        """Average each window."""
        if self.stride == 1:
            # PyTorch pads both sides alike: the first row and column are surplus.
            pooled = F.avg_pool2d(inputs, 2, stride=1, padding=1, count_include_pad=False)
            return pooled[:, :, 1:, 1:]
        height, width = inputs.shape[-2:]
        if height % 2 or width % 2:
            inputs = F.pad(inputs, (0, width % 2, 0, height % 2))
        return F.avg_pool2d(inputs, 2, stride=2)

    @override
    def extra_repr(self) -> str:
        return f"stride={self.stride}"


def _shortcut(
    in_width: int, out_width: int, *, stride: int, pooled: bool, generator: torch.Generator
) -> nn.Sequential:
    norm = BatchNorm(out_width)
    if pooled:
        convolution = Convolution(in_width, out_width, kernel=1, generator=generator)
        return nn.Sequential(ShortcutPool(stride), convolution, norm)
    convolution = Convolution(in_width, out_width, kernel=1, stride=stride, generator=generator)
    return nn.Sequential(convolution, norm)


class BasicBlock(Recomputed):
    """Two 3x3 convolutions beside a shortcut; the last scale starts at zero.

    Source: google-research/simclr tf2/resnet.py ResidualBlock.
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        *,
        stride: int,
        projects: bool,
        selective_kernel: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.downsample = (
            _shortcut(in_width, width, stride=stride, pooled=selective_kernel, generator=generator)
            if projects
            else None
        )
        self.conv1 = Convolution(in_width, width, kernel=3, stride=stride, generator=generator)
        self.bn1 = BatchNorm(width)
        self.conv2 = Convolution(width, width, kernel=3, generator=generator)
        self.bn2 = BatchNorm(width, zero_scale=True)

    @override
    def forward(
        self,
        inputs: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, width, H / stride, W / stride]
        """Add the residual to the shortcut."""
        return self.compute(self._add_residual, inputs, norms_in=(self,))

    def _add_residual(self, inputs: Tensor) -> Tensor:
        shortcut = inputs if self.downsample is None else self.downsample(inputs)
        hidden = self.bn1(self.conv1(inputs), relu=True)
        outputs: Tensor = self.bn2(self.conv2(hidden), shortcut, relu=True)
        return outputs


class Bottleneck(Recomputed):
    """1x1, 3x3 or selective-kernel, and 1x1 convolutions beside a shortcut.

    The stride is on the middle convolution; the last scale starts at zero.

    After `fork_bottlenecks` the gradients of its two branches are added up by a matrix product.

    Source: google-research/simclr resnet.py bottleneck_block.
    """

    forked = False

    def __init__(
        self,
        in_width: int,
        width: int,
        *,
        stride: int,
        projects: bool,
        selective_kernel: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        out_width = EXPANSION * width
        self.downsample = (
            _shortcut(
                in_width, out_width, stride=stride, pooled=selective_kernel, generator=generator
            )
            if projects
            else None
        )
        self.conv1 = Convolution(in_width, width, kernel=1, generator=generator)
        self.bn1 = BatchNorm(width)
        if selective_kernel:
            self.conv2: nn.Module = SelectiveKernel(
                width, width, stride=stride, generator=generator
            )
            self.bn2 = None  # the selective kernel normalises inside
        else:
            self.conv2 = Convolution(width, width, kernel=3, stride=stride, generator=generator)
            self.bn2 = BatchNorm(width)
        self.conv3 = Convolution(width, out_width, kernel=1, generator=generator)
        self.bn3 = BatchNorm(out_width, zero_scale=True)

    @override
    def forward(
        self,
        inputs: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, 4 width, H / stride, W / stride]
        """Add the residual to the shortcut."""
        return self.compute(self._add_residual, inputs, norms_in=(self,), repeats_last=True)

    def _add_residual(self, inputs: Tensor) -> Tensor:
        if self.forked:
            hidden, inputs = fork(self.conv1, inputs)
        else:
            hidden = self.conv1(inputs)
        shortcut = inputs if self.downsample is None else self.downsample(inputs)
        hidden = self.conv2(self.bn1(hidden, relu=True))
        if self.bn2 is not None:
            hidden = self.bn2(hidden, relu=True)
        outputs: Tensor = self.bn3(self.conv3(hidden), shortcut, relu=True)
        return outputs


class PooledStem(nn.Sequential):
    """The three convolutions of a ResNet-D stem, and what lies between them.

    Each batch norm does the work of the ReLU behind it, which keeps its place for the names.

    Source: google-research/simclr resnet.py resnet_v1_generator.
    """

    def __init__(self, width: int, generator: torch.Generator) -> None:
        half = width // 2
        super().__init__(
            FirstConvolution(half, kernel=3, generator=generator),
            BatchNorm(half),
            nn.ReLU(),
            Convolution(half, half, kernel=3, generator=generator),
            BatchNorm(half),
            nn.ReLU(),
            Convolution(half, width, kernel=3, generator=generator),
        )

    @override
    def forward(
        self,
        images: Tensor,  # [N, 3, H, W]
    ) -> Tensor:  # [N, C, H / 2, W / 2]
        """Convolve three times."""
        first, first_norm, _, second, second_norm, _, last = self
        hidden = first_norm(first(images), relu=True)
        hidden = second_norm(second(hidden), relu=True)
        outputs: Tensor = last(hidden)
        return outputs


class ResNet(Recomputed):
    """Encode images as the mean of the last group's activations.

    Args:
        depth: A key of `DEPTHS`. 10 is ours, for small images and machines.
        width: Multiplier of every channel count.
        selective_kernel: Selective kernels in bottleneck blocks, and for every depth the ResNet-D
            shortcut and (with the imagenet stem) the three-convolution ResNet-D stem.
        stem: imagenet divides the resolution by 4; cifar keeps it.
        generator: Draws the initial weights; read in the order of the modules. None: PyTorch's
            own, which `torch.manual_seed` sets.

    Raises:
        ValueError: the depth or the stem is not known, or the width leaves no channel.

    Source: google-research/simclr resnet.py, tf2/resnet.py.
    """

    def __init__(
        self,
        depth: int,
        *,
        width: float = 1.0,
        selective_kernel: bool = False,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        generator = generator or torch.default_generator
        if depth not in DEPTHS:
            raise ValueError(f"depth {depth} is not one of {', '.join(map(str, DEPTHS))}")
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem {stem!r} is neither imagenet nor cifar")
        in_width = stem_width(width)
        plan = DEPTHS[depth]
        self.conv1: nn.Module
        if stem == "cifar":
            self.conv1 = Convolution(3, in_width, kernel=3, generator=generator)
        elif selective_kernel:
            self.conv1 = PooledStem(in_width, generator)
        else:
            self.conv1 = FirstConvolution(in_width, kernel=7, generator=generator)
        self.bn1 = BatchNorm(in_width)
        self.maxpool = nn.Identity() if stem == "cifar" else SameMaxPool()

        groups: list[nn.Sequential] = []
        for number, (blocks, channels) in enumerate(zip(plan.blocks, GROUP_WIDTHS, strict=True)):
            inner = scaled(channels, width)
            group = nn.Sequential()
            for index in range(blocks):
                group.append(
                    (Bottleneck if plan.bottleneck else BasicBlock)(
                        in_width,
                        inner,
                        stride=2 if index == 0 and number > 0 else 1,
                        projects=index == 0,
                        selective_kernel=selective_kernel,
                        generator=generator,
                    )
                )
                in_width = EXPANSION * inner if plan.bottleneck else inner
            groups.append(group)
        self.layer1, self.layer2, self.layer3, self.layer4 = groups
        self.feature_width = in_width

    @override
    def forward(
        self,
        images: Tensor,  # [N, 3, H, W] in [0, 1]
    ) -> Tensor:  # [N, F]
        """Encode images."""
        hidden = self.compute(self._pass_stem, images, norms_in=(self.conv1, self.bn1))
        for group in (self.layer1, self.layer2, self.layer3, self.layer4):
            hidden = group(hidden)
        features: Tensor = hidden.mean(dim=(2, 3))
        return features

    def _pass_stem(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.maxpool(self.bn1(self.conv1(images), relu=True))
        return hidden


def fuse_max_pool(model: nn.Module) -> None:
    """Let every `SameMaxPool` in `model` use the kernels of `bigsimclr.kernels.max_pool`.

    They choose the values that PyTorch chooses, and keep a byte for each where it keeps eight.
    """
    for module in model.modules():
        if isinstance(module, SameMaxPool):
            module.fused = True


def fork_bottlenecks(model: nn.Module) -> None:
    """Let every `Bottleneck` in `model` pass its inputs to both branches by `models.fork`."""
    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.forked = True

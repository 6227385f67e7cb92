"""The networks of the paper in plain PyTorch, as a careful user writes them without this package.

`torch.nn` layers and functions only. Names of parameters are those of `bigsimclr.models`, so that
both can start from the same weights.
"""

from functools import partial

import torch
import torch.compiler.config
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from bigsimclr.models import Architecture
from bigsimclr.models.anatomy import (
    DEPTHS,
    EXPANSION,
    GROUP_WIDTHS,
    scaled,
    selective_width,
    stem_width,
)


def _convolution(in_width: int, out_width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_width, out_width, kernel, stride, padding=kernel // 2, bias=False)


class _ShortcutPool(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        if self.stride == 1:
            pooled = F.avg_pool2d(inputs, 2, stride=1, padding=1, count_include_pad=False)
            return pooled[:, :, 1:, 1:]
        height, width = inputs.shape[-2:]
        return F.avg_pool2d(F.pad(inputs, (0, width % 2, 0, height % 2)), 2)


def _shortcut(in_width: int, out_width: int, stride: int, *, pooled: bool) -> nn.Sequential:
    first = [_ShortcutPool(stride)] if pooled else []
    convolution = _convolution(in_width, out_width, 1, 1 if pooled else stride)
    return nn.Sequential(*first, convolution, nn.BatchNorm2d(out_width))


class _SelectiveKernel(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        chosen = selective_width(width)
        self.conv, self.bn = _convolution(width, 2 * width, 3, stride), nn.BatchNorm2d(2 * width)
        self.reduce, self.reduce_bn = _convolution(width, chosen, 1), nn.BatchNorm2d(chosen)
        self.expand = _convolution(chosen, 2 * width, 1)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        streams = F.relu(self.bn(self.conv(inputs)), inplace=True).unflatten(1, (2, -1))
        means = streams.sum(dim=1).mean(dim=(2, 3), keepdim=True)
        chosen = F.relu(self.reduce_bn(self.reduce(means)), inplace=True)
        weights = self.expand(chosen).unflatten(1, (2, -1)).softmax(dim=1)
        mixed: Tensor = (streams * weights).sum(dim=1)
        return mixed


class _Block(nn.Module):
    """A basic block or a bottleneck."""

    def __init__(
        self,
        in_width: int,
        width: int,
        stride: int,
        *,
        bottleneck: bool,
        selective: bool,
        projects: bool,
    ) -> None:
        super().__init__()
        out_width = EXPANSION * width if bottleneck else width
        self.downsample = (
            _shortcut(in_width, out_width, stride, pooled=selective) if projects else None
        )
        first = 1 if bottleneck else 3
        self.conv1 = _convolution(in_width, width, first, 1 if bottleneck else stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2: nn.Module
        self.bn2: nn.Module
        if bottleneck and selective:
            self.conv2, self.bn2 = _SelectiveKernel(width, stride), nn.Identity()
        else:
            self.conv2 = _convolution(width, width, 3, stride if bottleneck else 1)
            self.bn2 = nn.BatchNorm2d(width)
        if bottleneck:
            self.conv3, self.bn3 = _convolution(width, out_width, 1), nn.BatchNorm2d(out_width)
        self.bottleneck = bottleneck

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        shortcut = inputs if self.downsample is None else self.downsample(inputs)
        hidden = F.relu(self.bn1(self.conv1(inputs)), inplace=True)
        hidden = self.bn2(self.conv2(hidden))
        if self.bottleneck:
            if not isinstance(self.bn2, nn.Identity):
                hidden = F.relu(hidden, inplace=True)
            hidden = self.bn3(self.conv3(hidden))
        hidden += shortcut
        return F.relu(hidden, inplace=True)


class _HeadLayer(nn.Module):
    def __init__(self, in_width: int, out_width: int, *, is_last: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(in_width, out_width, bias=False)
        self.bn = nn.BatchNorm1d(out_width)
        if is_last:
            self.bn.register_parameter("bias", None)
        self.is_last = is_last

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.bn(self.dense(inputs))
        return outputs if self.is_last else F.relu(outputs, inplace=True)


class _Backbone(nn.Module):
    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        section, plan = architecture.backbone, DEPTHS[architecture.backbone.depth]
        in_width = stem_width(section.width)
        half = in_width // 2
        self.is_small = section.stem == "cifar"
        self.conv1: nn.Module
        if self.is_small:
            self.conv1 = _convolution(3, in_width, 3)
        elif section.selective_kernel:
            self.conv1 = nn.Sequential(
                *(_convolution(3, half, 3, 2), nn.BatchNorm2d(half), nn.ReLU(inplace=True)),
                *(_convolution(half, half, 3), nn.BatchNorm2d(half), nn.ReLU(inplace=True)),
                _convolution(half, in_width, 3),
            )
        else:
            self.conv1 = _convolution(3, in_width, 7, 2)
        self.bn1 = nn.BatchNorm2d(in_width)
        groups = []
        for number, (blocks, channels) in enumerate(zip(plan.blocks, GROUP_WIDTHS, strict=True)):
            width = scaled(channels, section.width)
            group = nn.Sequential()
            for index in range(blocks):
                group.append(
                    _Block(
                        in_width,
                        width,
                        2 if number and not index else 1,
                        bottleneck=plan.bottleneck,
                        selective=section.selective_kernel,
                        projects=index == 0,
                    )
                )
                in_width = EXPANSION * width if plan.bottleneck else width
            groups.append(group)
        self.layer1, self.layer2, self.layer3, self.layer4 = groups
        self.feature_width = in_width

    def stem(self, images: Tensor) -> Tensor:
        """Return what the first block takes."""
        hidden = F.relu(self.bn1(self.conv1(images)), inplace=True)
        if not self.is_small:
            sides = (hidden.shape[-2] % 2, hidden.shape[-1] % 2)
            hidden = F.max_pool2d(hidden, 3, stride=2, padding=sides, ceil_mode=True)
        return hidden

    @override
    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        for group in (self.layer1, self.layer2, self.layer3, self.layer4):
            hidden = group(hidden)
        return hidden.mean(dim=(2, 3))


class _Head(nn.Module):
    def __init__(self, in_width: int, layers: int, output_width: int) -> None:
        super().__init__()
        widths = [in_width] * layers + [output_width]
        self.layers = nn.ModuleList(
            _HeadLayer(widths[index], widths[index + 1], is_last=index == layers - 1)
            for index in range(layers)
        )

    @override
    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers:
            features = layer(features)
        return features


class PlainNetwork(nn.Module):
    """Backbone and projection head; images [N, 3, H, W] to projections [N, D]."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        head = architecture.head
        assert head is not None
        self.backbone = _Backbone(architecture)
        self.head = _Head(self.backbone.feature_width, head.layers, head.output_width)

    @override
    def forward(self, images: Tensor) -> Tensor:
        projections: Tensor = self.head(self.backbone(images))
        return projections


def compile_blocks(model: PlainNetwork) -> None:
    """Let the stem, blocks and layers of the head be compiled, each kind of them once.

    The kinds of a ResNet-152 are a dozen, so that this takes a fraction of what it takes to compile
    all of it, and what can be fused lies within a block.
    """
    torch.compiler.config.recompile_limit = 64  # of one function: that many kinds of blocks
    kinds: tuple[type[nn.Module], ...] = (_Block, _HeadLayer)
    model.backbone.stem = torch.compile(model.backbone.stem, dynamic=False)  # type: ignore[method-assign]
    for kind in kinds:
        # One function for all of a kind: its builds are found again by another block.
        compiled = torch.compile(kind.forward, dynamic=False)
        for module in model.modules():
            if isinstance(module, kind):
                module.forward = partial(compiled, module)


def plain_network(architecture: Architecture, weights: dict[str, Tensor]) -> PlainNetwork:
    """Build the plain network around copies of the weights of ours."""
    with torch.device("meta"):
        model = PlainNetwork(architecture)
    model = model.to_empty(device="cpu")
    lacking = model.load_state_dict(weights, strict=False)
    assert not lacking.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in lacking.missing_keys)
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return model.train()

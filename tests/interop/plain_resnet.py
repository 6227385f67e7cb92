"""The ResNet of torchvision and timm, written out in plain PyTorch, and stand-ins for the two."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from typing_extensions import override


def _normed(in_width: int, out_width: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    padding = kernel // 2
    convolution = nn.Conv2d(in_width, out_width, kernel, stride, padding, bias=False)
    return [convolution, nn.BatchNorm2d(out_width)]


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _normed(in_width, width, 3, stride)
        self.conv2, self.bn2 = _normed(width, width, 3)
        if stride != 1 or in_width != width:
            self.downsample = nn.Sequential(*_normed(in_width, width, 1, stride))
        else:
            self.downsample = None

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        shortcut = inputs if self.downsample is None else self.downsample(inputs)
        hidden = self.bn1(self.conv1(inputs)).relu()
        return (self.bn2(self.conv2(hidden)) + shortcut).relu()


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        out_width = self.expansion * width
        self.conv1, self.bn1 = _normed(in_width, width, 1)
        self.conv2, self.bn2 = _normed(width, width, 3, stride)
        self.conv3, self.bn3 = _normed(width, out_width, 1)
        if stride != 1 or in_width != out_width:
            self.downsample = nn.Sequential(*_normed(in_width, out_width, 1, stride))
        else:
            self.downsample = None

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        shortcut = inputs if self.downsample is None else self.downsample(inputs)
        hidden = self.bn1(self.conv1(inputs)).relu()
        hidden = self.bn2(self.conv2(hidden)).relu()
        return (self.bn3(self.conv3(hidden)) + shortcut).relu()


class ResNet(nn.Module):
    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.maxpool: nn.Module = nn.MaxPool2d(3, 2, 1)
        in_width = 64
        for number, blocks in enumerate(layers):
            group = nn.Sequential()
            for index in range(blocks):
                stride = 2 if number and not index else 1
                group.append(block(in_width, 64 << number, stride))
                in_width = (64 << number) * block.expansion
            setattr(self, f"layer{number + 1}", group)
        self.fc: nn.Module = nn.Linear(in_width, num_classes) if num_classes else nn.Identity()

    @override
    def forward(self, images: Tensor) -> Tensor:
        hidden = self.maxpool(self.bn1(self.conv1(images)).relu())
        for group in (self.layer1, self.layer2, self.layer3, self.layer4):
            hidden = group(hidden)
        return self.fc(hidden.mean(dim=(2, 3)))


_DEPTHS = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}


def _built(
    block: type[BasicBlock | Bottleneck], layers: Sequence[int], num_classes: int = 1000
) -> ResNet:
    with torch.device("meta"):  # no draws: loading with strict names fills every tensor
        model = ResNet(block, layers, num_classes)
    return model.to_empty(device="cpu")


def torchvision() -> SimpleNamespace:
    """Stand in for `import torchvision`."""
    functions = {
        name: lambda num_classes=1000, parts=parts: _built(*parts, num_classes)
        for name, parts in _DEPTHS.items()
    }
    resnet = SimpleNamespace(ResNet=_built, Bottleneck=Bottleneck)
    return SimpleNamespace(models=SimpleNamespace(resnet=resnet, **functions))


def timm() -> SimpleNamespace:
    """Stand in for `import timm`."""

    def create_model(
        name: str, *, num_classes: int, pretrained_cfg_overlay: dict[str, object]
    ) -> ResNet:
        parts = {**_DEPTHS, "resnet200": (Bottleneck, [3, 24, 36, 3])}[name]
        model = _built(*parts, num_classes)
        model.pretrained_cfg = pretrained_cfg_overlay
        return model

    return SimpleNamespace(create_model=create_model)

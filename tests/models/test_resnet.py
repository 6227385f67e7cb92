"""ResNet: sizes, borders, names, and slow references of the unusual layers."""

import math

import pytest
import torch
from torch import Tensor, nn

from bigsimclr.models import Architecture, build_model
from bigsimclr.models.norm import BatchNorm
from bigsimclr.models.resnet import DEPTHS, ResNet, SameMaxPool, ShortcutPool
from bigsimclr.models.selective import SelectiveKernel
from bigsimclr.recipe.sections import ResNetBackbone

# Depth, width, selective kernels, millions of parameters: Table 1 of arXiv 2006.10029.
PUBLISHED = [
    (50, 1, False, 24),
    (50, 1, True, 35),
    (50, 2, False, 94),
    (50, 2, True, 140),
    (101, 1, False, 43),
    (101, 1, True, 65),
    (101, 2, False, 170),
    (101, 2, True, 257),
    (152, 1, False, 58),
    (152, 1, True, 89),
    (152, 2, False, 233),
    (152, 2, True, 354),
    (152, 3, True, 795),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def resnet(
    depth: int = 10,
    *,
    width: float = 1 / 16,
    selective_kernel: bool = False,
    stem: str = "imagenet",
    seed: int = 0,
) -> ResNet:
    return ResNet(
        depth=depth,
        width=width,
        selective_kernel=selective_kernel,
        stem=stem,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize(("depth", "width", "selective_kernel", "millions"), PUBLISHED)
def test_published_parameter_counts(
    depth: int, width: int, selective_kernel: bool, millions: int
) -> None:
    section = ResNetBackbone(depth=depth, width=float(width), selective_kernel=selective_kernel)
    with torch.device("meta"):
        model = build_model(Architecture(section, head=None, classes=None, from_layer=0), seed=0)
    # The published counts include the running statistics of batch norm.
    numbers = sum(tensor.numel() for tensor in model.backbone.state_dict().values())
    assert round(numbers / 1e6) == millions
    assert model.backbone.feature_width == 2048 * width


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("selective_kernel", [False, True])
def test_depth_counts_the_layers_on_the_longest_path(depth: int, selective_kernel: bool) -> None:
    with torch.device("meta"):
        model = resnet(depth, selective_kernel=selective_kernel)
    main = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and "downsample" not in name
        and "conv2.reduce" not in name
        and "conv2.expand" not in name
    ]
    extra = 2 if selective_kernel else 0  # the ResNet-D stem has three convolutions for one
    assert len(main) + 1 - extra == depth  # the classifier is counted in the name


@pytest.mark.parametrize("width", [1 / 16, 1 / 8, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("depth", [18, 50])
def test_channel_counts_are_the_official_multiples(depth: int, width: float) -> None:
    with torch.device("meta"):
        model = resnet(depth, width=width, selective_kernel=True)
    assert model.conv1[0].out_channels == int(64 * width) // 2
    assert model.bn1.channels == int(64 * width)
    for number, group in enumerate((model.layer1, model.layer2, model.layer3, model.layer4)):
        assert group[0].conv1.out_channels == int(64 * 2**number * width)
    assert model.feature_width == int(512 * width) * (4 if depth == 50 else 1)


@pytest.mark.parametrize("selective_kernel", [False, True])
@pytest.mark.parametrize("depth", [10, 50])
@pytest.mark.parametrize(("stem", "stride"), [("imagenet", 4), ("cifar", 1)])
@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_output_sizes(
    depth: int, selective_kernel: bool, stem: str, stride: int, size: tuple[int, int]
) -> None:
    model = resnet(depth, selective_kernel=selective_kernel, stem=stem).double()
    sizes: list[tuple[int, ...]] = []
    for group in (model.maxpool, model.layer1, model.layer2, model.layer3, model.layer4):
        group.register_forward_hook(lambda _m, _i, output: sizes.append(output.shape[-2:]))
    with torch.no_grad():
        features = model(draw(2, 3, *size))
    assert features.shape == (2, model.feature_width)
    expected = [tuple(math.ceil(side / (stride * k)) for side in size) for k in (1, 1, 2, 4, 8)]
    assert [tuple(found) for found in sizes] == expected


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (5, 5), (6, 7), (8, 1)])
def test_max_pool_pads_like_same(size: tuple[int, int]) -> None:
    inputs = draw(2, 3, *size) - 10  # negative: padding by zero would win
    outputs = SameMaxPool()(inputs)
    starts = [[2 * i - (side % 2) for i in range(-(-side // 2))] for side in size]
    assert outputs.shape[-2:] == tuple(map(len, starts))
    for row, top in enumerate(starts[0]):
        for column, left in enumerate(starts[1]):
            window = inputs[:, :, max(top, 0) : top + 3, max(left, 0) : left + 3]
            assert torch.equal(outputs[:, :, row, column], window.amax((2, 3)))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (5, 5), (6, 7)])
def test_shortcut_pool_borders(stride: int, size: tuple[int, int]) -> None:
    inputs = draw(2, 3, *size)
    outputs = ShortcutPool(stride)(inputs)
    assert outputs.shape[-2:] == tuple(-(-side // stride) for side in size)
    for row in range(outputs.shape[2]):
        for column in range(outputs.shape[3]):
            top, left = stride * row, stride * column
            window = inputs[:, :, top : top + 2, left : left + 2].flatten(2)
            cells = window.shape[2] if stride == 1 else 4  # zeros of the padding count at 2
            expected = window.sum(2) / cells
            torch.testing.assert_close(outputs[:, :, row, column], expected)


@pytest.mark.parametrize("width", [8, 48])
def test_selective_kernel_mixes_two_streams(width: int) -> None:
    layer = SelectiveKernel(5, width, stride=2, generator=torch.Generator()).double().eval()
    assert layer.reduce.out_channels == 32
    inputs = draw(3, 5, 6, 6)
    streams = layer.bn(layer.conv(inputs)).relu()
    stack = torch.stack([streams[:, :width], streams[:, width:]])  # [2, N, F, H, W]
    pooled = stack.sum(0).mean((2, 3), keepdim=True)
    chosen = layer.expand(layer.reduce_bn(layer.reduce(pooled)).relu())
    weights = torch.stack([chosen[:, :width], chosen[:, width:]]).softmax(0)
    torch.testing.assert_close(layer(inputs), (stack * weights).sum(0))


def test_selective_kernel_bottleneck_grows_with_the_width() -> None:
    with torch.device("meta"):
        layer = SelectiveKernel(1536, 1536, stride=1, generator=torch.Generator())
    assert layer.reduce.out_channels == 96


@pytest.mark.parametrize("selective_kernel", [False, True])
@pytest.mark.parametrize("depth", [18, 50])
def test_blocks_start_as_their_shortcut(depth: int, selective_kernel: bool) -> None:
    model = resnet(depth, selective_kernel=selective_kernel)
    last = "bn3" if depth == 50 else "bn2"
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm):
            assert module.weight.any().item() == (name.rsplit(".", 1)[-1] != last), name
    inputs = draw(2, model.layer1[0].downsample[-1].channels, 4, 4).relu().float()
    assert torch.equal(model.layer1[1](inputs), inputs)


def test_plain_networks_carry_torchvision_names() -> None:
    with torch.device("meta"):
        names = set(resnet(50).state_dict())
    assert {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.conv1.weight",
        "layer2.3.bn3.bias",
    } <= names
    assert {"layer1.0.downsample.0.weight", "layer4.0.downsample.1.running_mean"} <= names
    assert not any("layer1.1.downsample" in name for name in names)


@pytest.mark.parametrize("selective_kernel", [False, True])
@pytest.mark.parametrize("depth", [10, 50])
def test_every_parameter_receives_a_finite_gradient(depth: int, selective_kernel: bool) -> None:
    model = resnet(depth, selective_kernel=selective_kernel).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)  # away from the zero scales, which stop gradients
    model(draw(4, 3, 40, 40)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_unknown_depth_and_stem_and_empty_width_are_refused() -> None:
    with pytest.raises(ValueError, match="depth 51 is not one of 10, 18"):
        resnet(51)
    with pytest.raises(ValueError, match=r"width 0\.01 leaves fewer than 2"):
        resnet(width=0.01)
    with pytest.raises(ValueError, match="stem 'cifar10' is neither imagenet nor cifar"):
        resnet(stem="cifar10")


def test_by_default_pytorch_draws_the_weights_of_a_plain_network() -> None:
    torch.manual_seed(3)
    plain = ResNet(10)
    generator = torch.Generator().manual_seed(3)
    wanted = ResNet(
        depth=10, width=1.0, selective_kernel=False, stem="imagenet", generator=generator
    )
    for (name, found), expected in zip(plain.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(found, expected), name

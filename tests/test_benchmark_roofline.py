"""Bytes, FLOPs and floors of benchmarks.roofline, against counts that share no code with them."""

import functools
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from benchmarks.networks import TABLE_1, network
from benchmarks.roofline import (
    ASSUMED,
    VIEWS_PER_STEP,
    Ceilings,
    floor_of,
    floors,
    fractions,
    row,
    training_flops,
)
from benchmarks.traffic import TIERS, Kernel, Layer, forward_flops, kernels, layers
from bigsimclr.models import build_model
from bigsimclr.models.cost import cost
from bigsimclr.models.norm import BatchNorm
from bigsimclr.recipe.sections import ResNetBackbone

# GB per view of the tiers, by a program of its own that read the layers off the official code.
GIGABYTES = {
    "r50-1x": (0.468, 0.361, 0.333, 0.196),
    "r50-1x-sk": (0.655, 0.430, 0.389, 0.239),
    "r50-2x": (0.939, 0.725, 0.668, 0.393),
    "r50-2x-sk": (1.315, 0.864, 0.782, 0.48),
    "r101-1x": (0.705, 0.540, 0.502, 0.299),
    "r101-1x-sk": (0.983, 0.631, 0.573, 0.359),
    "r101-2x": (1.415, 1.085, 1.007, 0.60),
    "r101-2x-sk": (1.974, 1.270, 1.154, 0.72),
    "r152-1x": (0.997, 0.760, 0.709, 0.426),
    "r152-1x-sk": (1.388, 0.879, 0.800, 0.505),
    "r152-2x": (2.000, 1.527, 1.425, 0.86),
    "r152-2x-sk": (2.783, 1.769, 1.611, 1.02),
    "r152-3x-sk": (4.190, 2.67, 2.43, 1.54),
}


@functools.cache
def layers_at_224(name: str) -> list[Layer]:
    return layers(network(name), 224)


def gigabytes(name: str, views: int = VIEWS_PER_STEP) -> list[float]:
    found = layers_at_224(name)
    return [
        sum(kernel.bytes_per_view(views) for kernel in kernels(found, tier, value_bytes=2)) / 1e9
        for tier in TIERS
    ]


def test_names_of_networks() -> None:
    assert list(GIGABYTES) == list(TABLE_1)
    assert network("r152-3x-sk").backbone == ResNetBackbone(
        depth=152, width=3.0, selective_kernel=True
    )
    assert network("r18-cifar").backbone == ResNetBackbone(depth=18, stem="cifar")
    assert network("r50-0.5x").backbone.width == 0.5
    for wrong in ("r51", "resnet50", "r50-2", "r50-cifar-sk", ""):
        with pytest.raises(ValueError, match="is no network"):
            network(wrong)


@pytest.mark.parametrize("name", TABLE_1)
def test_bytes_of_all_networks(name: str) -> None:
    assert gigabytes(name) == pytest.approx(GIGABYTES[name], rel=0.04)


def test_parameters_and_flops_of_resnet_50_by_hand() -> None:
    weights, norms = 7 * 7 * 3 * 64, 64
    flops = 2 * weights * 112 * 112
    in_width = 64
    for blocks, width, side in ((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7)):
        for index in range(blocks):
            # The first 1x1 convolution of a group is at the resolution of the group before.
            before = 2 * side if index == 0 and side < 56 else side
            convolutions = [
                (in_width * width, before),
                (9 * width * width, side),
                (width * 4 * width, side),
                *([(in_width * 4 * width, side)] if index == 0 else []),
            ]
            weights += sum(numbers for numbers, _ in convolutions)
            flops += sum(2 * numbers * positions**2 for numbers, positions in convolutions)
            norms += 2 * width + 4 * width * (2 if index == 0 else 1)
            in_width = 4 * width
    head = 2048 * 2048 + 2048 * 2048 + 2048 * 128
    found = row("r50-1x", ASSUMED)
    # A scale, a shift, a mean and a variance for each channel.
    assert found["backbone_parameters_with_statistics"] == weights + 4 * norms
    assert round((weights + 4 * norms) / 1e6, 1) == 23.6
    assert found["head_parameters"] == head + 2 * 2048 + 2 * 2048 + 128
    assert forward_flops(layers_at_224("r50-1x")) == flops + 2 * head
    assert found["forward_gflop_per_view"] == 8.192
    # Three times as much, but for the gradient of the image.
    assert training_flops("r50-1x", 224) == 3 * (flops + 2 * head) - 2 * 9408 * 112 * 112


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r50-1x", "r101-2x-sk", "r152-3x-sk"])
def test_training_flops_are_those_that_torch_counts(name: str) -> None:
    with torch.device("meta"):
        model = build_model(network(name), seed=0)
        images = torch.empty(2, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(images).projections[-1].sum().backward()
    assert 2 * training_flops(name, 224) == counter.get_total_flops()


def test_flops_and_parameters_of_the_largest_network() -> None:
    found = row("r152-3x-sk", ASSUMED)
    # Three times the 315.6 GFLOP that torch.utils.flop_counter finds in a forward pass.
    assert found["training_gflop_per_view"] == pytest.approx(947, abs=0.5)
    assert found["backbone_parameters_with_statistics"] == pytest.approx(795.2e6, abs=5e4)
    assert found["flops_only_images_per_second"] == pytest.approx(798e12 / 947e9 / 2, rel=1e-3)


class Moved(TorchDispatchMode):
    """Adds the bytes that every operation of PyTorch reads and writes, each tensor once."""

    # What their kernels read once more: batch norm's statistics, forward and backward, and the
    # gradient that a convolution's two gradients are made of.
    AGAIN: Mapping[str, Sequence[int]] = {
        "aten.native_batch_norm.default": (0,),
        "aten.native_batch_norm_backward.default": (0, 1),
        "aten.convolution_backward.default": (0,),
    }

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    @override
    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            again = [args[index] for index in self.AGAIN.get(str(func), ())]
            tensors = [x for x in tree_leaves((args, kwargs, made, again)) if isinstance(x, Tensor)]
            # What is spread over positions is read from fewer.
            self.bytes += sum(
                min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in tensors
            )
        return made


@pytest.mark.parametrize(("name", "size"), [("r18-cifar", 32), ("r50-1x", 224), ("r50-1x-sk", 224)])
def test_the_eager_tier_is_what_our_plain_code_moves(name: str, size: int) -> None:
    moved = []
    for views in (2, 3):
        with torch.device("meta"):
            model = build_model(network(name), seed=0)
            images = torch.empty(views, 3, size, size)
            with Moved() as mode:
                model(images).projections[-1].sum().backward()
        moved.append(mode.bytes)
    # What one more view adds holds no weights.
    counted = kernels(layers(network(name), size), "eager", value_bytes=4)
    found = sum(kernel.activation_bytes for kernel in counted)
    # Not counted are the corner that a selective kernel's shortcut cuts off, and small change.
    assert found == pytest.approx(moved[1] - moved[0], rel=0.015)


@pytest.mark.parametrize("name", ["r18-cifar", "r50-1x", "r50-1x-sk", "r18-sk"])
def test_every_layer_is_found(name: str) -> None:
    found = layers(network(name), 64)
    with torch.device("meta"):
        model = build_model(network(name), seed=0)
    counted = cost(network(name), image_size=64)
    assert forward_flops(found) == counted.total.flops
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    assert sum(layer.kind == "norm" for layer in found) == len(norms)
    weights = sum(layer.weights for layer in found)
    assert weights == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert sum(layer.is_first for layer in found) == 1


def test_tiers_move_less_and_less() -> None:
    for name in ("r50-1x", "r50-1x-sk"):
        found = gigabytes(name)
        assert found == sorted(found, reverse=True)
        # Three times a weight in 16 bits, for all views of a step together.
        weights = 3 * 2 * sum(layer.weights for layer in layers_at_224(name)) / 1e9
        more = [a - b for a, b in zip(gigabytes(name, 1), gigabytes(name, 2), strict=True)]
        assert more == pytest.approx([weights / 2] * len(TIERS), rel=0.001)


def test_floors_by_hand() -> None:
    ceilings = Ceilings(flops=100.0, bandwidth=10.0)
    # 4 s of computing and 1 s of moving; 1 s and 3 s, of which the weights' bytes are 2 of 8 / 4.
    step = [Kernel(400, 10), Kernel(100, 28, weight_bytes=8)]
    found = floor_of(step, ceilings, views=4)
    assert found.bytes_per_view == 10 + 28 + 2
    assert (found.images_per_second, found.binds) == (1 / (2 * 5), "FLOPs")
    assert found.op_images_per_second == 1 / (2 * (4 + 3))
    slow = floor_of(step, Ceilings(flops=1000.0, bandwidth=10.0), views=4)
    assert (slow.images_per_second, slow.binds) == (1 / (2 * 4), "bytes")


def test_fractions_of_what_was_measured() -> None:
    case = {
        "model": "r18-cifar",
        "size": 32,
        "batch": 16,
        "methods": {
            "ours": {"images_per_second": 50.0, "precision": "fp32"},
            "lightly": {"images_per_second": None, "precision": "fp16"},
        },
    }
    ceilings = Ceilings(flops=1e11, bandwidth=1e10)
    (found,) = fractions({"cases": [case]}, ceilings)
    allowed = floors("r18-cifar", ceilings, image_size=32, views=32, precision="fp32")
    for tier in TIERS:
        shares = found[tier]
        assert isinstance(shares, dict)
        assert shares["of_floor"] == pytest.approx(50 / allowed[tier].images_per_second, abs=1e-4)
        assert shares["of_op_roofline"] >= shares["of_floor"]

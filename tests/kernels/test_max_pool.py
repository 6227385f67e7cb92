"""The stem's max-pool against PyTorch's: values to the bit, gradients in float64."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from bigsimclr.kernels.max_pool import (
    Tiles,
    differentiate_inputs,
    max_pool,
    suits,
    take_largest,
)
from bigsimclr.models.anatomy import Memory
from bigsimclr.models.memory import save_memory
from bigsimclr.models.resnet import ResNet, SameMaxPool, fuse_max_pool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Even and odd sides, cut tiles of rows, columns and channels, and hardly any image.
SHAPES = [
    (2, 5, 7, 9),
    (1, 3, 6, 18),
    (1, 70, 18, 5),
    (1, 8, 2, 23),
    (1, 4, 37, 2),
    (1, 3, 1, 1),
    (1, 1, 1, 8),
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).to(DEVICE)
    return values.contiguous(memory_format=torch.channels_last)


def tied(*shape: int, seed: int = 0) -> Tensor:
    """Draw from five numbers, both zeros among them."""
    values = drawn(*shape, seed=seed).round().clamp(-2, 2)
    return torch.where(drawn(*shape, seed=seed + 1) > 0, values, -values)


def sides(inputs: Tensor) -> dict[str, object]:
    height, width = inputs.shape[2:]
    return {"stride": 2, "padding": (height % 2, width % 2), "ceil_mode": True}


def plain(inputs: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and gradient in float64; on the CPU, where a window of -inf has a first value."""
    leaf = inputs.detach().cpu().contiguous().double().requires_grad_()
    outputs = F.max_pool2d(leaf, 3, **sides(inputs))
    (gradient,) = torch.autograd.grad(outputs, leaf, upstream.cpu().double())
    return outputs.detach().to(DEVICE, inputs.dtype), gradient.to(DEVICE)


def fused(inputs: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    leaf = inputs.detach().requires_grad_()
    outputs = max_pool(leaf)
    (gradient,) = torch.autograd.grad(outputs, leaf, upstream)
    assert outputs.dtype == gradient.dtype == inputs.dtype
    for tensor in (outputs, gradient):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    return outputs.detach(), gradient


def upstream_of(inputs: Tensor, *, whole: bool = False) -> Tensor:
    images, channels, height, width = inputs.shape
    shape = images, channels, -(-height // 2), -(-width // 2)
    values = drawn(*shape, seed=9)
    return ((4 * values).round() if whole else values).to(inputs.dtype)


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(), expected.nan_to_num()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = drawn(*shape).to(dtype)
    upstream = upstream_of(inputs)
    outputs, gradient = fused(inputs, upstream)
    expected, slope = plain(inputs, upstream)
    assert torch.equal(outputs, expected)
    assert worst(gradient, slope) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_of_equal_values_the_first_wins(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = tied(*shape).to(dtype)
    upstream = upstream_of(inputs, whole=True)  # so that sums are exact
    outputs, gradient = fused(inputs, upstream)
    expected, slope = plain(inputs, upstream)
    assert torch.equal(outputs, expected)
    assert torch.equal(outputs.signbit(), expected.signbit())
    assert torch.equal(gradient.double(), slope)


@pytest.mark.parametrize("nothing", [0.3, 0.95])
@pytest.mark.parametrize("shape", SHAPES)
def test_infinite_values_and_nan(shape: tuple[int, ...], nothing: float) -> None:
    inputs = tied(*shape)
    chance = torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    inputs[chance < nothing] = -torch.inf
    inputs[chance < 0.05] = torch.inf
    upstream = upstream_of(inputs, whole=True)
    inputs[(chance > 0.05) & (chance < 0.2)] = torch.nan
    outputs, gradient = fused(inputs, upstream)
    expected, slope = plain(inputs, upstream)
    assert same(outputs, expected)
    assert torch.equal(gradient.double(), slope)


@pytest.mark.parametrize("shape", SHAPES)
def test_taps_are_pytorchs_indices(shape: tuple[int, ...]) -> None:
    inputs = tied(*shape)
    _, taps = take_largest(inputs, remembers=True)
    assert taps is not None
    assert taps.dtype == torch.uint8
    height, width = shape[2:]
    tap = taps.cpu().long()
    row = 2 * torch.arange(tap.shape[2])[:, None] - height % 2 + tap // 3
    column = 2 * torch.arange(tap.shape[3]) - width % 2 + tap % 3
    _, expected = F.max_pool2d(inputs.cpu(), 3, **sides(inputs), return_indices=True)
    assert torch.equal(row * width + column, expected)


@pytest.mark.parametrize("shape", [(1, 20, 9, 11), (1, 5, 6, 4)])
@pytest.mark.parametrize("tiles", [Tiles(1, 2, 32, 4), Tiles(3, 4, 16, 1), Tiles(64, 32, 4, 8)])
def test_any_tiles(shape: tuple[int, ...], tiles: Tiles) -> None:
    inputs = tied(*shape)
    upstream = upstream_of(inputs)
    outputs, gradient = fused(inputs, upstream)
    found, taps = take_largest(inputs, remembers=True, tiles=tiles)
    assert torch.equal(found, outputs)
    assert taps is not None
    slope = differentiate_inputs(upstream, taps, (shape[2], shape[3]), tiles=tiles)
    assert torch.equal(slope, gradient)


def test_the_same_bits_twice() -> None:
    inputs = tied(2, 66, 5, 6)
    first, second = (fused(inputs, upstream_of(inputs)) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_nan_that_comes_back_goes_to_the_largest_alone() -> None:
    inputs = drawn(1, 4, 6, 8)
    upstream = upstream_of(inputs)
    upstream[0, 2, 1, 1] = torch.nan
    _, gradient = fused(inputs, upstream)
    _, slope = plain(inputs, upstream)
    assert gradient.isnan().sum() == 1
    assert torch.equal(gradient.isnan(), slope.isnan())


def test_a_gradient_in_another_layout() -> None:
    inputs = drawn(3, 5, 8, 12)
    upstream = drawn(3, 5, 1, 1, seed=4).expand(3, 5, 4, 6)  # as that of a mean over positions
    _, gradient = fused(inputs, upstream)
    assert worst(gradient, plain(inputs, upstream)[1]) < 1e-6


def test_a_byte_is_kept_for_each_result() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    inputs = drawn(2, 4, 6, 8)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        fused(inputs, upstream_of(inputs))
        assert [(tuple(tensor.shape), tensor.dtype) for tensor in kept] == [
            ((2, 4, 3, 4), torch.uint8)
        ]
        with torch.no_grad():
            outputs = max_pool(inputs.requires_grad_())
        with torch.inference_mode():
            assert torch.equal(max_pool(inputs), outputs)
    assert len(kept) == 1
    assert not outputs.requires_grad
    assert torch.equal(outputs, plain(inputs, outputs)[0])


def test_it_is_differentiated_once() -> None:
    leaf = drawn(2, 3, 6, 6).requires_grad_()
    (slope,) = torch.autograd.grad(max_pool(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        slope.sum().backward()


def test_what_does_not_suit_is_refused() -> None:
    inputs = drawn(2, 3, 4, 4)
    assert suits(inputs)
    for wrong in (
        inputs.double(),
        inputs.contiguous(),
        inputs[0],
        inputs[..., 0],
        inputs[:0],
        inputs[..., 1:],
    ):
        assert not suits(wrong)
        with pytest.raises(ValueError, match="the kernels take"):
            max_pool(wrong)


# --- in a network ---------------------------------------------------------------------------------


def test_a_fused_module_is_the_plain_one() -> None:
    module = SameMaxPool()
    fuse_max_pool(module)
    for inputs in (drawn(2, 3, 7, 8), drawn(2, 3, 7, 8).contiguous(), drawn(2, 3, 7, 8).double()):
        leaves = [inputs.clone().requires_grad_() for _ in range(2)]
        outputs = [one(leaf) for one, leaf in zip((module, SameMaxPool()), leaves, strict=True)]
        assert torch.equal(*outputs)
        for made in outputs:
            made.square().sum().backward()
        assert leaves[0].grad is not None
        assert torch.equal(leaves[0].grad, leaves[1].grad)
        is_fused = suits(inputs)
        assert ("_MaxPool" in type(outputs[0].grad_fn).__name__) is is_fused


def test_the_module_takes_what_autocast_makes() -> None:
    module = SameMaxPool()
    fuse_max_pool(module)
    images, weight = drawn(2, 3, 8, 8), drawn(4, 3, 3, 3, seed=1).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        hidden = F.conv2d(images, weight, padding=1)
        outputs = module(hidden)
        assert outputs.dtype == torch.bfloat16
        assert torch.equal(outputs, SameMaxPool()(hidden))
    outputs.float().sum().backward()
    assert weight.grad is not None


def stemmed(memory: Memory, *, pooled: bool) -> dict[str, Tensor]:
    """Return outputs and gradients of a small network."""
    model = ResNet(depth=10, width=1 / 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    if pooled:
        fuse_max_pool(model)
    save_memory(model, memory)
    outputs = model(drawn(2, 3, 30, 36))
    (outputs * torch.linspace(-1, 1, outputs.shape[1], device=DEVICE)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert "conv1.weight" in gradients
    return {"outputs": outputs.detach(), **gradients}


@pytest.mark.parametrize("memory", ["none", "selective", "block"])
def test_a_network_is_the_plain_one(memory: Memory, full_float32: None) -> None:
    found, expected = stemmed(memory, pooled=True), stemmed("none", pooled=False)
    errors = {name: worst(found[name], value.double()) for name, value in expected.items()}
    assert max(errors.values()) < 1e-4, errors  # a GPU's convolutions are not repeatable


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 100, 192])
def test_a_stem_at_size(channels: int, dtype: torch.dtype) -> None:
    inputs = torch.randn(32, channels, 112, 112, device=DEVICE).relu().to(dtype)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(32, channels, 56, 56, device=DEVICE).to(dtype)
    upstream = upstream.contiguous(memory_format=torch.channels_last)
    outputs, gradient = fused(inputs, upstream)
    leaf = inputs.detach().requires_grad_()
    expected = F.max_pool2d(leaf, 3, **sides(inputs))
    (slope,) = torch.autograd.grad(expected, leaf, upstream)
    assert torch.equal(outputs, expected)
    assert worst(gradient, slope.double()) <= torch.finfo(dtype).eps
    again = fused(inputs, upstream)
    assert torch.equal(again[0], outputs)
    assert torch.equal(again[1], gradient)


@pytest.mark.gpu
def test_more_than_two_to_the_31_values() -> None:
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of GPU memory")
    images, part = 2680, 8
    inputs = torch.randn((images, 64, 112, 112), device=DEVICE, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )
    assert inputs.numel() > 2**31
    outputs, taps = take_largest(inputs, remembers=True)
    assert taps is not None
    gradient = differentiate_inputs(outputs, taps, (112, 112))
    end = inputs[-part:].clone(memory_format=torch.channels_last)
    expected, slope = fused(end, outputs[-part:].clone(memory_format=torch.channels_last))
    assert torch.equal(outputs[-part:], expected)
    assert torch.equal(gradient[-part:], slope)

"""Distribution of the initial weights."""

import math

import pytest
import torch

from bigsimclr.models.layers import TRUNCATED_STD, Convolution, Dense


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("in_width", "kernel"), [(64, 3), (256, 1), (3, 7)])
def test_convolution_weights_are_a_truncated_normal_of_unit_fan_in(
    in_width: int, kernel: int
) -> None:
    weight = Convolution(in_width, 512, kernel=kernel, generator=generator()).weight
    unit = weight.double() * math.sqrt(in_width * kernel * kernel)
    assert unit.std().item() == pytest.approx(1, abs=0.01)  # not sqrt(2), as He's would be
    assert unit.mean().item() == pytest.approx(0, abs=0.01)
    assert 2.25 < unit.abs().max().item() <= 2 / 0.87962566 * (1 + 1e-6)


def test_convolution_weights_have_the_quantiles_of_a_truncated_normal() -> None:
    weight = Convolution(1024, 512, kernel=1, generator=generator()).weight
    drawn = weight.double().flatten() * (32.0 * TRUNCATED_STD)
    for point in (-1.9, -1.0, -0.1, 0.0, 0.5, 1.5):
        below = 0.5 * (math.erf(point / math.sqrt(2)) + math.erf(math.sqrt(2)))
        share = (drawn < point).double().mean().item()
        assert share == pytest.approx(below / math.erf(math.sqrt(2)), abs=0.003)  # 4 deviations


def test_a_seed_gives_these_weights_whatever_the_version_of_pytorch() -> None:
    weight = Convolution(64, 512, kernel=1, generator=generator()).weight
    expected = torch.tensor([-0.00127277337, 0.0985574871, -0.176431209, -0.148033082])
    torch.testing.assert_close(weight.flatten()[:4], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_convolution_padding_and_bias(kernel: int, stride: int) -> None:
    layer = Convolution(2, 3, kernel=kernel, stride=stride, generator=generator())
    assert layer.bias is None
    for size in (1, 4, 5, 8):
        assert layer(torch.zeros(1, 2, size, size)).shape[-1] == -(-size // stride)


def test_dense_weights() -> None:
    layer = Dense(200, 300, has_bias=True, generator=generator())
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert layer.weight.abs().max().item() > 0.035  # not truncated
    assert not layer.bias.any()
    zero = Dense(4, 5, has_bias=True, generator=None)
    assert not zero.weight.any()
    assert not zero.bias.any()


def test_only_the_given_generator_decides() -> None:
    before = torch.get_rng_state()
    first = Convolution(4, 5, kernel=3, generator=generator(7))
    second = Convolution(4, 5, kernel=3, generator=generator(7))
    other = Convolution(4, 5, kernel=3, generator=generator(8))
    Dense(4, 5, has_bias=True, generator=generator(7))
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("in_width", [2, 4, 8, 15, 16, 24])
@pytest.mark.parametrize("size", [7, 8])
def test_strided_pointwise_gradients_match_float64(in_width: int, size: int) -> None:
    layer = Convolution(in_width, 2 * in_width, kernel=1, stride=2, generator=generator())
    layer.to(memory_format=torch.channels_last)
    drawn = torch.randn(64, in_width, size, size, generator=generator(1))
    images = drawn.to(memory_format=torch.channels_last).requires_grad_()
    weights = torch.randn(layer(images).shape, generator=generator(2))
    (layer(images) * weights).sum().backward()
    kernel = layer.weight.detach().double()[:, :, 0, 0]
    seen, upstream = drawn.double()[:, :, ::2, ::2], weights.double()
    expected = torch.einsum("nohw,nihw->oi", upstream, seen)
    assert layer.weight.grad is not None
    assert images.grad is not None
    torch.testing.assert_close(
        layer.weight.grad[:, :, 0, 0].double(), expected, rtol=1e-4, atol=1e-4
    )
    back = torch.zeros_like(drawn, dtype=torch.float64)
    back[:, :, ::2, ::2] = torch.einsum("nohw,oi->nihw", upstream, kernel)
    torch.testing.assert_close(images.grad.double(), back, rtol=1e-4, atol=1e-5)

"""The first convolution over folded images against the plain one in float64."""

import pytest
import torch
from torch import Tensor, nn

from bigsimclr.kernels import fold
from bigsimclr.models.layers import FirstConvolution, fuse_first_convolution

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convolution(kernel: int) -> FirstConvolution:
    generator = torch.Generator().manual_seed(0)
    return FirstConvolution(10, kernel=kernel, generator=generator).to(DEVICE)


def values(layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the gradient of the weights."""
    outputs = layer(images)
    upstream = drawn(*outputs.shape, seed=2).to(outputs)
    (gradient,) = torch.autograd.grad(outputs, list(layer.parameters()), upstream)
    return outputs.detach(), gradient


@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (1, 3, 2, 6), (3, 3, 32, 32), (1, 3, 4, 300)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_values_and_gradients(
    kernel: int, shape: tuple[int, ...], layout: torch.memory_format, full_float32: None
) -> None:
    layer, images = convolution(kernel), drawn(*shape, seed=1).to(DEVICE, memory_format=layout)
    exact = values(convolution(kernel).double(), images.double())
    fuse_first_convolution(layer)
    for found, expected in zip(values(layer, images), exact, strict=True):
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 2e-6 * expected.abs().max()
    assert layer(images).is_contiguous(memory_format=torch.channels_last)


def test_every_pixel_has_its_place() -> None:
    images = torch.arange(1.0, 1 + 3 * 4 * 6).view(1, 3, 4, 6).to(DEVICE)
    folded = fold.fold_images(images, kernel=7, dtype=torch.float32)
    assert folded.shape == (1, 16, 5, 6)
    expected = torch.zeros_like(folded)
    for down in range(2):
        for across in range(2):
            first = 3 * (2 * down + across)
            expected[:, first : first + 3, 2:4, 2:5] = images[:, :, down::2, across::2]
    assert torch.equal(folded, expected)


def test_autocast_computes_in_its_type() -> None:
    layer, images = convolution(7), drawn(2, 3, 16, 16, seed=1).to(DEVICE)
    fuse_first_convolution(layer)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        outputs = layer(images)
    assert outputs.dtype == torch.bfloat16
    exact = convolution(7).double()(images.double())
    assert (outputs - exact).abs().max() < 2e-2 * exact.abs().max()


@pytest.mark.parametrize(
    "images",
    [drawn(1, 3, 7, 8, seed=1), drawn(1, 3, 8, 9, seed=1), drawn(1, 3, 8, 8, seed=1).double()],
    ids=["odd height", "odd width", "float64"],
)
def test_what_does_not_suit_is_convolved_as_it_is(images: Tensor) -> None:
    images = images.to(DEVICE)
    plain, fused = convolution(7).to(images.dtype), convolution(7).to(images.dtype)
    fuse_first_convolution(fused)
    assert not fold.suits(7, images)
    assert torch.equal(fused(images), plain(images))


def test_images_may_want_a_gradient() -> None:
    layer = convolution(7)
    fuse_first_convolution(layer)
    images = drawn(1, 3, 8, 8, seed=1).to(DEVICE).requires_grad_()
    layer(images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0

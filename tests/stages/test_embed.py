"""`embed`: the same features whatever form the pixels have, and refusals in place of wrong ones."""

import math

import pytest
import torch
from torch import Tensor

import bigsimclr as bsc
from bigsimclr.models import Architecture
from bigsimclr.models.simclr import SimCLR
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone
from tests.interop import networks

BACKBONE = ResNetBackbone(depth=10, width=1 / 8, stem="cifar")  # 64 features


@pytest.fixture
def model() -> SimCLR:
    head = HeadSection(layers=2, output_width=8)
    return networks.portable(Architecture(BACKBONE, head, None, from_layer=0)).model


def pixels(count: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, 3, 12, 10), dtype=torch.uint8, generator=generator)


def test_bytes_and_floats_give_the_network_s_features(model: SimCLR) -> None:
    floats = pixels().float() / 255
    with torch.no_grad():
        expected = model(floats).features
    found = bsc.embed(model, pixels())
    assert (found.shape, found.dtype, found.device.type) == ((7, 64), torch.float32, "cpu")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(bsc.embed(model, floats), found)
    assert torch.equal(bsc.embed(model, floats.double()), found)
    # A tensor like any other: not of inference mode, which autograd refuses.
    assert not found.requires_grad
    assert not found.is_inference()


def test_from_layer_names_the_head_s_layers(model: SimCLR) -> None:
    with torch.no_grad():
        outputs = model(pixels().float() / 255)
    for layer, expected in enumerate((outputs.features, *outputs.projections)):
        found = bsc.embed(model, pixels(), from_layer=layer)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert [bsc.embed(model, pixels(), from_layer=layer).shape[1] for layer in (1, 2)] == [64, 8]


@pytest.mark.parametrize("layer", [-1, 3])
def test_layers_that_the_head_lacks_are_refused(model: SimCLR, layer: int) -> None:
    with pytest.raises(ValueError, match=f"from_layer {layer}: the head has 2 layers"):
        bsc.embed(model, pixels(), from_layer=layer)
    alone = networks.portable(Architecture(BACKBONE, None, None, from_layer=0)).model
    with pytest.raises(ValueError, match="from_layer 1: the head has 0 layers"):
        bsc.embed(alone, pixels(), from_layer=1)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 8])
def test_the_batch_size_changes_nothing(model: SimCLR, batch_size: int) -> None:
    found = bsc.embed(model, pixels(), batch_size=batch_size)
    torch.testing.assert_close(found, bsc.embed(model, pixels()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layer", "width"), [(0, 64), (1, 64), (2, 8)])
def test_no_images_have_features_of_the_same_width(model: SimCLR, layer: int, width: int) -> None:
    for images in (pixels()[:0], pixels()[:0].float()):
        found = bsc.embed(model, images, from_layer=layer)
        assert (found.shape, found.dtype) == ((0, width), torch.float32)


@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0, math.nan, math.inf, -math.inf])
def test_floats_outside_their_range_are_refused(model: SimCLR, value: float) -> None:
    images = pixels().float() / 255
    images[3, 1, 2, 2] = value
    with pytest.raises(ValueError, match=r"must lie in \[0,1\] and these reach from .* to .*; no"):
        bsc.embed(model, images)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_other_numbers_are_refused(model: SimCLR, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"uint8, or floats in .*, not {dtype}"):
        bsc.embed(model, pixels().to(dtype))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 8, 3), (2, 1, 8, 8), (2, 3, 8)])
def test_other_shapes_are_refused(model: SimCLR, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \[N,3,H,W\], not \["):
        bsc.embed(model, torch.zeros(shape))


def test_every_part_of_the_model_keeps_its_mode(model: SimCLR) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    model.backbone.bn1.eval()
    found = bsc.embed(model, pixels())
    assert model.training
    assert model.backbone.layer1.training
    assert not model.backbone.bn1.training
    with pytest.raises(ValueError, match="from_layer"):
        bsc.embed(model, pixels(), from_layer=9)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(bsc.embed(model.eval(), pixels()), found)


def test_other_things_than_tensors_are_refused(model: SimCLR) -> None:
    with pytest.raises(ValueError, match=r"not a ndarray; the command `bigsimclr embed` reads"):
        bsc.embed(model, pixels().numpy())

"""The whole network: what it returns, what learns, how it is described."""

import pytest
import torch
from torch import Tensor

from bigsimclr.models import Architecture, build_model
from bigsimclr.models.simclr import SimCLR, parameter_kind
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone

SMALL = ResNetBackbone(depth=10, width=1 / 16, stem="cifar")


def architecture(
    *,
    backbone: ResNetBackbone = SMALL,
    layers: int = 3,
    classes: int | None = 5,
    from_layer: int = 0,
    keep_head_layers: int | None = None,
) -> Architecture:
    return Architecture(
        backbone=backbone,
        head=HeadSection(layers=layers, output_width=7),
        classes=classes,
        from_layer=from_layer,
        keep_head_layers=keep_head_layers,
    )


def draw(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("from_layer", [0, 1, 2, 3])
def test_logits_are_read_from_the_chosen_layer(from_layer: int) -> None:
    model = build_model(architecture(from_layer=from_layer), seed=0)
    outputs = model(draw(6, 3, 8, 8))
    widths = [32, 32, 32, 7]
    read = (outputs.features, *outputs.projections)
    assert [value.shape for value in read] == [(6, width) for width in widths]
    assert model.classifier.in_features == widths[from_layer]
    assert torch.equal(outputs.logits, model.classifier(read[from_layer]))


def test_a_network_without_head_and_classifier() -> None:
    described = Architecture(SMALL, head=None, classes=None, from_layer=0)
    outputs = build_model(described, seed=0)(draw(2, 3, 8, 8))
    assert outputs.projections == ()
    assert outputs.logits is None


@pytest.mark.parametrize("probe", [False, True])
def test_a_probe_sends_no_gradient_back(probe: bool) -> None:
    model = build_model(architecture(from_layer=1), seed=0, probe=probe)
    model(draw(6, 3, 8, 8)).logits.square().sum().backward()
    reached = {name for name, value in model.named_parameters() if value.grad is not None}
    assert {"classifier.weight", "classifier.bias"} <= reached
    assert (reached == {"classifier.weight", "classifier.bias"}) == probe


def test_a_probe_changes_no_gradient_of_the_network() -> None:
    gradients = []
    for described in (architecture(), architecture(classes=None)):
        model = build_model(described, seed=0, probe=True)
        # Of smaller ones only a corner reaches the features, the same for every image.
        outputs = model(draw(6, 3, 16, 16))
        loss = outputs.projections[-1].pow(3).sum()
        if outputs.logits is not None:
            loss = loss + outputs.logits.square().sum()
        loss.backward()
        gradients.append(model.backbone.conv1.weight.grad)
    assert gradients[0].abs().max() > 1e-3
    assert torch.equal(*gradients)


def test_kept_layers_equal_those_of_the_whole_network() -> None:
    whole = build_model(architecture(from_layer=1), seed=3)
    kept = build_model(architecture(from_layer=1, keep_head_layers=1), seed=3)
    assert set(kept.state_dict()) < set(whole.state_dict())
    images = draw(6, 3, 8, 8)
    assert torch.equal(kept(images).projections[0], whole(images).projections[0])
    assert len(kept(images).projections) == 1
    assert build_model(architecture(keep_head_layers=0), seed=3).head is None


@pytest.mark.parametrize(("from_layer", "keep"), [(4, None), (2, 1), (1, 0)])
def test_a_layer_that_is_not_there_cannot_be_read(from_layer: int, keep: int | None) -> None:
    with pytest.raises(ValueError, match=f"from_layer {from_layer}: the head has"):
        build_model(architecture(from_layer=from_layer, keep_head_layers=keep), seed=0)
    backbone = build_model(architecture(), seed=0).backbone
    with pytest.raises(ValueError, match="from_layer 1: the head has 0 layers"):
        SimCLR(backbone, None, from_layer=1)


def test_the_seed_alone_decides_the_weights() -> None:
    before = torch.get_rng_state()
    first, second, other = (build_model(architecture(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert not torch.equal(first.backbone.conv1.weight, other.backbone.conv1.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


def test_a_zero_classifier() -> None:
    model = build_model(architecture(from_layer=1), seed=0, zero_classifier=True)
    assert not model(draw(2, 3, 8, 8)).logits.any()


@pytest.mark.parametrize("selective_kernel", [False, True])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_activations_and_weights_are_channels_last(selective_kernel: bool, stem: str) -> None:
    section = ResNetBackbone(depth=50, width=1 / 16, selective_kernel=selective_kernel, stem=stem)
    model = build_model(architecture(backbone=section), seed=0)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)
    seen: list[Tensor] = []
    for group in (model.backbone.layer1, model.backbone.layer4):
        for block in group:
            block.register_forward_hook(lambda _m, _i, output: seen.append(output))
    model(draw(2, 3, 33, 33).contiguous(memory_format=torch.channels_last))
    assert len(seen) == 6
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in seen)


@pytest.mark.parametrize("selective_kernel", [False, True])
def test_kinds_of_parameters(selective_kernel: bool) -> None:
    section = ResNetBackbone(depth=50, width=1 / 16, selective_kernel=selective_kernel)
    with torch.device("meta"):
        model = build_model(architecture(backbone=section), seed=0)
    kinds = parameter_kind(model)
    assert list(kinds) == [name for name, _ in model.named_parameters()]
    for name, kind in kinds.items():
        owner, last = name.rsplit(".", 1)
        if owner == "classifier":
            assert kind == ("classifier_kernel" if last == "weight" else "classifier_bias")
        else:
            ndim = model.get_parameter(name).ndim
            assert kind == ("kernel" if ndim > 1 else "norm"), name


def test_mixed_precision_forward_is_close() -> None:
    section = ResNetBackbone(depth=50, width=1 / 16, selective_kernel=True)
    model = build_model(architecture(backbone=section), seed=0)
    images = draw(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    full = model(images).features
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(images).features
    assert half.dtype == torch.bfloat16
    # bfloat16 rounds by up to 2^-8 in each of 50 layers; measured 0.023.
    assert (half.float() - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("keep_head_layers", [None, 0, 2])
@pytest.mark.parametrize("section", [SMALL, ResNetBackbone(depth=152, width=3.0)])
def test_description_survives_json(section: ResNetBackbone, keep_head_layers: int | None) -> None:
    described = architecture(backbone=section, keep_head_layers=keep_head_layers)
    assert Architecture.from_json(described.to_json()) == described
    bare = Architecture(section, head=None, classes=None, from_layer=0)
    assert Architecture.from_json(bare.to_json()) == bare


@pytest.mark.parametrize(
    ("old", "new"),
    [('"depth":10', '"depth":11'), ('"classes":5', '"classes":"5"'), ("{", '{"more":1,')],
)
def test_a_wrong_description_is_refused(old: str, new: str) -> None:
    text = architecture().to_json()
    assert old in text
    with pytest.raises(ValueError, match="validation error"):
        Architecture.from_json(text.replace(old, new, 1))

"""Projection head and classifier against their formulas."""

import pytest
import torch
from torch import Tensor

from bigsimclr.models.heads import ProjectionHead, classifier


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(5), dtype=torch.float64)


def head(layers: int = 3, keep_layers: int | None = None) -> ProjectionHead:
    return ProjectionHead(
        6, layers=layers, output_width=4, generator=generator(), keep_layers=keep_layers
    )


def test_every_layer_follows_the_formula() -> None:
    model, features = head().double(), draw(9, 6)
    hidden, expected = features, []
    for index, layer in enumerate(model.layers):
        hidden = hidden @ layer.dense.weight.T
        centred = hidden - hidden.mean(0)
        hidden = centred / (centred.square().mean(0) + 1e-5).sqrt()
        if index < 2:
            hidden = hidden.relu()
        expected.append(hidden)
    outputs = model(features)
    assert [output.shape for output in outputs] == [(9, 6), (9, 6), (9, 4)]
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, value)


def test_only_the_last_batch_norm_lacks_a_bias_and_no_dense_layer_has_one() -> None:
    model = head()
    assert [layer.bn.bias is None for layer in model.layers] == [False, False, True]
    assert all(layer.dense.bias is None for layer in model.layers)


def test_a_cut_head_is_the_beginning_of_the_whole_one() -> None:
    whole, cut, features = head(), head(keep_layers=1), draw(9, 6).float()
    assert cut.widths == (6,)
    assert whole.widths == (6, 6, 4)
    assert cut.layers[0].bn.bias is not None
    assert len(cut(features)) == 1
    assert torch.equal(cut(features)[0], whole(features)[0])
    assert cut(features)[0].min() == 0  # a layer with ReLU, which a head of one layer lacks
    assert head(layers=1)(features)[0].min() < 0


@pytest.mark.parametrize("keep_layers", [0, 4])
def test_layers_that_do_not_exist_are_refused(keep_layers: int) -> None:
    with pytest.raises(ValueError, match="a head of 3 layers cannot keep"):
        head(keep_layers=keep_layers)


def test_classifier_starts_small_or_at_zero() -> None:
    small = classifier(100, 50, generator())
    assert small.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not small.bias.any()
    assert not classifier(100, 50, None).weight.any()

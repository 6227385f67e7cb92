"""Batch norm against its formula in float64."""

import pytest
import torch
from torch import Tensor, nn

from bigsimclr.models.norm import EPSILON, MOMENTUM, BatchNorm, frozen_running_statistics

SHAPES = [(2, 3), (7, 5), (2, 4, 1, 1), (3, 4, 5, 2), (1, 2, 3, 3)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3 + 1


def random_norm(channels: int, *, has_bias: bool = True) -> BatchNorm:
    norm = BatchNorm(channels, has_bias=has_bias).double()
    with torch.no_grad():
        norm.weight.copy_(draw(channels, seed=1))
        if norm.bias is not None:
            norm.bias.copy_(draw(channels, seed=2))
        norm.running_mean.copy_(draw(channels, seed=3))
        norm.running_var.copy_(draw(channels, seed=4).abs())
    return norm


def moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, kept in the shape of the inputs."""
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    mean = inputs.mean(axes, keepdim=True)
    return mean, (inputs - mean).square().mean(axes, keepdim=True)


def apply(inputs: Tensor, norm: BatchNorm, mean: Tensor, variance: Tensor) -> Tensor:
    shape = (1, -1, *[1] * (inputs.ndim - 2))
    outputs = (inputs - mean.view(shape)) / (variance.view(shape) + EPSILON).sqrt()
    outputs = outputs * norm.weight.view(shape)
    return outputs if norm.bias is None else outputs + norm.bias.view(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_training_follows_the_formula(shape: tuple[int, ...], has_bias: bool) -> None:
    norm, inputs = random_norm(shape[1], has_bias=has_bias), draw(*shape)
    running_mean, running_var = norm.running_mean.clone(), norm.running_var.clone()
    for step in range(2):
        batch = inputs + step
        mean, variance = moments(batch)
        torch.testing.assert_close(norm(batch), apply(batch, norm, mean, variance))
        running_mean = (1 - MOMENTUM) * running_mean + MOMENTUM * mean.flatten()
        running_var = (1 - MOMENTUM) * running_var + MOMENTUM * variance.flatten()
    torch.testing.assert_close(norm.running_mean, running_mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(norm.running_var, running_var, rtol=1e-14, atol=1e-14)


def test_two_values_have_half_the_squared_distance_as_variance_not_the_unbiased_one() -> None:
    norm = BatchNorm(1).double()
    norm(torch.tensor([[1.0], [3.0]], dtype=torch.float64))
    assert norm.running_var.item() == pytest.approx(0.9 * 1 + 0.1 * 1, abs=1e-15)
    assert norm.running_mean.item() == pytest.approx(0.2, abs=1e-15)


def test_one_value_per_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1 value"):
        BatchNorm(3)(torch.zeros(1, 3))


@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation_uses_running_statistics(shape: tuple[int, ...]) -> None:
    norm, inputs = random_norm(shape[1]).eval(), draw(*shape)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    expected = apply(inputs, norm, norm.running_mean, norm.running_var)
    torch.testing.assert_close(norm(inputs), expected)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_channels_last_inputs_give_the_same_in_the_same_layout() -> None:
    inputs = draw(3, 4, 5, 2, dtype=torch.float32)
    first, second = random_norm(4).float(), random_norm(4).float()
    expected = first(inputs)
    outputs = second(inputs.contiguous(memory_format=torch.channels_last))
    assert outputs.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(second.running_var, first.running_var)


def test_float32_statistics_agree_with_float64_far_from_zero() -> None:
    inputs = draw(64, 3, 4, 4) + 100
    norm = BatchNorm(3)
    norm(inputs.float())
    _, variance = moments(inputs)
    expected = 0.9 + 0.1 * variance.flatten()
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=2e-5, atol=0)


def test_gradients_equal_those_of_torch() -> None:
    ours, theirs = random_norm(4), nn.BatchNorm2d(4).double()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    upstream = draw(3, 4, 5, 2, seed=9)
    ours_in = draw(3, 4, 5, 2).requires_grad_()
    theirs_in = draw(3, 4, 5, 2).requires_grad_()
    ours(ours_in).backward(upstream)
    theirs(theirs_in).backward(upstream)
    torch.testing.assert_close(ours_in.grad, theirs_in.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_two_passes_before_one_backward_pass() -> None:
    norm = random_norm(4)
    inputs = draw(6, 4).requires_grad_()
    loss = norm(inputs).square().sum() + norm(inputs * 2).pow(3).sum()
    loss.backward()
    assert torch.isfinite(inputs.grad).all()


def test_bfloat16_inputs_keep_float32_statistics() -> None:
    norm = BatchNorm(4)
    inputs = draw(8, 4, 3, 3).to(torch.bfloat16)
    outputs = norm(inputs)
    assert outputs.dtype == torch.bfloat16
    assert norm.running_var.dtype == torch.float32
    _, variance = moments(inputs.double())
    expected = (0.9 + 0.1 * variance.flatten()).float()
    torch.testing.assert_close(norm.running_var, expected, rtol=1e-5, atol=0)


def test_frozen_running_statistics_change_no_output_and_no_buffer() -> None:
    model = nn.Sequential(random_norm(4), random_norm(4))
    inputs = draw(6, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with frozen_running_statistics(model):
        with frozen_running_statistics(model):
            model(inputs)
        frozen = model(inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(inputs), frozen)
    assert not torch.equal(model[1].running_var, before["1.running_var"])


def test_statistics_move_again_after_an_error() -> None:
    norm = random_norm(2)
    with pytest.raises(RuntimeError, match="inside"), frozen_running_statistics(norm):
        raise RuntimeError("inside")
    before = norm.running_mean.clone()
    norm(draw(5, 2))
    assert not torch.equal(norm.running_mean, before)


def test_initial_values() -> None:
    norm = BatchNorm(3, has_bias=False, zero_scale=True)
    assert norm.bias is None
    assert norm.weight.tolist() == [0, 0, 0]
    assert BatchNorm(3).weight.tolist() == [1, 1, 1]
    assert set(norm.state_dict()) == {"weight", "running_mean", "running_var"}

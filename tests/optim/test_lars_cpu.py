"""The form of LARS for a CPU: its norms from dot products against norms in float64."""

import pytest
import torch
from torch.nn import Parameter

from bigsimclr.optim import lars_cpu
from bigsimclr.optim.lars import LARS

TRUST = 1e-3


def flat(seed, dtype, number=100_003):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, generator=generator, dtype=torch.float64).to(dtype)


def in_pieces(weight, gradient, most=30_000):
    buffer = torch.zeros_like(weight)
    return list(zip(*(tensor.split(most) for tensor in (weight, gradient, buffer)), strict=True))


def ratio(weight, gradient, weight_decay):
    weight, gradient = weight.double(), gradient.double()
    return TRUST * float(weight.norm() / (gradient + weight_decay * weight).norm())


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-4, 1.0])
def test_trust_ratio(dtype, error, weight_decay):
    weight, gradient = flat(1, dtype), flat(2, dtype)
    found = lars_cpu.trust_ratio(in_pieces(weight, gradient), weight_decay, TRUST)
    assert found == pytest.approx(ratio(weight, gradient, weight_decay), rel=error)


# At 1e-3 the products alone would be wrong by 1%.
@pytest.mark.parametrize("left", [0.5, 0.1, 1e-2, 1e-3])
def test_a_gradient_that_the_decay_cancels(left):
    weight = flat(1, torch.float32)
    gradient = -0.5 * weight + left * flat(2, torch.float32)
    found = lars_cpu.trust_ratio(in_pieces(weight, gradient), 0.5, TRUST)
    assert found == pytest.approx(ratio(weight, gradient, 0.5), rel=1e-5)


def test_the_ratio_is_one_without_a_norm():
    weight, nothing = flat(1, torch.float32), torch.zeros(100_003)
    for weights, gradients, weight_decay in (
        (nothing, weight, 0.5),
        (weight, nothing, 0.0),
        (nothing, nothing, 0.5),
        (weight, -0.5 * weight, 0.5),
        (weight, torch.full_like(weight, float("nan")), 0.5),
    ):
        assert lars_cpu.trust_ratio(in_pieces(weights, gradients), weight_decay, TRUST) == 1.0


def test_float32_follows_float64_over_many_updates():
    shape = (512, 128, 3, 3)  # several pieces
    ends = []
    for dtype in (torch.float32, torch.float64):
        parameter = Parameter(flat(1, dtype, 512 * 128 * 9).view(shape))
        optimizer = LARS(
            [{"params": [parameter], "weight_decay": 1e-2}], learning_rate=5.0, momentum=0.9
        )
        for update in range(10):
            parameter.grad = flat(10 + update, dtype, 512 * 128 * 9).view(shape)
            optimizer.step()
        ends.append(parameter.detach().double())
    assert float((ends[1] - flat(1, torch.float64, 512 * 128 * 9).view(shape)).std()) > 0.01
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=3e-6)


def test_coarse_types_take_the_general_form():
    weight, gradient = flat(1, torch.bfloat16), flat(2, torch.bfloat16)
    parameter = Parameter(weight.clone())
    parameter.grad = gradient
    LARS([parameter], learning_rate=1000.0, trust_coefficient=TRUST).step()
    step = weight.double() - 1000.0 * ratio(weight, gradient, 0.0) * gradient.double()
    torch.testing.assert_close(parameter.detach().double(), step, rtol=2**-7, atol=2**-6)

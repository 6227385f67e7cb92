"""LARS against the update written out per tensor."""

import copy
import io

import pytest
import torch
from torch.nn import Parameter

from bigsimclr.optim.lars import LARS

RATES = [0.0, 0.5, 1.0, 0.3]
DECAY = 0.01
TRUST = 0.02


def tensors(seed, shapes=((4, 3, 2, 2), (5, 4), (4,))):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_hand(weights, *, momentum, nesterov, classic, adapt):
    """The official update, one tensor and one step at a time."""
    weights = [weight.clone() for weight in weights]
    buffers = [torch.zeros_like(weight) for weight in weights]
    for step, rate in enumerate(RATES):
        for i, gradient in enumerate(tensors(100 + step)):
            slope = gradient + DECAY * weights[i]
            if classic:
                trust = TRUST * weights[i].norm() / slope.norm() if adapt else 1.0
                buffers[i] = momentum * buffers[i] + rate * trust * slope
                move = momentum * buffers[i] + rate * trust * slope if nesterov else buffers[i]
            else:
                buffers[i] = momentum * buffers[i] + slope
                way = momentum * buffers[i] + slope if nesterov else buffers[i]
                trust = TRUST * weights[i].norm() / way.norm() if adapt else 1.0
                move = rate * trust * way
            weights[i] = weights[i] - move
    return weights, buffers


def by_lars(weights, *, adapt, **settings):
    parameters = [Parameter(weight.clone()) for weight in weights]
    optimizer = LARS(
        [{"params": parameters, "weight_decay": DECAY, "adapt": adapt}],
        learning_rate=1.0,
        trust_coefficient=TRUST,
        **settings,
    )
    for step, rate in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = rate
        for parameter, gradient in zip(parameters, tensors(100 + step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    buffers = [optimizer.state[parameter]["momentum"] for parameter in parameters]
    return [parameter.detach() for parameter in parameters], buffers


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("classic", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_update(adapt, classic, nesterov, momentum):
    settings = {
        "adapt": adapt,
        "classic": classic,
        "nesterov": nesterov,
        "momentum": momentum,
    }
    expected = by_hand(tensors(1), **settings)
    found = by_lars(tensors(1), **settings)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-15)


def in_layouts(tensor):
    """The same values with other strides: dense, dense in another order, and with gaps."""
    spaced = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)[..., 0]
    other = torch.empty_like(tensor, memory_format=torch.channels_last)
    return [tensor.clone(), other.copy_(tensor), spaced.copy_(tensor)]


@pytest.mark.parametrize("nesterov", [True, False])
def test_size_and_memory_layout_do_not_matter(nesterov):
    shapes = [(64, 40, 9, 9), (5, 4, 3, 3)]  # the first is taken in several pieces
    for weight, gradient in zip(tensors(1, shapes), tensors(2, shapes), strict=True):
        slope = gradient + DECAY * weight
        step = 0.5 * TRUST * weight.norm() / slope.norm() * slope
        expected = weight - (1.9 * step if nesterov else step)
        for number in range(9):
            parameter = Parameter(in_layouts(weight)[number // 3])
            parameter.grad = in_layouts(gradient)[number % 3]
            LARS(
                [{"params": [parameter], "weight_decay": DECAY}],
                learning_rate=0.5,
                trust_coefficient=TRUST,
                nesterov=nesterov,
            ).step()
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-15)


def test_float32_norms_of_large_parameters_are_exact():
    weight, gradient = (tensor.abs().float() for tensor in tensors(1, [(2_359_296,)] * 2))
    trust = 1e-3 * float(weight.double().norm() / gradient.double().norm())
    parameter = Parameter(weight.clone())
    parameter.grad = gradient
    LARS([parameter], learning_rate=1000.0).step()
    expected = weight.double() - 1000.0 * trust * gradient.double()
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 2.0), (3.0, 0.0), (0.0, 0.0)])
def test_a_norm_of_zero_means_a_trust_ratio_of_one(weight, gradient):
    parameter = Parameter(torch.full((2, 2), weight))
    parameter.grad = torch.full((2, 2), gradient)
    LARS([parameter], learning_rate=0.5).step()
    assert torch.equal(parameter.detach(), torch.full((2, 2), weight - 0.5 * gradient))


def test_the_gradient_is_left_as_it_was():
    parameter = Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 2.0)
    LARS([{"params": [parameter], "weight_decay": 0.1}], learning_rate=0.5).step()
    assert torch.equal(parameter.grad, torch.full((3,), 2.0))


def test_a_parameter_without_gradient_stays():
    still, moved = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = LARS([still, moved], learning_rate=0.5)
    for _ in range(2):
        moved.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(still.detach(), torch.ones(3))
    assert not optimizer.state[still]["momentum"].any()
    assert (moved < 1).all()


def test_a_closure_computes_the_gradient():
    parameter = Parameter(torch.ones(3))

    def closure():
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert LARS([parameter], learning_rate=0.5).step(closure) == 3.0
    assert (parameter < 1).all()


def test_squared_norms_may_be_summed_over_shards():
    whole = tensors(1)[:2]
    slopes = tensors(2)[:2]
    expected = [Parameter(weight.clone()) for weight in whole]
    for parameter, slope in zip(expected, slopes, strict=True):
        parameter.grad = slope
    LARS(expected, learning_rate=0.5).step()
    complete = [tensor.square().sum() for tensor in [*whole, *slopes]]
    shards = [Parameter(weight[:2].clone()) for weight in whole]
    for parameter, slope in zip(shards, slopes, strict=True):
        parameter.grad = slope[:2]
    LARS(shards, learning_rate=0.5, squared_norms=lambda _: complete).step()
    for shard, parameter in zip(shards, expected, strict=True):
        torch.testing.assert_close(shard.detach(), parameter.detach()[:2], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": -1.0},
        {"learning_rate": 1.0, "momentum": 1.0},
        {"learning_rate": 1.0, "trust_coefficient": 0.0},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="must be at least 0"):
        LARS([Parameter(torch.ones(1))], **settings)


def a_step(optimizer, seed):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, gradient in zip(parameters, tensors(seed), strict=True):
        parameter.grad = gradient
    optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def saved_and_loaded(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_goes_on_as_the_original(copied):
    group = {"params": [Parameter(weight) for weight in tensors(1)], "weight_decay": DECAY}
    settings = {"momentum": 0.7, "trust_coefficient": TRUST, "nesterov": True, "classic": False}
    optimizer = LARS([group], learning_rate=0.3, **settings)
    a_step(optimizer, 100)
    other = copied(optimizer)
    for mine, its in zip(a_step(optimizer, 101), a_step(other, 101), strict=True):
        torch.testing.assert_close(its, mine, rtol=0, atol=0)


def test_parameters_may_join_later():
    weights = tensors(1)
    together = LARS([Parameter(w.clone()) for w in weights], learning_rate=0.3)
    later = LARS([Parameter(w.clone()) for w in weights[:1]], learning_rate=0.3)
    later.add_param_group({"params": [Parameter(w.clone()) for w in weights[1:]]})
    for seed in (100, 101):
        for mine, its in zip(a_step(together, seed), a_step(later, seed), strict=True):
            torch.testing.assert_close(its, mine, rtol=0, atol=0)

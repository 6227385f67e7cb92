"""Which parameters decay and adapt, and state addressed by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from bigsimclr.errors import CheckpointError
from bigsimclr.optim import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
    set_learning_rate,
)
from bigsimclr.optim.adamw import TensorFlowAdamW
from bigsimclr.recipe.sections import AdamW, Lars, Sgd

KINDS = {
    "conv.weight": "kernel",
    "head.bias": "bias",
    "bn.weight": "norm",
    "classifier.weight": "classifier_kernel",
    "classifier.bias": "classifier_bias",
    "unused.weight": "kernel",
}
SECTIONS = {
    "lars": Lars(kind="lars", learning_rate=1.0, weight_decay=0.5),
    "sgd": Sgd(kind="sgd", learning_rate=1.0, weight_decay=0.5),
    "adamw": AdamW(kind="adamw", learning_rate=1.0, weight_decay=0.5),
}
KERNELS = {"conv.weight", "classifier.weight"}


def parameters():
    generator = torch.Generator().manual_seed(0)
    names = [name for name in KINDS if name != "unused.weight"]
    return {name: Parameter(torch.randn(3, 2, generator=generator)) for name in names}


def take_steps(optimizer, trained, *, seed, steps=2):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in trained.values():
            parameter.grad = torch.randn(3, 2, generator=generator)
        optimizer.step()


def names_where(optimizer, key):
    return {n for group in optimizer.param_groups if group[key] for n in group["names"]}


@pytest.mark.parametrize(
    ("kind", "decayed", "adapted"),
    [
        ("lars", KERNELS, {"conv.weight"}),
        ("sgd", KERNELS | {"head.bias", "classifier.bias"}, set()),
        ("adamw", KERNELS, set()),
    ],
)
def test_groups(kind, decayed, adapted):
    optimizer = build_optimizer(SECTIONS[kind], parameters(), kinds=KINDS, learning_rate=0.25)
    assert names_where(optimizer, "weight_decay") == decayed
    assert names_where(optimizer, "adapt") == adapted
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.5}


def test_the_classifier_under_lars_moves_by_plain_momentum_sgd():
    trained = parameters()
    weight = trained["classifier.weight"]
    expected, buffer = weight.detach().clone(), torch.zeros(3, 2)
    optimizer = build_optimizer(SECTIONS["lars"], trained, kinds=KINDS, learning_rate=0.25)
    for _ in range(3):
        for parameter in trained.values():
            parameter.grad = torch.ones(3, 2)
        buffer = 0.9 * buffer + 0.25 * (1.0 + 0.5 * expected)
        expected = expected - buffer
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


def test_sgd_is_nesterov_momentum_with_the_rate_inside():
    trained = parameters()
    weight = trained["bn.weight"]
    expected, buffer = weight.detach().clone(), torch.zeros(3, 2)
    optimizer = build_optimizer(SECTIONS["sgd"], trained, kinds=KINDS, learning_rate=0.25)
    for rate in (0.25, 0.125, 0.5):
        set_learning_rate(optimizer, rate)
        for parameter in trained.values():
            parameter.grad = torch.ones(3, 2)
        buffer = 0.9 * buffer + rate
        expected = expected - (0.9 * buffer + rate)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


def test_adam_adds_epsilon_before_the_correction():
    weight = Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = build_optimizer(
        SECTIONS["adamw"], {"w": weight}, kinds={"w": "norm"}, learning_rate=0.1
    )
    slope, first, second, expected = 1e-6, 0.0, 0.0, 0.0
    for update in (1, 2, 3):
        weight.grad = torch.tensor([slope], dtype=torch.float64)
        optimizer.step()
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        rate = 0.1 * (1 - 0.999**update) ** 0.5 / (1 - 0.9**update)
        expected -= rate * first / (second**0.5 + 1e-7)
    assert weight.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", sorted(SECTIONS))
def test_state_has_names_before_the_first_update(kind):
    trained = parameters()
    optimizer = build_optimizer(SECTIONS[kind], trained, kinds=KINDS, learning_rate=0.25)
    keys = ["step", "exp_avg", "exp_avg_sq"] if kind == "adamw" else ["momentum"]
    assert set(optimizer_state(optimizer)) == {f"{key}/{name}" for key in keys for name in trained}
    assert not any(tensor.any() for tensor in optimizer_state(optimizer).values())


@pytest.mark.parametrize("kind", sorted(SECTIONS))
def test_a_restored_optimizer_goes_on_to_the_bit(kind):
    trained = parameters()
    optimizer = build_optimizer(SECTIONS[kind], trained, kinds=KINDS, learning_rate=0.25)
    take_steps(optimizer, trained, seed=1)
    saved = {name: tensor.clone() for name, tensor in optimizer_state(optimizer).items()}
    again = {name: Parameter(p.detach().clone()) for name, p in trained.items()}
    take_steps(optimizer, trained, seed=2)
    restored = build_optimizer(SECTIONS[kind], again, kinds=KINDS, learning_rate=0.25)
    load_optimizer_state(restored, saved)
    take_steps(restored, again, seed=2)
    for name in trained:
        assert torch.equal(trained[name], again[name])


@pytest.mark.parametrize("kind", sorted(SECTIONS))
@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "dtype"])
def test_state_that_does_not_fit_changes_nothing(kind, damage):
    trained = parameters()
    optimizer = build_optimizer(SECTIONS[kind], trained, kinds=KINDS, learning_rate=0.25)
    take_steps(optimizer, trained, seed=1)
    before = {name: tensor.clone() for name, tensor in optimizer_state(optimizer).items()}
    saved = {name: tensor + 1 for name, tensor in before.items()}
    name = sorted(saved)[-1]
    match damage:
        case "missing":
            del saved[name]
        case "unknown":
            saved["momentum/other"] = torch.zeros(1)
        case "shape":
            saved[name] = torch.zeros(7)
        case _:
            saved[name] = saved[name].double()
    with pytest.raises(CheckpointError, match="optimizer state"):
        load_optimizer_state(optimizer, saved)
    for key, tensor in optimizer_state(optimizer).items():
        assert torch.equal(tensor, before[key])


def test_a_copied_adam_goes_on_as_the_original():
    weights = {}
    for how in (lambda optimizer: optimizer, copy.deepcopy):
        parameter = Parameter(torch.ones(3))
        optimizer = TensorFlowAdamW([{"params": [parameter]}], learning_rate=0.1, betas=(0.9, 0.99))
        for update in range(4):
            if update == 2:
                optimizer = how(optimizer)
                (parameter,) = optimizer.param_groups[0]["params"]
            parameter.grad = torch.full((3,), 1e-7 * (update + 1))
            optimizer.step()
        weights[how] = parameter.detach()
    first, second = weights.values()
    assert torch.equal(first, second)
    assert (first < 1).all()


def test_the_groups_of_any_module():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    module[2].bias.requires_grad_(requires_grad=False)
    kernels, rest = parameter_groups(module, weight_decay=0.1)
    assert kernels["names"] == ["0.weight", "2.weight"]
    assert (kernels["weight_decay"], kernels["adapt"]) == (0.1, True)
    assert rest["names"] == ["0.bias", "1.weight", "1.bias"]
    assert (rest["weight_decay"], rest["adapt"]) == (0.0, False)
    wanted = [module[0].bias, *module[1].parameters()]
    assert list(map(id, rest["params"])) == list(map(id, wanted))

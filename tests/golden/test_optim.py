"""LARS, SGD, Adam and the schedule against values of the official code."""

import json
import re

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from bigsimclr.optim import LARS, build_optimizer, optimizer_state, set_learning_rate
from bigsimclr.optim.schedule import warmup_cosine
from bigsimclr.recipe.plan import scaled_rate, total_steps, warmup_steps
from bigsimclr.recipe.sections import AdamW, Sgd
from tests.golden.paths import golden_dir

FOLDER = golden_dir() / "optim"
LARS_CASES = json.loads((FOLDER / "lars.json").read_text())
SCHEDULES = json.loads((FOLDER / "schedule.json").read_text())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.golden


def stored(file):
    with np.load(FOLDER / file) as values:
        return {name: torch.from_numpy(values[name]) for name in values.files}


@pytest.fixture(scope="module")
def lars_values():
    return stored("lars.npz")


@pytest.fixture(scope="module")
def other_values():
    return stored("sgd_adam.npz")


def named_by(name, patterns):
    return any(re.search(pattern, name) for pattern in patterns or [])


def lars_of(variant, parameters, *, fused):
    undecayed = variant["exclude_from_weight_decay"]
    unadapted = variant["exclude_from_layer_adaptation"]
    groups = [
        {
            "params": [parameter],
            "names": [name],
            "weight_decay": 0.0 if named_by(name, undecayed) else variant["wd"],
            "adapt": not named_by(name, undecayed if unadapted is None else unadapted),
        }
        for name, parameter in parameters.items()
    ]
    return LARS(
        groups,
        learning_rate=variant["lr"],
        momentum=variant["momentum"],
        trust_coefficient=variant["eeta"],
        nesterov=variant["nesterov"],
        classic=variant["classic"],
        fused=fused,
    )


@pytest.mark.parametrize(
    "fused", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "fused"]
)
@pytest.mark.parametrize("number", sorted(LARS_CASES["variants"]))
def test_lars(lars_values, number, fused):
    parameters = {
        name: Parameter(lars_values[f"param0/{name}"].to(DEVICE, copy=True))
        for name in LARS_CASES["params"]
    }
    optimizer = lars_of(LARS_CASES["variants"][number], parameters, fused=fused)
    for step, rate in enumerate(lars_values[f"{number}/lrs"].tolist()):
        set_learning_rate(optimizer, rate)
        for name, parameter in parameters.items():
            parameter.grad = lars_values[f"grads/{name}"][step].to(DEVICE, copy=True)
        optimizer.step()
        for name, parameter in parameters.items():
            expected = lars_values[f"{number}/traj/{name}"][step]
            limit = 2e-6 * float(expected.abs().max())
            torch.testing.assert_close(parameter.detach().cpu(), expected, rtol=0, atol=limit)
    for name, momentum in optimizer_state(optimizer).items():
        expected = lars_values[f"{number}/momentum_final/{name.removeprefix('momentum/')}"]
        limit = 5e-6 * float(expected.abs().max())
        torch.testing.assert_close(momentum.cpu(), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("official", ["momentum", "adam"])
def test_sgd_and_adam(other_values, device, official):
    rate = float(other_values[f"{official}/lr"])
    section = (
        Sgd(kind="sgd", learning_rate=rate, momentum=0.9)
        if official == "momentum"
        else AdamW(kind="adamw", learning_rate=rate)
    )
    parameter = Parameter(other_values["param0"].to(device, copy=True))
    optimizer = build_optimizer(
        section, {"weight": parameter}, kinds={"weight": "kernel"}, learning_rate=rate
    )
    for gradient, expected in zip(
        other_values["grads"], other_values[f"{official}/traj"], strict=True
    ):
        parameter.grad = gradient.to(device, copy=True)
        optimizer.step()
        limit = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(parameter.detach().cpu(), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("combination", SCHEDULES)
def test_schedule(combination):
    examples, batch = combination["num_examples"], combination["batch"]
    total = combination.get("train_steps") or total_steps(examples, combination["epochs"], batch)
    warmup = warmup_steps(examples, combination["warmup"], batch)
    peak = scaled_rate(combination["lr"], combination["scaling"], batch)
    assert total == combination["train_steps_total"]
    assert warmup == combination["warmup_steps"]
    assert peak == pytest.approx(combination["scaled_lr"], rel=1e-12)
    for step, exact, official in zip(
        combination["steps"], combination["lr_fp64"], combination["lr_tf2"], strict=True
    ):
        rate = peak * warmup_cosine(step, warmup_steps=warmup, total_steps=total)
        assert rate == pytest.approx(exact, abs=1e-9 * peak)
        assert rate == pytest.approx(official, abs=2e-7 * peak)

"""Distillation and supervised losses against values of the official notebook and objective."""

import json

import numpy as np
import pytest
import torch

from bigsimclr.losses.classify import cross_entropy, distillation
from tests.golden.paths import golden_dir

FOLDER = golden_dir() / "distill"
CASES = json.loads((FOLDER / "distill.json").read_text())
DISTILLATIONS = sorted(name for name in CASES if name.startswith("kd"))

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def values():
    with np.load(FOLDER / "distill.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def distilled(values, name, device, dtype):
    student = values[f"{name}/student_logits"].to(device, dtype).requires_grad_()
    teacher = values[f"{name}/teacher_logits"].to(device, dtype)
    loss = distillation(student, teacher, temperature=CASES[name]["temperature"])
    loss.backward()
    return loss.detach().double().cpu(), student.grad.double().cpu()


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_distillation_float64(values, device, name):
    loss, gradient = distilled(values, name, device, torch.float64)
    torch.testing.assert_close(loss, values[f"{name}/loss64"].double(), rtol=1e-10, atol=0)
    slope = values[f"{name}/grad64"]
    limit = 1e-10 * float(slope.abs().max())
    torch.testing.assert_close(gradient, slope, rtol=0, atol=limit)


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_distillation_float32(values, device, name):
    loss, gradient = distilled(values, name, device, torch.float32)
    torch.testing.assert_close(loss, values[f"{name}/loss64"].double(), rtol=1e-6, atol=0)
    slope = values[f"{name}/grad64"]
    limit = 1e-6 * float(slope.abs().max()) + 1e-8
    torch.testing.assert_close(gradient, slope, rtol=0, atol=limit)


def test_supervised_loss(values, device):
    logits = values["sup/logits"].to(device, copy=True).requires_grad_()
    loss = cross_entropy(logits, values["sup/labels"].long().to(device))
    loss.backward()
    torch.testing.assert_close(loss.detach().cpu(), values["sup/loss"], rtol=1e-6, atol=0)
    limit = 1e-6 * float(values["sup/grad"].abs().max()) + 1e-8
    torch.testing.assert_close(logits.grad.cpu(), values["sup/grad"], rtol=0, atol=limit)

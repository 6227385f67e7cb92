"""The contrastive loss against values of the official objective."""

import json

import numpy as np
import pytest
import torch

from bigsimclr.losses.nt_xent import contrastive_metrics, nt_xent
from tests.golden.paths import golden_dir

FOLDER = golden_dir() / "loss"
CASES = json.loads((FOLDER / "contrastive.json").read_text())
SINGLE = sorted(name for name in CASES if name.startswith("case"))
MULTI = sorted(name for name in CASES if name.startswith("multi"))
CHUNKS = [None, 3, 10_000]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the kernels

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def values():
    with np.load(FOLDER / "contrastive.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def loss_and_gradient(hidden, case, *, device, row_chunk=None, fused=None):
    rows = hidden.to(device, copy=True).requires_grad_()
    first, second = rows.chunk(2)
    loss = nt_xent(
        first,
        second,
        temperature=case["temperature"],
        row_chunk=row_chunk,
        normalise=case["hidden_norm"],
        fused=fused,
    )
    loss.backward()
    return loss.detach().cpu(), rows.grad.cpu()


@pytest.mark.parametrize("row_chunk", CHUNKS)
@pytest.mark.parametrize("name", SINGLE)
def test_float64(values, device, name, row_chunk):
    loss, gradient = loss_and_gradient(
        values[f"{name}/hidden"].double(), CASES[name], device=device, row_chunk=row_chunk
    )
    torch.testing.assert_close(loss, values[f"{name}/loss64"].double(), rtol=1e-9, atol=1e-12)
    expected = values[f"{name}/grad64"]
    limit = 1e-9 * float(expected.abs().max()) + 1e-15
    torch.testing.assert_close(gradient, expected, rtol=0, atol=limit)


@pytest.mark.parametrize("row_chunk", CHUNKS)
@pytest.mark.parametrize("name", SINGLE)
def test_float32(values, device, name, row_chunk):
    loss, gradient = loss_and_gradient(
        values[f"{name}/hidden"], CASES[name], device=device, row_chunk=row_chunk
    )
    expected = values[f"{name}/loss64"].double()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-5)
    slope = values[f"{name}/grad64"]
    limit = 1e-5 * float(slope.abs().max()) + 1e-12
    torch.testing.assert_close(gradient.double(), slope, rtol=0, atol=limit)


# The bounds of the kernels against float64.
@pytest.mark.parametrize(
    ("grade", "of_value", "of_gradient"),
    [("fp32", 2e-6, 5e-6), ("bf16", 1e-4, 2e-3)],
)
@pytest.mark.parametrize("name", [name for name in SINGLE if CASES[name]["hidden_norm"]])
def test_fused(values, name, grade, of_value, of_gradient):
    hidden = values[f"{name}/hidden"].float()
    loss, gradient = loss_and_gradient(hidden, CASES[name], device=DEVICE, fused=grade)
    expected, slope = values[f"{name}/loss64"].item(), values[f"{name}/grad64"].double()
    assert loss.item() == pytest.approx(expected, rel=of_value, abs=1e-6)
    assert (gradient.double() - slope).norm() <= of_gradient * slope.norm() + 1e-12


@pytest.mark.parametrize("row_chunk", CHUNKS)
@pytest.mark.parametrize("name", MULTI)
def test_the_global_batch_has_the_mean_of_the_replicas(values, device, name, row_chunk):
    hidden = values[f"{name}/hidden"].double()  # [R, 2B, D]
    replicas, views, width = hidden.shape
    by_view = hidden.view(replicas, 2, views // 2, width).transpose(0, 1).reshape(-1, width)
    loss, gradient = loss_and_gradient(by_view, CASES[name], device=device, row_chunk=row_chunk)
    expected = values[f"{name}/mean_loss64"].double()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    by_replica = gradient.view(2, replicas, views // 2, width).transpose(0, 1).reshape(hidden.shape)
    slope = values[f"{name}/true_grad64"]
    limit = 1e-9 * float(slope.abs().max()) + 1e-15
    torch.testing.assert_close(by_replica, slope, rtol=0, atol=limit)


@pytest.mark.parametrize("name", [name for name in SINGLE if CASES[name]["hidden_norm"]])
def test_metrics(values, device, name):
    first, second = values[f"{name}/hidden"].to(device).chunk(2)
    metrics = contrastive_metrics(first, second, temperature=CASES[name]["temperature"])
    assert metrics.accuracy.item() == pytest.approx(values[f"{name}/contrast_acc"].item())
    assert metrics.entropy.item() == pytest.approx(
        values[f"{name}/contrast_entropy"].item(), rel=1e-4, abs=1e-5
    )

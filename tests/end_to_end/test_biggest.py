"""The largest published network, as it is: ResNet-152 3x with selective kernels, and its head."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bigsimclr.losses.nt_xent import nt_xent
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.cost import cost
from bigsimclr.models.memory import save_memory
from bigsimclr.models.simclr import parameter_kind
from bigsimclr.optim import build_optimizer
from bigsimclr.recipe.sections import HeadSection, Lars, ResNetBackbone

BIGGEST = Architecture(
    ResNetBackbone(depth=152, width=3.0, selective_kernel=True),
    HeadSection(),
    None,
    from_layer=0,
)
PARAMETERS = 871_012_768
STATISTICS = 556_032
NEEDED_GB = 12.5
"""Weights, gradients and momentum are 10.5 GB: 11.3 GB at the peak of the process, measured."""


def available_gb() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise AssertionError("Linux says how much memory is available")


def sample(parameter: Tensor) -> Tensor:
    """A copy of the first output's weights, or of all scales."""
    return (parameter[:1] if parameter.ndim > 1 else parameter).detach().clone()


def test_its_size() -> None:
    with torch.device("meta"):
        model = build_model(BIGGEST, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS
    assert sum(buffer.numel() for buffer in model.buffers()) == STATISTICS
    found = cost(BIGGEST, image_size=224)
    assert found.total.parameters == PARAMETERS
    # The paper counts the backbone, with batch norm's statistics: 795 M.
    assert round((found.backbone.parameters + found.backbone.statistics) / 1e6) == 795


@pytest.mark.slow
@pytest.mark.long
def test_a_pretraining_step() -> None:
    if not Path("/proc/meminfo").exists():
        pytest.skip("available memory is read from /proc/meminfo")
    if (available := available_gb()) < NEEDED_GB:
        pytest.skip(f"needs {NEEDED_GB:g} GB of memory, {available:.1f} are available")
    model = build_model(BIGGEST, seed=0).train()
    save_memory(model, "block")
    named = dict(model.named_parameters())
    assert sum(parameter.numel() for parameter in named.values()) == PARAMETERS
    optimizer = build_optimizer(
        Lars(kind="lars", learning_rate=0.1),
        named,
        kinds=parameter_kind(model),
        learning_rate=0.1,
    )
    generator = torch.Generator().manual_seed(0)
    views = torch.rand(2 * 2, 3, 32, 32, generator=generator)
    views = views.contiguous(memory_format=torch.channels_last)
    first, second = model(views).projections[-1].chunk(2)
    loss = nt_xent(first, second)
    loss.backward()
    assert torch.isfinite(loss)
    assert [n for n, p in named.items() if p.grad is None or not p.grad.isfinite().all()] == []
    before = {name: sample(parameter) for name, parameter in named.items()}
    optimizer.step()
    after = {name: sample(parameter) for name, parameter in named.items()}
    # Decay moves every kernel, and the gradient the batch norm that each block ends with.
    still = {name for name in named if torch.equal(before[name], after[name])}
    kernels = {name for name, kind in parameter_kind(model).items() if kind == "kernel"}
    assert still & kernels == set()
    assert [name for name in still if name.endswith("bn3.weight")] == []
    assert [name for name, values in after.items() if not values.isfinite().all()] == []
    for name, statistics in model.named_buffers():
        assert statistics.isfinite().all(), name

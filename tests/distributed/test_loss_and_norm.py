"""Loss and batch norm over several ranks: value and gradient of one process, in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor

from bigsimclr.losses.nt_xent import contrastive_metrics, nt_xent
from bigsimclr.models.norm import BatchNorm, average_running_statistics, share_batch_norm
from bigsimclr.world import ALONE, World
from tests.distributed.ranks import on_ranks

WIDTH, PAIRS, QUEUE = 7, 12, 5  # 12 pairs go evenly onto 1, 2, 3 and 4 ranks
# Three ranks show what order sums are made in, which two hide.
SIZES = [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def share(rows: Tensor, world: World) -> Tensor:
    """This rank's rows of the global batch."""
    return rows.chunk(world.size)[world.rank]


def exact(numbers: list) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


# --- loss ----------------------------------------------------------------------------------------


def loss_of(world: World, *, temperature: float, row_chunk: int | None) -> dict[str, list]:
    """Loss, gradient and metrics of this rank's share, as plain numbers."""
    first = share(drawn(PAIRS, WIDTH, seed=1), world).requires_grad_()
    second = share(drawn(PAIRS, WIDTH, seed=2), world).requires_grad_()
    queue = drawn(QUEUE, WIDTH, seed=3)
    loss = nt_xent(
        first, second, temperature=temperature, row_chunk=row_chunk, queue=queue, world=world
    )
    loss.backward()
    assert first.grad is not None
    assert second.grad is not None
    seen = contrastive_metrics(
        first.detach(), second.detach(), temperature=temperature, world=world
    )
    return {
        "loss": loss.tolist(),
        "first": first.grad.tolist(),
        "second": second.grad.tolist(),
        "accuracy": seen.accuracy.tolist(),
        "entropy": seen.entropy.tolist(),
    }


@pytest.mark.parametrize("row_chunk", [None, 2, 100])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_the_loss_of_all_ranks(size: int, temperature: float, row_chunk: int | None) -> None:
    whole = loss_of(ALONE, temperature=temperature, row_chunk=None)
    parts = on_ranks(size, partial(loss_of, temperature=temperature, row_chunk=row_chunk))
    for name in ("loss", "accuracy", "entropy"):
        mean = sum(part[name] for part in parts) / size
        assert mean == pytest.approx(whole[name], rel=1e-12, abs=1e-12), name
    for name in ("first", "second"):
        # Each rank has the gradient of the ranks' sum; averaged like a parameter's, of their mean.
        gradient = exact([row for part in parts for row in part[name]]) / size
        assert worst(gradient, exact(whole[name])) < 1e-12


# --- batch norm ----------------------------------------------------------------------------------


def norm_of(
    world: World, *, shape: tuple[int, ...], has_bias: bool, frozen: bool
) -> dict[str, list]:
    channels = shape[1]
    norm = BatchNorm(channels, has_bias=has_bias).double()
    with torch.no_grad():
        for number, parameter in enumerate(norm.parameters()):
            parameter.copy_(drawn(channels, seed=10 + number))
    share_batch_norm(norm, world)
    norm.moves_running_statistics = not frozen
    # A large mean beside a small deviation, and other values on every rank.
    inputs = (share(drawn(*shape, seed=4), world) + 100).requires_grad_()
    upstream = share(drawn(*shape, seed=5), world)
    outputs = norm(inputs)
    (outputs * upstream).sum().backward()
    assert inputs.grad is not None
    found = {
        "outputs": outputs,
        "inputs": inputs.grad,
        **{name: p.grad for name, p in norm.named_parameters()},
        **dict(norm.named_buffers()),
    }
    return {name: value.tolist() for name, value in found.items()}


@pytest.mark.parametrize(
    ("shape", "has_bias", "frozen"),
    [
        ((12, 3, 2, 5), True, False),
        ((12, 6), False, False),
        ((12, 4, 1, 1), True, True),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_batch_norm_of_all_ranks(
    size: int, shape: tuple[int, ...], has_bias: bool, frozen: bool
) -> None:
    whole = norm_of(ALONE, shape=shape, has_bias=has_bias, frozen=frozen)
    parts = on_ranks(size, partial(norm_of, shape=shape, has_bias=has_bias, frozen=frozen))
    for name, expected in whole.items():
        values = [exact(part[name]) for part in parts]
        if name in ("outputs", "inputs"):
            found = torch.cat(values)
        elif name.startswith("running"):
            assert all(torch.equal(value, values[0]) for value in values)
            found = values[0]
        else:
            found = torch.stack(values).sum(0)
        assert worst(found, exact(expected)) < 1e-11, name


def group_norm_of(world: World, *, size: int) -> dict[str, list]:
    """Share statistics in groups; then agree on the running ones."""
    norm = BatchNorm(3).double()
    share_batch_norm(norm, world.neighbours(size))
    inputs = share(drawn(12, 3, seed=6), world).requires_grad_()
    (norm(inputs) * share(drawn(12, 3, seed=7), world)).sum().backward()
    own = norm.running_var.clone()
    average_running_statistics(norm, world)
    assert inputs.grad is not None
    found = {"inputs": inputs.grad, "own": own, "running_var": norm.running_var}
    return {name: value.tolist() for name, value in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_batch_norm_of_groups_of_ranks(size: int) -> None:
    parts = on_ranks(4, partial(group_norm_of, size=size))
    gradients, variances = [], []
    for piece, upstream in zip(
        drawn(12, 3, seed=6).chunk(4 // size), drawn(12, 3, seed=7).chunk(4 // size), strict=True
    ):
        alone, rows = BatchNorm(3).double(), piece.clone().requires_grad_()
        (alone(rows) * upstream).sum().backward()
        gradients.append(rows.grad)
        variances.append(alone.running_var)
    assert (
        worst(exact([part["inputs"] for part in parts]).flatten(0, 1), torch.cat(gradients)) < 1e-12
    )
    for rank, part in enumerate(parts):
        assert worst(exact(part["own"]), variances[rank // size]) < 1e-12
        assert worst(exact(part["running_var"]), torch.stack(variances).mean(0)) < 1e-12

"""The fused batch norm over several ranks: values and gradients of one process."""

import os
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bigsimclr.models.anatomy import Memory
from bigsimclr.models.norm import BatchNorm, fuse_batch_norm, share_batch_norm
from bigsimclr.parallel.fsdp2 import shard_model
from bigsimclr.world import ALONE, World
from tests.distributed.ranks import on_ranks
from tests.models.test_memory import images, network

TOLERANCE = 2e-5  # of the largest value of a tensor, over the ten layers; 3e-6 over one


def state_of(world: World, *, memory: Memory = "none", is_sharded: bool = False) -> dict[str, list]:
    """Take a pass in float32 over this rank's share of the images, as plain numbers."""
    os.environ["TRITON_INTERPRET"] = "1"  # ranks compute on the CPU, with a GPU beside it or not
    model = network(10, selective_kernel=True, memory=memory)
    fuse_batch_norm(model)
    share_batch_norm(model, world)
    if is_sharded:
        shard_model(model, world, reshard=True)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(8, 16, generator=generator).chunk(world.size)[world.rank]
    outputs = model(images(8).chunk(world.size)[world.rank]).projections[-1]
    (outputs * direction).sum().backward()
    found = {"outputs": outputs, **dict(model.named_buffers())}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()  # the mean over the ranks
        found[f"gradient of {name}"] = gradient
    return {name: value.tolist() for name, value in found.items()}


def residual_of(world: World) -> dict[str, list]:
    """Normalise values far from zero and unlike on every rank."""
    os.environ["TRITON_INTERPRET"] = "1"
    norm = BatchNorm(5)
    norm.fused = True
    share_batch_norm(norm, world)
    generator = torch.Generator().manual_seed(0)
    shares = [
        torch.randn(12, 5, generator=generator).chunk(world.size)[world.rank] for _ in range(3)
    ]
    inputs, residual = (value.clone().requires_grad_() for value in shares[:2])
    outputs = norm(inputs + 10, residual, relu=True)
    outputs.backward(shares[2])
    found = {"outputs": outputs, "inputs": inputs.grad, "residual": residual.grad}
    found |= {f"gradient of {name}": p.grad for name, p in norm.named_parameters()}
    found |= dict(norm.named_buffers())
    return {name: value.tolist() for name, value in found.items()}


def exact(numbers: list) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def check(parts: list[dict[str, list]], whole: dict[str, list], *, tolerance: float) -> None:
    for name, expected in whole.items():
        values = [exact(part[name]) for part in parts]
        if name in ("outputs", "inputs", "residual"):
            found = torch.cat(values)
        elif name.startswith("gradient"):
            found = torch.stack(values).sum(0)
        else:
            assert all(torch.equal(value, values[0]) for value in values), name
            found = values[0]
        error = (found - exact(expected)).abs().max() / exact(expected).abs().max()
        assert error < tolerance, (name, float(error))


def test_a_residual_sum_over_two_ranks() -> None:
    check(on_ranks(2, residual_of), residual_of(ALONE), tolerance=3e-6)


@pytest.mark.slow
def test_a_network_over_two_ranks() -> None:
    check(on_ranks(2, state_of), state_of(ALONE), tolerance=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("is_sharded", [False, True])
def test_what_is_computed_again_over_two_ranks_has_the_same_bits(is_sharded: bool) -> None:
    keeping = on_ranks(2, partial(state_of, is_sharded=is_sharded))
    saving = on_ranks(2, partial(state_of, memory="selective", is_sharded=is_sharded))
    assert saving == keeping


@pytest.mark.slow
def test_a_sharded_network_over_two_ranks() -> None:
    whole, parts = state_of(ALONE), on_ranks(2, partial(state_of, is_sharded=True))
    check(parts, whole, tolerance=TOLERANCE)

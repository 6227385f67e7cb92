"""Precision over several ranks: one verdict on gradients, one loss scale, the same arithmetic."""

from functools import partial

import pytest
import torch

from bigsimclr.errors import NumericsError
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.norm import share_batch_norm
from bigsimclr.models.simclr import SimCLR, parameter_kind
from bigsimclr.optim import build_optimizer
from bigsimclr.parallel import Strategy, build_strategy
from bigsimclr.recipe.sections import Lars, ResNetBackbone
from bigsimclr.recipe.strategies import ParallelSection
from bigsimclr.world import World
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.slow

STRATEGIES = ["ddp", "zero1", "fsdp2"]


def prepared(
    world: World, kind: str, precision: str, exchange: str = "fp32"
) -> tuple[Strategy, SimCLR]:
    backbone = ResNetBackbone(depth=10, width=0.125, stem="cifar")
    model = build_model(Architecture(backbone, None, 3, 0), seed=0).train()
    share_batch_norm(model, world)
    section = ParallelSection(
        strategy=kind, device="cpu", precision=precision, gradient_exchange=exchange
    )
    strategy = build_strategy(section, world)
    lars = Lars(kind="lars", learning_rate=0.1, rate_scaling="none")
    strategy.prepare(
        model, partial(build_optimizer, lars, kinds=parameter_kind(model), learning_rate=0.1)
    )
    return strategy, model


def step(strategy: Strategy, model: SimCLR, world: World, factor: float) -> None:
    """Add a gradient of this rank's images."""
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(world.rank))
    with strategy.compute():
        logits = model(images).logits
    assert logits is not None
    strategy.backward((logits.float() - 1).square().mean() * factor)


def weights_of(strategy: Strategy) -> dict[str, list]:
    return {name: t.tolist() for piece in strategy.whole() for name, t in piece.items()}


def skipped(world: World, kind: str) -> tuple[list[bool], dict[str, float], bool]:
    """Let the gradients of the last rank alone overflow, then none."""
    strategy, model = prepared(world, kind, "fp16")
    before = weights_of(strategy)
    step(strategy, model, world, 1e38 if world.rank == world.size - 1 else 1.0)
    found = [strategy.update().skipped]
    moved = {n: v for n, v in weights_of(strategy).items() if v != before[n]}
    is_still = not any("running" not in name for name in moved)
    step(strategy, model, world, 1.0)
    return [*found, strategy.update().skipped], strategy.state(), is_still


@pytest.mark.parametrize("kind", STRATEGIES)
def test_an_overflow_on_one_rank_skips_the_update_on_all(kind: str) -> None:
    for found, state, is_still in on_ranks(3, partial(skipped, kind=kind)):
        assert found == [True, False]
        assert state == {"scale": 32768.0, "finite_updates": 1.0}
        assert is_still


def refused(world: World, kind: str) -> str:
    strategy, model = prepared(world, kind, "fp32")
    step(strategy, model, world, float("inf") if world.rank == 0 else 1.0)
    with pytest.raises(NumericsError) as error:
        strategy.update()
    return str(error.value)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_gradient_that_is_not_finite_on_one_rank_ends_all(kind: str) -> None:
    assert all("gradient norm" in text for text in on_ranks(3, partial(refused, kind=kind)))


def trained(world: World, kind: str, precision: str) -> dict[str, list]:
    strategy, model = prepared(world, kind, precision)
    for _ in range(5):
        step(strategy, model, world, 1.0)
        strategy.update()
    return weights_of(strategy)


def test_bf16_is_the_same_arithmetic_under_every_strategy() -> None:
    found = {
        kind: on_ranks(2, partial(trained, kind=kind, precision="bf16"))[0] for kind in STRATEGIES
    }
    (exact,) = {repr(part) for part in on_ranks(2, partial(trained, kind="ddp", precision="fp32"))}
    assert repr(found["ddp"]) != exact  # it was not float32
    assert found["zero1"] == found["ddp"]
    for name, values in found["ddp"].items():
        ours, theirs = torch.tensor(found["fsdp2"][name]), torch.tensor(values)
        # Weights of another memory layout are summed in another order before they are rounded.
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm().clamp_min(1e-2), name


def exchanged(world: World, kind: str, exchange: str) -> list[list]:
    """Weights after an update whose gradients were exchanged in a type."""
    strategy, model = prepared(world, kind, "fp32", exchange)
    step(strategy, model, world, 1.0)
    strategy.update()
    return [parameter.tolist() for parameter in model.parameters()]


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_that_travel_in_bf16(size: int) -> None:
    exact = on_ranks(size, partial(exchanged, kind="ddp", exchange="fp32"))
    found = on_ranks(size, partial(exchanged, kind="ddp", exchange="bf16"))
    assert all(part == found[0] for part in found)  # alike on all ranks
    assert on_ranks(size, partial(exchanged, kind="zero1", exchange="bf16"))[0] == found[0]
    assert found[0] != exact[0]  # it was not float32
    for rounded, plain in zip(found[0], exact[0], strict=True):
        ours, theirs = torch.tensor(rounded), torch.tensor(plain)
        assert (ours - theirs).norm() <= 4e-3 * theirs.norm().clamp_min(1e-2)

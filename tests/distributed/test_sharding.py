"""Sharded models: the largest network without its memory, and recomputation under FSDP2."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch

from bigsimclr.models import Architecture, build_model
from bigsimclr.models.memory import save_memory
from bigsimclr.models.norm import share_batch_norm
from bigsimclr.models.resnet import fork_bottlenecks
from bigsimclr.models.simclr import parameter_kind
from bigsimclr.optim import build_optimizer
from bigsimclr.parallel.fsdp2 import FullySharded, local_of, shard_model
from bigsimclr.parallel.precision import Precision
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone, Sgd
from bigsimclr.world import World, name_device
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.slow

BIGGEST = Architecture(
    ResNetBackbone(depth=152, width=3.0, selective_kernel=True), HeadSection(), None, 0
)
PARAMETERS = 871_012_768


def biggest_under_fsdp2(world: World) -> tuple[int, int]:
    with torch.device("meta"):
        model = build_model(BIGGEST, seed=0)
    shard_model(model, world, reshard=True)
    parts = [local_of(parameter) for parameter in model.parameters()]
    assert all(part.is_meta for part in parts)
    return sum(part.numel() for part in parts), sum(p.numel() for p in model.parameters())


def test_fsdp2_shards_the_biggest_network_on_the_meta_device() -> None:
    parts = on_ranks(3, biggest_under_fsdp2)
    assert sum(own for own, _ in parts) == PARAMETERS
    assert {whole for _, whole in parts} == {PARAMETERS}
    # No rank holds much more than its third.
    assert max(own for own, _ in parts) < 1.01 * PARAMETERS / 3


def biggest_under_zero3(world: World) -> tuple[int, int]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    name_device(world.device)
    deepspeed.init_distributed("gloo", verbose=False)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with (
        torch.device("meta"),
        deepspeed.zero.Init(config_dict_or_path=config, remote_device="cpu"),
    ):
        model = build_model(BIGGEST, seed=0)
    own = sum(parameter.ds_tensor.ds_numel for parameter in model.parameters())
    return own, sum(parameter.ds_numel for parameter in model.parameters())


@pytest.mark.long
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra `deepspeed` is missing")
def test_zero3_shards_the_biggest_network_from_the_meta_device() -> None:
    parts = on_ranks(2, biggest_under_zero3, seconds=300)
    assert {whole for _, whole in parts} == {PARAMETERS}
    for own, _ in parts:
        # Parts are rounded up to one length.
        assert PARAMETERS / 2 <= own < 1.001 * PARAMETERS / 2


def gradients_of(
    world: World, memory: str, *, reshard: bool, forked: bool = False
) -> dict[str, list]:
    """Gradient of some sum, and the running statistics after it."""
    backbone = ResNetBackbone(depth=50, width=0.0625, selective_kernel=True, stem="cifar")
    model = build_model(Architecture(backbone, HeadSection(output_width=8), None, 0), seed=0)
    model.double().train()
    share_batch_norm(model, world)
    save_memory(model, memory)
    if forked:
        fork_bottlenecks(model)
    strategy = FullySharded(world, Precision(world.device, "fp32"), reshard=reshard)
    section = Sgd(kind="sgd", learning_rate=1.0, momentum=0.0)
    strategy.prepare(
        model, partial(build_optimizer, section, kinds=parameter_kind(model), learning_rate=1.0)
    )
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(world.rank)).double()
    weights = torch.rand(8, 8, generator=torch.Generator().manual_seed(9)).double()
    strategy.backward((model(images).projections[-1] * weights).sum())
    strategy.update()
    return {name: t.tolist() for piece in strategy.whole() for name, t in piece.items()}


@pytest.mark.parametrize("reshard", [True, False])
def test_what_is_computed_again_under_fsdp2_is_the_same(reshard: bool) -> None:
    plain, *_ = on_ranks(2, partial(gradients_of, memory="none", reshard=reshard))
    for memory in ("selective", "block"):
        again, *_ = on_ranks(2, partial(gradients_of, memory=memory, reshard=reshard))
        for name, values in plain.items():
            assert torch.allclose(
                torch.tensor(again[name]), torch.tensor(values), rtol=1e-12, atol=1e-14
            ), name


@pytest.mark.parametrize(("memory", "reshard"), [("selective", True), ("none", False)])
def test_forked_bottlenecks_under_fsdp2_are_the_plain_ones(memory: str, reshard: bool) -> None:
    plain, *_ = on_ranks(2, partial(gradients_of, memory=memory, reshard=reshard))
    forked, *_ = on_ranks(2, partial(gradients_of, memory=memory, reshard=reshard, forked=True))
    assert plain.keys() == forked.keys()
    for name, values in plain.items():
        found, expected = (
            torch.tensor(numbers, dtype=torch.float64) for numbers in (forked[name], values)
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)

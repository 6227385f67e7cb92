"""The model of many GPUs in benchmarks.scaling, against calculations by hand."""

from itertools import pairwise

import pytest
import torch

from benchmarks.scaling import (
    BATCH,
    GPUS_PER_NODE,
    MODEL_GPUS,
    NETWORKS,
    SINGLE,
    STRATEGIES,
    Case,
    Load,
    Strategy,
    all_reduce_seconds,
    cases,
    efficiency,
    load_of,
    ring_seconds,
    step,
)
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.norm import BatchNorm
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone

# 90 GB of gradients in 3434 buckets, so large that every part of a formula can be seen.
LOAD = Load(
    flops=400 * 10**12,
    parameter_bytes=90 * 10**9,
    norm_layers=10,
    statistics_bytes=9 * 10**6,
    projection_bytes=45 * 10**6,
    units=20,
)


def test_collectives_within_a_node() -> None:
    # Two GPUs: a half of 9 GB at 450 GB/s, and the other half back.
    assert ring_seconds(2, 9e9) == pytest.approx(10e-6 + 1.9e-6 + 0.010)
    assert all_reduce_seconds(2, 9e9) == pytest.approx(10e-6 + 2 * 1.9e-6 + 0.020)
    assert ring_seconds(8, 9e9, messages=3) == pytest.approx(3 * (10e-6 + 7 * 1.9e-6) + 0.0175)
    assert ring_seconds(1, 9e9) == all_reduce_seconds(1, 9e9) == 0


def test_collectives_between_nodes() -> None:
    # Eight adapters of 50 GB/s. Round the ring of 32: 28 hops inside of nodes, 3 between them.
    assert ring_seconds(32, 4e9) == pytest.approx(10e-6 + 28 * 1.9e-6 + 3 * 4e-6 + 31 / 32 * 0.010)
    # The tree: 7 hops inside, log2(4) between, up and down.
    tree = 2 * (7 * 1.9e-6 + 2 * 4e-6)
    assert all_reduce_seconds(32, 4e9) == pytest.approx(10e-6 + tree + 2 * 31 / 32 * 0.010)


def test_two_gpus_under_each_strategy() -> None:
    # 400 TFLOP on two GPUs of 200 TFLOP/s.
    found = {strategy: step(LOAD, 2, strategy) for strategy in STRATEGIES}
    assert {one.computing for one in found.values()} == {1.0}
    # Ten layers, both ways, half of 2 x 9 MB each way at 450 GB/s.
    assert found["ddp"].batch_norm == pytest.approx(2 * (10 * 11.9e-6 + 20e-6))
    loss = 3 * 11.9e-6 + 3 * 50e-6 + 2 * 13.8e-6 + 2 * 100e-6
    assert found["ddp"].loss == pytest.approx(loss)
    # 90 GB need 0.2 s, hidden behind 2/3 s of the backward pass.
    assert found["ddp"].gradients == found["ddp"].parameters == 0
    assert found["zero1"].gradients == 0
    assert found["zero1"].parameters == pytest.approx(3434 * 11.9e-6 + 0.1)
    assert found["fsdp2"].gradients == found["fsdp2"].parameters == 0
    assert found["ddp"].binds == "computing"


def test_what_does_not_hide() -> None:
    # Eight GPUs: 1/4 s of computing, 1/6 of it backward.
    sent = 3434 * (10e-6 + 2 * 7 * 1.9e-6) + 2 * 7 / 8 * 0.2
    assert step(LOAD, 8, "ddp").gradients == pytest.approx(sent - 1 / 6)
    once = 20 * (10e-6 + 7 * 1.9e-6) + 7 / 8 * 0.2
    assert step(LOAD, 8, "fsdp2").parameters == pytest.approx(once - 1 / 12)
    assert step(LOAD, 8, "fsdp2").gradients == pytest.approx(2 * once - 1 / 6)


def test_a_group_of_batch_norm_costs_what_a_node_costs() -> None:
    inside = step(LOAD, GPUS_PER_NODE, "ddp").batch_norm
    assert step(LOAD, 512, "ddp", norm_group=GPUS_PER_NODE).batch_norm == inside
    assert step(LOAD, 512, "ddp").batch_norm > inside


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("group", [None, GPUS_PER_NODE])
@pytest.mark.parametrize("network", NETWORKS)
def test_more_gpus_never_make_more_efficiency(
    network: str, group: int | None, strategy: Strategy
) -> None:
    load = load_of(NETWORKS[network])
    found = [efficiency(load, gpus, strategy, norm_group=group) for gpus in MODEL_GPUS]
    assert found[0] == 1
    assert all(0 < more <= fewer for fewer, more in pairwise(found))


@pytest.mark.parametrize(
    "backbone",
    [*NETWORKS.values(), ResNetBackbone(depth=18), ResNetBackbone(depth=50, stem="cifar")],
)
def test_the_load_is_that_of_the_network(backbone: ResNetBackbone) -> None:
    load = load_of(backbone)
    network = Architecture(backbone, HeadSection(output_width=128), None, from_layer=0)
    with torch.device("meta"):
        model = build_model(network, seed=0)
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    assert load.norm_layers == len(norms)
    assert load.statistics_bytes == 4 * 2 * sum(norm.channels for norm in norms)
    assert load.parameter_bytes == 4 * sum(p.numel() for p in model.parameters())


def test_batches_of_weak_and_strong_scaling() -> None:
    found = cases([1, 2])
    assert len(found) == len(set(found)) == 1 + 2 * len(STRATEGIES)
    assert SINGLE.global_batch == Case("ddp", "strong", 2).global_batch == BATCH
    assert Case("ddp", "weak", 2).global_batch == 2 * BATCH

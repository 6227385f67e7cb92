"""Pretraining over several ranks ends with the weights of one process."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter, functional as F
from torch.optim import Optimizer

from bigsimclr.augment import ViewSettings
from bigsimclr.augment.draws import centre_draws
from bigsimclr.data.loader import Batch
from bigsimclr.engine.step import compute_gradients
from bigsimclr.losses import build_loss
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.simclr import parameter_kind
from bigsimclr.optim import SquaredNorms, build_optimizer
from bigsimclr.parallel import Strategy
from bigsimclr.parallel.ddp import DataParallel
from bigsimclr.parallel.fsdp2 import FullySharded
from bigsimclr.parallel.precision import Precision
from bigsimclr.parallel.single import Single
from bigsimclr.parallel.zero1 import ZeroOne
from bigsimclr.recipe.sections import HeadSection, Lars, NtXentLoss, QueueSection, ResNetBackbone
from bigsimclr.stages.pretrain import Contrast
from bigsimclr.world import ALONE, World
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.slow

STEPS, IMAGES, SIDE, WIDTH = 20, 24, 8, 16
BUCKETS = 100_000  # bytes: the little network has several
PEAK_RATE = 0.02
SIZES = [pytest.param(2, marks=pytest.mark.long), 3, pytest.param(4, marks=pytest.mark.long)]


def pixels(step: int) -> Tensor:
    """Both views of the global batch, [2, B, 3, H, W]: coarse patterns, a little changed."""
    generator = torch.Generator().manual_seed(100 + step)
    coarse = torch.rand(IMAGES, 3, 2, 2, generator=generator)
    images = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear")
    noise = torch.rand(2, *images.shape, generator=generator)
    return 0.9 * images + 0.1 * noise


def batch_of(step: int, world: World) -> Batch:
    """This rank's images."""
    own = np.arange(IMAGES, dtype=np.int64).reshape(world.size, -1)[world.rank]
    sizes = np.full((len(own), 2), SIDE, np.int32)
    return Batch(
        pixels=pixels(step)[:, own],
        draws=centre_draws(ViewSettings(image_size=SIDE), sizes),
        labels=torch.from_numpy(own % 5),
        indices=torch.from_numpy(own),
    )


def strategy_of(kind: str, world: World) -> Strategy:
    precision = Precision(world.device, "fp32")
    match kind:
        case "ddp":
            return DataParallel(world, precision, bucket_bytes=BUCKETS)
        case "zero1":
            return ZeroOne(world, precision, bucket_bytes=BUCKETS)
        case "fsdp2":
            return FullySharded(world, precision, reshard=True)
        case _:
            return Single(precision)


def trained(world: World, *, kind: str, double: bool) -> dict[str, list]:
    """Weights, running statistics, averaged copy and queue after some updates."""
    backbone = ResNetBackbone(depth=10, width=0.25, stem="cifar")
    head = HeadSection(layers=3, output_width=WIDTH)
    dtype = torch.float64 if double else torch.float32
    model = build_model(Architecture(backbone, head, 5, 0), seed=0, probe=True).to(dtype)
    objective = Contrast(
        model,
        build_loss(NtXentLoss(temperature=0.5, row_chunk=8), world),
        width=WIDTH,
        queue=QueueSection(length=50, ema_decay=0.9),
        world=world,
    )
    section = Lars(kind="lars", learning_rate=1.0, rate_scaling="none", weight_decay=1e-4)
    strategy = strategy_of(kind, world)
    strategy.prepare(
        model, partial(build_optimizer, section, kinds=parameter_kind(model), learning_rate=1.0)
    )
    for step in range(STEPS):
        strategy.set_learning_rate(PEAK_RATE * (step + 1) / STEPS)
        batch = batch_of(step, world)
        compute_gradients(
            objective,
            batch,
            how="direct",
            micro_batch=len(batch),
            make_views=partial(views_of, dtype),
            strategy=strategy,
        )
        strategy.update()
        objective.after_update([batch], partial(views_of, dtype), strategy.whole())
    found = {
        f"model.{name}": value.clone()
        for piece in strategy.whole()
        for name, value in piece.items()
    }
    for part, tensors in objective.state().items():
        found |= {f"{part}.{name}": value for name, value in tensors.items()}
    return {name: value.tolist() for name, value in found.items()}


def views_of(dtype: torch.dtype, batch: Batch) -> Tensor:
    return batch.pixels.flatten(0, 1).to(dtype)


def exact(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.fixture(scope="module", params=[True, False], ids=["float64", "float32"])
def double(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def whole(double: bool) -> dict[str, Tensor]:
    alone = trained(ALONE, kind="single", double=double)
    return {name: exact(value) for name, value in alone.items()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["ddp", "zero1", "fsdp2"])
def test_all_ranks_end_where_one_process_does(
    size: int, kind: str, double: bool, whole: dict[str, Tensor]
) -> None:
    parts = on_ranks(size, partial(trained, kind=kind, double=double))
    for other in parts[1:]:
        assert other == parts[0]  # every rank has the same bits
    assert parts[0].keys() == whole.keys()
    ours = {name: exact(value) for name, value in parts[0].items()}
    if double:
        for name, expected in whole.items():
            assert (ours[name] - expected).norm() <= 1e-10 * expected.norm(), name
    # In float32 a ReLU that flips moves small biases by more than rounding, on one rank too: the
    # weights are compared as a whole.
    for part in ("model.", "averaged."):
        weights = [name for name in whole if name.startswith(part)]
        moved = sum(float((ours[name] - whole[name]).square().sum()) for name in weights)
        length = sum(float(whole[name].square().sum()) for name in weights)
        assert moved <= (1e-10 if double else 1e-5) ** 2 * length, part


def plain_descent(
    parameters: Mapping[str, Parameter], *, squared_norms: SquaredNorms | None = None
) -> Optimizer:
    return torch.optim.SGD(parameters.values(), lr=1.0)


def gradients_of(world: World) -> dict[str, list]:
    """Start from other weights on every rank, accumulate two pieces, leave a parameter unused."""
    model = build_model(
        Architecture(ResNetBackbone(depth=10, width=1 / 16, stem="cifar"), None, 3, 0),
        seed=world.rank,
    ).double()
    strategy = strategy_of("ddp", world)
    strategy.prepare(model, plain_descent)
    model.eval()
    before = {name: value.clone() for name, value in model.named_parameters()}
    images = pixels(0)[0].double().chunk(world.size)[world.rank].chunk(2)
    for number, piece in enumerate(images):
        with strategy.synchronise(when=number == 1):
            # The classifier is left out: it gets no gradient on any rank.
            strategy.backward(model.backbone(piece).square().sum())
    strategy.update()
    moved = {name: before[name] - value for name, value in model.named_parameters()}
    return {name: value.tolist() for name, value in moved.items()}


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_are_averaged_once(size: int) -> None:
    parts = on_ranks(size, gradients_of)
    assert all(part == parts[0] for part in parts)
    (alone,) = on_ranks(1, gradients_of)
    assert not exact(parts[0]["classifier.weight"]).any()
    for name, expected in alone.items():
        # The sum over images, which the ranks share, divided by their number.
        difference = (exact(parts[0][name]) * size - exact(expected)).abs().max()
        assert difference <= 1e-9 * exact(expected).abs().max(), name

"""DeepSpeed's three stages update as one process does, and their state is whole again on request.

A rank imports DeepSpeed once, which takes most of the time here, and then runs everything.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from bigsimclr.augment import ViewSettings
from bigsimclr.augment.draws import centre_draws
from bigsimclr.data.loader import Batch
from bigsimclr.engine.step import compute_gradients
from bigsimclr.errors import NumericsError
from bigsimclr.losses import build_loss
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.memory import save_memory
from bigsimclr.models.simclr import SimCLR, parameter_kind
from bigsimclr.optim import SquaredNorms, build_optimizer
from bigsimclr.parallel import MakeOptimizer, Strategy
from bigsimclr.parallel.precision import Precision
from bigsimclr.parallel.single import Single
from bigsimclr.recipe.plan import Update as How
from bigsimclr.recipe.sections import (
    AdamW,
    HeadSection,
    Lars,
    NtXentLoss,
    OptimizerSection,
    QueueSection,
    ResNetBackbone,
    Sgd,
)
from bigsimclr.stages.evaluate import inference
from bigsimclr.stages.pretrain import Contrast
from bigsimclr.world import ALONE, World
from tests.distributed.ranks import on_ranks
from tests.distributed.test_training import IMAGES, SIDE, WIDTH, pixels

pytest.importorskip("deepspeed", reason="DeepSpeed comes with the extra `deepspeed`")
pytestmark = pytest.mark.slow

PEAK_RATE = 0.02
SECONDS = 600  # for all runs of one number of ranks
OPTIMIZERS: dict[str, OptimizerSection] = {
    "lars": Lars(kind="lars", learning_rate=1.0, rate_scaling="none", weight_decay=1e-4),
    "sgd": Sgd(kind="sgd", learning_rate=1.0, rate_scaling="none", weight_decay=1e-4),
    "adamw": AdamW(kind="adamw", learning_rate=1.0, rate_scaling="none", weight_decay=1e-4),
}


@dataclass(frozen=True)
class Run:
    """A short training."""

    optimizer: str = "lars"
    rate: float = PEAK_RATE
    how: How = "direct"
    steps: int = 3
    averaged: bool = False  # with an averaged copy and a queue
    probe_only: bool = False  # everything else is frozen
    memory: bool = False  # block outputs are computed again
    looks: bool = False  # evaluates between updates
    offload: bool = False


LONG = Run(steps=20, averaged=True)
RUNS = {
    "lars": LONG,
    "sgd": Run(optimizer="sgd"),
    "adamw": Run(optimizer="adamw", rate=1e-4),
    "cached": Run(how="cached"),
    "frozen": Run(probe_only=True),
    "recomputed": Run(memory=True),
    "evaluated": Run(looks=True),
    "offloaded": Run(offload=True),
    "offloaded and cached": Run(how="cached", offload=True),
}


@dataclass(frozen=True)
class Outcome:
    """What a training ends with."""

    tensors: dict[str, Tensor]  # of the model and, where there is one, its averaged copy
    norms: list[float]


def small(seed: int) -> SimCLR:
    backbone = ResNetBackbone(depth=10, width=0.25, stem="cifar")
    head = HeadSection(layers=3, output_width=WIDTH)
    return build_model(Architecture(backbone, head, 5, 0), seed=seed, probe=True)


def maker(model: SimCLR, section: OptimizerSection) -> MakeOptimizer:
    kinds = parameter_kind(model)

    def make(
        parameters: dict[str, torch.nn.Parameter], *, squared_norms: SquaredNorms | None = None
    ) -> Optimizer:
        return build_optimizer(
            section, parameters, kinds=kinds, learning_rate=1.0, squared_norms=squared_norms
        )

    return make


def strategy_of(world: World, stage: int, *, offload: bool = False) -> Strategy:
    precision = Precision(world.device, "fp32")
    if stage == 0:
        return Single(precision)
    from bigsimclr.parallel.deepspeed import DeepSpeedZero

    return DeepSpeedZero(world, precision, stage=stage, offload=offload)


def batch_of(step: int, world: World, *, pieces: int) -> Batch:
    """This rank's images: all ranks' n-th micro-batches together are that of one process."""
    own = np.arange(IMAGES, dtype=np.int64).reshape(pieces, world.size, -1)[:, world.rank].ravel()
    return Batch(
        pixels=pixels(step)[:, own],
        draws=centre_draws(ViewSettings(image_size=SIDE), np.full((len(own), 2), SIDE, np.int32)),
        labels=torch.from_numpy(own % 5),
        indices=torch.from_numpy(own),
    )


def views_of(batch: Batch) -> Tensor:
    return batch.pixels.flatten(0, 1)


class Training:
    """One model, its objective and its strategy."""

    def __init__(self, world: World, run: Run, stage: int, *, seed: int = 0) -> None:
        self.world, self.run = world, run
        self.model = small(seed)
        if run.memory:
            save_memory(self.model, "block")
        if run.probe_only:
            self.model.requires_grad_(requires_grad=False)
            self.model.classifier.requires_grad_(requires_grad=True)
        self.objective = Contrast(
            self.model,
            build_loss(NtXentLoss(temperature=0.5, row_chunk=8), world),
            width=WIDTH,
            queue=QueueSection(length=50, ema_decay=0.9) if run.averaged else None,
            world=world,
        )
        self.strategy = strategy_of(world, stage, offload=run.offload)
        self.strategy.prepare(self.model, maker(self.model, OPTIMIZERS[run.optimizer]))

    def update(self, step: int) -> float:
        pieces = 2 if self.run.how == "cached" else 1
        self.strategy.set_learning_rate(self.run.rate * (step + 1) / self.run.steps)
        batch = batch_of(step, self.world, pieces=pieces)
        compute_gradients(
            self.objective,
            batch,
            how=self.run.how,
            micro_batch=len(batch) // pieces,
            make_views=views_of,
            strategy=self.strategy,
        )
        norm = float(self.strategy.update().gradient_norm)
        self.objective.after_update([batch], views_of, self.strategy.whole())
        if self.run.looks:
            self.features(step)
        return norm

    def features(self, step: int) -> Tensor:
        with inference(self.model):
            return self.model(views_of(batch_of(step, self.world, pieces=1))).features.clone()

    def whole(self) -> dict[str, Tensor]:
        return {
            name: tensor.detach().clone()
            for piece in self.strategy.whole()
            for name, tensor in piece.items()
        }

    def optimizer(self) -> dict[str, Tensor]:
        part = self.strategy.optimizer_part(lambda *_: True)
        return {name: tensor.clone() for name, tensor in part.items()}

    def go(self) -> Outcome:
        norms = [self.update(step) for step in range(self.run.steps)]
        tensors = {f"model.{name}": tensor for name, tensor in self.whole().items()}
        for name, tensor in self.objective.state().get("averaged", {}).items():
            tensors[f"averaged.{name}"] = tensor.clone()
        return Outcome(tensors, norms)


@dataclass(frozen=True)
class Loaded:
    """A state that was saved in one stage and loaded in another."""

    saved: dict[str, Tensor]
    loaded: dict[str, Tensor]
    features: tuple[Tensor, Tensor]  # of both models afterwards
    after: tuple[dict[str, Tensor], dict[str, Tensor]]  # both, one update later


def loaded(world: World, stage: int, other: int) -> Loaded:
    first = Training(world, Run(), stage)
    for step in range(2):
        first.update(step)
    second = Training(world, Run(), other, seed=1)
    second.update(0)
    weights, state = first.whole(), first.optimizer()
    second.strategy.load(weights, state)
    found = Loaded(
        saved=weights | state,
        loaded=second.whole() | second.optimizer(),
        features=(first.features(5), second.features(5)),
        after=({}, {}),
    )
    for training, after in zip((first, second), found.after, strict=True):
        training.update(2)
        after.update(training.whole())
    return found


@dataclass(frozen=True)
class Refused:
    """An update whose gradient is not finite, on one rank."""

    raised: bool
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def refused(world: World, stage: int, *, offload: bool) -> Refused:
    training = Training(world, Run(offload=offload), stage)
    training.update(0)
    before = training.whole()
    rows = training.model(views_of(batch_of(1, world, pieces=1))).projections[-1]
    factor = float("nan") if world.rank == world.size - 1 else 1.0
    with training.strategy.synchronise(when=True):
        training.strategy.backward((rows * factor).square().sum())
    try:
        training.strategy.update()
    except NumericsError:
        return Refused(True, before, training.whole())
    return Refused(False, before, training.whole())


def unused(world: World, stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Update once with the whole loss and once with a loss that leaves the head out."""
    training = Training(world, Run(), stage)
    training.update(0)
    before = training.whole()
    features = training.model(views_of(batch_of(1, world, pieces=1))).features
    with training.strategy.synchronise(when=True):
        training.strategy.backward(features.square().sum())
    training.strategy.update()
    return before, training.whole()


@dataclass(frozen=True)
class Everything:
    """All that one rank found."""

    outcomes: dict[tuple[str, int], Outcome]
    loaded: dict[tuple[int, int], Loaded]
    refused: dict[tuple[int, bool], Refused]
    unused: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]]


def everything(world: World) -> Everything:
    found = Everything({}, {}, {}, {})
    for stage in (1, 2, 3):
        for name, run in RUNS.items():
            found.outcomes[name, stage] = Training(world, run, stage).go()
        for offload in (False, True):
            found.refused[stage, offload] = refused(world, stage, offload=offload)
        found.unused[stage] = unused(world, stage)
    for stage, other in ((1, 3), (3, 2), (2, 1)):
        found.loaded[stage, other] = loaded(world, stage, other)
    return found


@pytest.fixture(
    scope="module", params=[2, *(pytest.param(n, marks=pytest.mark.long) for n in (3, 4))]
)
def ranks(request: pytest.FixtureRequest) -> list[Everything]:
    return on_ranks(request.param, everything, seconds=SECONDS)


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    return {name: Training(ALONE, run, stage=0).go() for name, run in RUNS.items()}


def distance(ours: dict[str, Tensor], expected: dict[str, Tensor], part: str) -> float:
    """Of all weights together, relative to their length."""
    names = [name for name in expected if name.startswith(part)]
    moved = sum(float((ours[n] - expected[n]).double().square().sum()) for n in names)
    length = sum(float(expected[n].double().square().sum()) for n in names)
    return (moved / length) ** 0.5


def same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return ours.keys() == expected.keys() and all(
        torch.equal(ours[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_ranks_end_where_one_process_does(
    ranks: list[Everything], alone: dict[str, Outcome], name: str, stage: int
) -> None:
    outcomes = [found.outcomes[name, stage] for found in ranks]
    for other in outcomes[1:]:
        assert same(other.tensors, outcomes[0].tensors)  # every rank has the same bits
        assert other.norms == outcomes[0].norms
    ours, expected = outcomes[0], alone[name]
    assert ours.tensors.keys() == expected.tensors.keys()
    for part in ("model.", "averaged.") if RUNS[name].averaged else ("model.",):
        # SGD moves the weights furthest, and rounding with them.
        most = 1e-5 if RUNS[name].optimizer == "sgd" else 1e-6
        assert distance(ours.tensors, expected.tensors, part) <= most, part
    assert ours.norms == pytest.approx(expected.norms, rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_evaluation_and_offload_change_no_bit(ranks: list[Everything], stage: int) -> None:
    outcomes = ranks[0].outcomes
    assert same(outcomes["offloaded and cached", stage].tensors, outcomes["cached", stage].tensors)
    assert same(outcomes["offloaded", stage].tensors, outcomes["evaluated", stage].tensors)
    assert same(outcomes["recomputed", stage].tensors, outcomes["evaluated", stage].tensors)


@pytest.mark.parametrize("stages", [(1, 3), (3, 2), (2, 1)])
def test_a_state_moves_between_stages_bit_by_bit(
    ranks: list[Everything], stages: tuple[int, int]
) -> None:
    for found in ranks:
        moved = found.loaded[stages]
        assert same(moved.loaded, moved.saved)
        assert torch.equal(*moved.features)
        assert distance(*moved.after, "") <= 1e-6


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_is_not_finite_moves_nothing(
    ranks: list[Everything], stage: int, offload: bool
) -> None:
    for found in ranks:
        update = found.refused[stage, offload]
        assert update.raised
        parameters = dict(small(0).named_parameters())
        for name in parameters:
            assert torch.equal(update.after[name], update.before[name]), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_no_loss_depends_on_does_not_move(ranks: list[Everything], stage: int) -> None:
    for found in ranks:
        before, after = found.unused[stage]
        for name, _ in small(0).named_parameters():
            stays = name.startswith(("head.", "classifier."))
            assert torch.equal(after[name], before[name]) == stays, name

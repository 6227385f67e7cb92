"""A run stops on some ranks under one strategy, and goes on elsewhere as if it had not."""

import itertools
import shutil
import signal
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bigsimclr.engine.checkpoint import Checkpoint, newest_checkpoint
from bigsimclr.engine.stop import StopRequest
from bigsimclr.errors import Stopped
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.simclr import parameter_kind
from bigsimclr.optim import build_optimizer
from bigsimclr.parallel import build_strategy
from bigsimclr.recipe.schema import PretrainRecipe
from bigsimclr.report.progress import Progress
from bigsimclr.stages.single import run_stage
from bigsimclr.world import ALONE, World
from tests.distributed.ranks import on_ranks
from tests.stages import tiny

pytestmark = pytest.mark.slow

OURS = ("ddp", "zero1", "fsdp2")
ALL = (*OURS, "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
STRATEGIES = [
    pytest.param(OURS, id="ours"),
    pytest.param(
        ALL,
        id="all",
        marks=[
            pytest.mark.long,
            pytest.mark.skipif(
                find_spec("deepspeed") is None, reason="the extra `deepspeed` is missing"
            ),
        ],
    ),
]

STEPS, IMAGES = 20, 96
RECIPE = f"""
stage: pretrain
data: {{kind: arrays, root: ROOT}}
augment: {{image_size: 8, colour_probability: 0.0, grey_probability: 0.0, blur_probability: 0.0}}
backbone: {{depth: 10, width: 0.125, stem: cifar}}
head: {{output_width: 16}}
loss: {{temperature: 0.5, queue: {{length: 64, ema_decay: 0.9}}}}
optimizer: {{kind: lars, learning_rate: 0.001, rate_scaling: none}}
schedule: {{steps: {STEPS}, warmup_epochs: 4}}
batch: {{global_batch: 24}}
log: {{every_steps: 1}}
parallel: {{device: cpu, cpu_threads: 1}}
"""


class StopAt(Progress):
    """Asks the run to stop once a step has been recorded; the first rank alone hears it."""

    def __init__(self, step: int, stop: StopRequest) -> None:
        super().__init__(None, enabled=False)
        self._step, self._stop = step, stop

    def update(self, step: int, values: Mapping[str, float]) -> None:  # noqa: ARG002
        if step == self._step:
            self._stop._note(signal.SIGTERM, None)


def write_images(path: Path) -> None:
    """Write coarse patterns; even areas, as digits have, would put many ReLUs on the edge."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(IMAGES, 3, 3, 3, generator=generator)
    images = F.interpolate(coarse, (12, 12), mode="bilinear").permute(0, 2, 3, 1)
    noisy = 200 * images + 55 * torch.rand(images.shape, generator=generator)
    np.savez(path, images=noisy.byte().numpy(), labels=np.arange(IMAGES) % 10)


def recipe_of(folder: Path, strategy: str) -> PretrainRecipe:
    text = RECIPE.replace("ROOT", str(folder / "images.npz"))
    recipe = tiny.recipe_of(text, f"parallel.strategy={strategy}")
    assert isinstance(recipe, PretrainRecipe)
    return recipe


def run(world: World, folder: Path, name: str, strategy: str, until: int = STEPS) -> None:
    """Run a part of the training on ranks that exist."""
    stop = StopRequest()
    progress = StopAt(until if until < STEPS else -1, stop)
    try:
        run_stage(
            recipe_of(folder, strategy), folder / name, world=world, progress=progress, stop=stop
        )
        assert until == STEPS
    except Stopped:
        assert until < STEPS


def newest(directory: Path) -> Checkpoint:
    found = newest_checkpoint(directory / "checkpoints")
    assert found is not None
    return found


def assert_loaded_exactly(world: World, folder: Path, strategy: str, saved: Checkpoint) -> None:
    """A model and optimizer of other values take those of a checkpoint, to the bit."""
    recipe = recipe_of(folder, strategy)
    model = build_model(
        Architecture(recipe.backbone, recipe.head, 10, 0), seed=recipe.seed + 1, probe=True
    )
    loaded = build_strategy(recipe.parallel, world)
    loaded.prepare(
        model,
        partial(build_optimizer, recipe.optimizer, kinds=parameter_kind(model), learning_rate=1.0),
    )
    loaded.load(saved.tensors["model"], saved.tensors["optimizer"])
    weights = {name: t.clone() for piece in loaded.whole() for name, t in piece.items()}
    assert weights.keys() == saved.tensors["model"].keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, saved.tensors["model"][name]), name
    for name, tensor in loaded.optimizer_part(lambda *_: True).items():
        assert torch.equal(tensor, saved.tensors["optimizer"][name]), name


def run_all_pairs(world: World, folder: Path, strategies: Sequence[str]) -> list[str]:
    """Stop under each strategy, and go on under each."""
    for source in strategies:
        run(world, folder, source, source, STEPS // 2)
    for source, target in itertools.product(strategies, strategies):
        pair = f"{source}-{target}"
        if world.rank == 0:
            shutil.copytree(folder / source, folder / pair)
        world.numbers(0)
        assert_loaded_exactly(world, folder, target, newest(folder / pair))
        run(world, folder, pair, target)
    return sorted(path.name for path in folder.iterdir() if "-" in path.name)


def run_straight_and_stopped(world: World, folder: Path, strategies: Sequence[str]) -> None:
    for strategy in strategies:
        run(world, folder, f"straight/{strategy}", strategy)
        run(world, folder, f"stopped/{strategy}", strategy, STEPS // 2)
        run(world, folder, f"stopped/{strategy}", strategy)


def assert_close(
    found: Checkpoint,
    expected: Checkpoint,
    tolerance: float,
    sections: Sequence[str] = ("model", "averaged"),
) -> None:
    assert found.examples == expected.examples
    for section in sections:
        ours, theirs = found.tensors[section], expected.tensors[section]
        assert ours.keys() == theirs.keys()
        moved = torch.stack([(ours[n].double() - theirs[n].double()).norm() for n in theirs])
        length = torch.stack([theirs[n].double().norm() for n in theirs]).norm()
        assert moved.norm() <= tolerance * length, section


def flat(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {f"{s}/{n}": t for s, named in checkpoint.tensors.items() for n, t in named.items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("alone")
    write_images(folder / "images.npz")
    run(ALONE, folder, "run", "ddp")
    return newest(folder / "run")


@pytest.mark.parametrize("strategies", STRATEGIES)
def test_every_strategy_continues_every_other(
    strategies: Sequence[str], tmp_path: Path, uninterrupted: Checkpoint
) -> None:
    write_images(tmp_path / "images.npz")
    pairs, _ = on_ranks(
        2, partial(run_all_pairs, folder=tmp_path, strategies=strategies), seconds=900
    )
    assert len(pairs) == len(strategies) ** 2
    for pair in pairs:
        assert_close(newest(tmp_path / pair), uninterrupted, 1e-5)


@pytest.mark.parametrize("strategies", STRATEGIES)
@pytest.mark.parametrize(
    "size",
    [pytest.param(2, marks=pytest.mark.long), 3, pytest.param(4, marks=pytest.mark.long)],
)
def test_the_same_ranks_continue_to_the_bit(
    size: int, strategies: Sequence[str], tmp_path: Path
) -> None:
    write_images(tmp_path / "images.npz")
    on_ranks(
        size, partial(run_straight_and_stopped, folder=tmp_path, strategies=strategies), seconds=900
    )
    for strategy in strategies:
        stopped = flat(newest(tmp_path / "stopped" / strategy))
        for name, tensor in flat(newest(tmp_path / "straight" / strategy)).items():
            assert torch.equal(stopped[name], tensor), (strategy, name)


def test_four_two_three_and_one_ranks(tmp_path: Path, uninterrupted: Checkpoint) -> None:
    write_images(tmp_path / "images.npz")
    quarter = STEPS // 4
    parts = [(4, "ddp"), (2, "fsdp2"), (3, "zero1"), (1, "ddp")]
    for number, (size, strategy) in enumerate(parts, start=1):
        step = partial(run, folder=tmp_path, name="run", strategy=strategy, until=number * quarter)
        on_ranks(size, step)
    assert_close(newest(tmp_path / "run"), uninterrupted, 1e-5)

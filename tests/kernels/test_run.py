"""Whole stages with the fused kernels end where they end in plain PyTorch."""

import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch

from bigsimclr.engine.checkpoint import Checkpoint
from bigsimclr.engine.stop import StopRequest
from bigsimclr.report.progress import Progress
from bigsimclr.stages.single import run_stage
from bigsimclr.world import ALONE, World
from tests.distributed.ranks import on_ranks
from tests.distributed.test_resume import RECIPE, assert_close, newest, write_images
from tests.stages import tiny

pytestmark = pytest.mark.slow

SMALL = (
    "batch.global_batch=8",
    "schedule.steps=3",
    "optimizer.learning_rate=0.01",
    "log.every_steps=1",
)


def losses_of(
    text: str, directory: Path, kernels: str, *overrides: str, caplog: pytest.LogCaptureFixture
) -> list[float]:
    with caplog.at_level(logging.INFO):
        tiny.run(text, directory, f"parallel.kernels={kernels}", *SMALL, *overrides)
    said = {"plain": "kernels: plain PyTorch", "triton": "kernels: fused, in Triton"}[kernels]
    assert said in caplog.messages
    caplog.clear()
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    values = [json.loads(line)["values"] for line in lines]
    return [v["train/loss"] for v in values if "train/loss" in v]


def assert_rounded_otherwise(found: Checkpoint, expected: Checkpoint) -> None:
    """Losses and many tensors may round alike; not all do where other code has run."""
    pairs = {n: (t, expected.tensors["model"][n]) for n, t in found.tensors["model"].items()}
    alike = [name for name, (one, other) in pairs.items() if torch.equal(one, other)]
    assert len(alike) < len(pairs) / 2, alike


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on a CPU")
@pytest.mark.parametrize(
    "overrides",
    [
        ("backbone.selective_kernel=true",),
        ("loss={temperature: 0.5, queue: {length: 16, ema_decay: 0.9}}", "parallel.memory=block"),
    ],
)
def test_pretraining(
    overrides: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    probe = "probe={knn_every_epochs: null}"
    plain, fused = (
        losses_of(tiny.PRETRAIN, tmp_path / name, name, probe, *overrides, caplog=caplog)
        for name in ("plain", "triton")
    )
    assert fused == pytest.approx(plain, rel=1e-4)
    assert fused != plain


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on a CPU")
def test_supervised_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, fused = (
        losses_of(tiny.SUPERVISED, tmp_path / name, name, caplog=caplog)
        for name in ("plain", "triton")
    )
    assert fused == pytest.approx(plain, rel=1e-4)
    ends = [newest(tmp_path / name) for name in ("plain", "triton")]
    assert_close(ends[1], ends[0], 1e-5, ("model",))
    assert_rounded_otherwise(ends[1], ends[0])


def train_on(world: World, folder: Path, name: str, *overrides: str) -> None:
    text = RECIPE.replace("ROOT", str(folder / "images.npz"))
    recipe = tiny.recipe_of(text, "schedule={steps: 4, warmup_epochs: 0.25}", *overrides)
    progress = Progress(None, enabled=False)
    run_stage(recipe, folder / name, world=world, progress=progress, stop=StopRequest())


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on ranks of a CPU")
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("ddp", marks=pytest.mark.long),
        pytest.param("zero1", marks=pytest.mark.long),
        "fsdp2",
    ],
)
def test_ranks(strategy: str, tmp_path: Path) -> None:
    write_images(tmp_path / "images.npz")
    train_on(ALONE, tmp_path, "plain")
    overrides = ("parallel.kernels=triton", f"parallel.strategy={strategy}")
    on_ranks(2, partial(share_training, folder=tmp_path, overrides=overrides))
    plain, fused = newest(tmp_path / "plain"), newest(tmp_path / "fused")
    assert_close(fused, plain, 1e-5)
    assert_rounded_otherwise(fused, plain)


def share_training(world: World, folder: Path, overrides: tuple[str, ...]) -> None:
    train_on(world, folder, "fused", *overrides)

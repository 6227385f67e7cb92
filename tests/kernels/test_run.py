"""Whole stages with the fused kernels end where they end in plain PyTorch."""

import json
import logging
from pathlib import Path

import pytest
import torch

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
    assert fused != plain

"""`bigsimclr run --ranks N`: one command, several processes, one result."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bigsimclr.cli import app
from bigsimclr.engine.checkpoint import published, read_checkpoint

RECIPE = """\
stage: pretrain
data: {kind: digits}
augment: {image_size: 8, colour_strength: 0.5, blur_probability: 0.0}
backbone: {depth: 10, width: 0.0625, stem: cifar}
head: {layers: 2, output_width: 16}
loss: {kind: nt_xent, temperature: 0.5}
optimizer: {kind: lars, learning_rate: 0.1}
schedule: {steps: 4, warmup_epochs: 0.0}
batch: {global_batch: 24}
parallel: {device: cpu, cpu_threads: 1}
"""


def _recipe(folder: Path, text: str) -> str:
    file = folder / "mine.yaml"
    file.write_text(text)
    return str(file)


def test_a_mistake_in_the_recipe_starts_nothing(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, RECIPE.replace("steps: 4", "stepps: 4"))
    words = ["run", recipe, "--ranks", "2", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert result.stderr.count("stepps") == 1  # no rank repeats it
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_make_one_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["run", _recipe(tmp_path, RECIPE), "schedule.steps=3", "--ranks", "2"]
    command = [sys.executable, "-m", "bigsimclr", *words, "--out", str(run)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("pretrain: 3 steps") == 1  # the first rank alone speaks
    recorded = json.loads((run / "environment.json").read_text())["command"]
    assert recorded == f"bigsimclr run {words[1]} schedule.steps=3 --ranks 2"
    assert read_checkpoint(published(run / "checkpoints")[0]).examples == 3 * 24


@pytest.mark.slow
def test_torchrun_starts_ranks_as_well(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["-m", "bigsimclr", "run", _recipe(tmp_path, RECIPE), "--out", str(run)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ended = subprocess.run(
        [*launcher, "--nproc-per-node", "2", *words], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("pretrain: 4 steps") == 1
    assert read_checkpoint(published(run / "checkpoints")[0]).examples == 4 * 24

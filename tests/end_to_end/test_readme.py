"""The lines of README and docs/python.md, run as they stand, on a small folder of photographs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from bigsimclr.models import Architecture
from bigsimclr.recipe.sections import ResNetBackbone
from tests.interop.networks import portable
from tests.interop.official import tf1_variables
from tests.interop.write_bundle import write_bundle

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["schedule.epochs=null", "schedule.steps=2", "schedule.warmup_epochs=0"]


def _blocks(language: str, page: str = "README.md") -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Make `labelled/CLASS/*.jpg`, and the same files without classes in `photos/`."""
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number, photograph in enumerate(load_sample_images().images):
        folder = tmp_path / "labelled" / f"class{number}"
        folder.mkdir(parents=True)
        for index in range(35):
            height, width = random.integers(40, 90, 2)
            top = random.integers(photograph.shape[0] - height)
            left = random.integers(photograph.shape[1] - width)
            image = Image.fromarray(photograph[top : top + height, left : left + width])
            image.save(folder / f"{index}.jpg")
            image.save(tmp_path / "photos" / f"{number}_{index}.jpg")
    return tmp_path


def _run(words: list[str], folder: Path) -> str:
    ended = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def _commands(command: str) -> list[list[str]]:
    """Return the words of all lines of the first block of commands that has this one."""
    lines = next(block for block in _blocks("bash") if f"bigsimclr {command}" in block)
    joined = lines.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in joined if line.startswith("bigsimclr")]


@pytest.mark.slow
def test_lines_for_own_images(home: Path) -> None:
    pretraining, (*finetuning, prediction) = _commands("run digits/1"), _commands("run digits/5")
    for words in (*pretraining, *finetuning):
        _run(["-m", "bigsimclr", *words, *SHORT], home)
    _run(["-m", "bigsimclr", *prediction], home)
    assert (home / "runs" / "photos-finetuned" / "report.html").exists()
    classes = (home / "classes.csv").read_text(encoding="utf-8").splitlines()
    assert classes[0] == "name,class,probability"
    assert len(classes) == 1 + 70


@pytest.mark.slow
def test_lines_for_official_checkpoints(home: Path) -> None:
    network = portable(Architecture(ResNetBackbone(depth=50), None, 10, 0))
    (home / "r50_1x_sk0").mkdir()
    write_bundle(home / "r50_1x_sk0" / "model.ckpt-250228", tf1_variables(network.model))
    commands = _commands("import-tf")
    assert [words[0] for words in commands] == ["import-tf", "predict", "export"]
    imported, _, exported = [_run(["-m", "bigsimclr", *words], home) for words in commands]
    assert "each bit as in the checkpoint" in imported
    assert "model.maxpool = torch.nn.MaxPool2d(3, 2, ceil_mode=True)" in exported
    assert (home / "r50-torchvision.safetensors").exists()
    assert len((home / "classes.csv").read_text(encoding="utf-8").splitlines()) == 1 + 70


@pytest.mark.slow
def test_recipe_for_big_batches(home: Path) -> None:
    (recipe,) = _blocks("yaml")
    (home / "mine.yaml").write_text(recipe, encoding="utf-8")
    smaller = ["batch.global_batch=64", "batch.micro_batch=16", "augment.image_size=32"]
    text = _run(["-m", "bigsimclr", "check", "mine.yaml", *smaller], home)
    assert "update cached" in text
    assert "126 for every view" in text


@pytest.mark.slow
def test_python(tmp_path: Path) -> None:
    (program,) = _blocks("python")
    text = _run(["-c", f"{program}\nprint(features.dtype, list(features.shape))"], tmp_path)
    assert text.splitlines()[-1] == "torch.float32 [8, 192]"


@pytest.mark.slow
def test_a_loop_of_your_own(tmp_path: Path) -> None:
    (program,) = _blocks("python", "docs/python.md")
    text = _run(["-c", f"{program}\nprint(loss.item(), first.std(0).mean().item())"], tmp_path)
    loss, spread = map(float, text.split())
    assert 0 < loss < 20  # of 63 equal candidates 8.3; projections of noise are far from equal
    assert spread > 0

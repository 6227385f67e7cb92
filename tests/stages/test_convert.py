"""Networks leave and enter as files: a model file stands wherever a run does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bigsimclr.errors import CheckpointError, DataError, RecipeError, StorageError
from bigsimclr.stages.convert import export
from bigsimclr.stages.embed import predict_to_file
from bigsimclr.stages.load import load_model, load_network
from tests.stages import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining run, a supervised one, and both as files."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.run(tiny.PRETRAIN, folder / "pretrain")
    tiny.run(tiny.SUPERVISED, folder / "supervised")
    for name in ("pretrain", "supervised"):
        export(folder / name, folder / f"{name}.safetensors", to="safetensors")
    return folder


def test_a_file_holds_the_run_s_network(runs: Path) -> None:
    run, file = load_network(runs / "supervised"), load_network(runs / "supervised.safetensors")
    assert file.architecture == run.architecture
    assert file.classes == run.classes == tuple("0123456789")
    assert file.portable.preprocessing == run.portable.preprocessing
    assert file.portable.origin == "supervised run, 192 examples seen"
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = run.model(images), load_model(str(file.path))(images)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.features, theirs.features)


@pytest.mark.parametrize("stage", ["KNN", "LINEAR", "FINETUNE"])
def test_a_file_is_as_good_a_parent_as_its_run(runs: Path, tmp_path: Path, stage: str) -> None:
    text = getattr(tiny, stage)
    run = tiny.run(text, tmp_path / "run", f"parent={runs / 'pretrain'}")
    file = tiny.run(text, tmp_path / "file", f"parent={runs / 'pretrain.safetensors'}")
    assert file.metrics == run.metrics


def test_a_teacher_may_be_a_file(runs: Path, tmp_path: Path) -> None:
    run = tiny.run(tiny.DISTILL, tmp_path / "run", f"parent={runs / 'supervised'}")
    file = tiny.run(tiny.DISTILL, tmp_path / "file", f"parent={runs / 'supervised.safetensors'}")
    assert file.metrics == run.metrics
    protocol = json.loads((tmp_path / "file/result.json").read_text())["protocol"]
    assert protocol["encoder"] == "distilled"


def test_a_parent_file_that_changed_is_noticed(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "parent.safetensors"
    file.write_bytes((runs / "pretrain.safetensors").read_bytes())
    tiny.run(tiny.KNN, tmp_path / "knn", f"parent={file}")
    tiny.run(tiny.KNN, tmp_path / "knn", f"parent={file}")
    file.write_bytes((runs / "supervised.safetensors").read_bytes())
    with pytest.raises(DataError, match="changed since the run began: parent"):
        tiny.run(tiny.KNN, tmp_path / "knn", f"parent={file}")


def test_predictions_from_a_file(runs: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(images / "a.png")
    for name in ("supervised", "supervised.safetensors"):
        predict_to_file(runs / name, images, tmp_path / f"{name}.csv")
    text = (tmp_path / "supervised.safetensors.csv").read_text()
    assert text == (tmp_path / "supervised.csv").read_text()
    assert text.splitlines()[1].startswith("a.png,")


def test_refusals(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--to safetensors writes weights alone"):
        export(runs / "pretrain", tmp_path / "x.safetensors", to="safetensors", preprocess=True)
    with pytest.raises(StorageError, match="exists already"):
        export(runs / "pretrain", runs / "pretrain.safetensors", to="safetensors")
    with pytest.raises(CheckpointError, match="holds no checkpoint, and is no model file"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"none does not exist; name a run directory or a mo"):
        load_model(tmp_path / "none")

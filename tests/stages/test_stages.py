"""Every stage end to end on scanned digits, and what it must and must not change."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bigsimclr.engine.checkpoint import newest_checkpoint
from bigsimclr.errors import CheckpointError, DataError, RecipeError, StorageError
from bigsimclr.recipe.plan import make_plan
from bigsimclr.recipe.schema import PretrainRecipe
from bigsimclr.stages.embed import embed, embed_to_file, predict_to_file
from bigsimclr.stages.load import load_network
from bigsimclr.stages.training import _explained_memory
from tests.stages import tiny


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "pretrain"
    tiny.run(tiny.PRETRAIN, directory)
    return directory


def result_of(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_network(directory).model.state_dict()


def test_pretraining_writes_the_whole_run_directory(parent: Path) -> None:
    names = {path.name for path in parent.iterdir()}
    assert {"recipe.yaml", "plan.json", "environment.json", "metrics.jsonl"} <= names
    result = result_of(parent)
    assert result["stage"] == "pretrain"
    assert result["examples"] == 6 * 32
    assert result["checkpoint"] == "checkpoints/000000000192"
    assert result["parent"] is None
    assert result["data"]["train"] == 1437
    assert result["protocol"]["n"] == 360
    assert 0.2 < result["metrics"]["knn_accuracy"] <= 1.0
    assert set(result["metrics"]) == {"knn_accuracy", "probe_accuracy", "loss"}


def test_two_checkpoints_are_kept(parent: Path) -> None:
    found = sorted(path.name for path in (parent / "checkpoints").iterdir())
    assert found == ["000000000128", "000000000192"]


def test_records_hold_the_loss_beside_chance(parent: Path) -> None:
    lines = [json.loads(line) for line in (parent / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "train/loss" in line["values"]]
    assert [line["step"] for line in training] == [2, 4, 6]
    assert [line["examples"] for line in training] == [64, 128, 192]
    for line in training:
        assert line["values"]["train/chance_loss"] == pytest.approx(2 * 4.1431347)
        assert line["values"]["train/loss"] > 0


def test_finetuning_keeps_the_first_head_layer_and_moves_everything(
    tmp_path: Path, parent: Path
) -> None:
    tiny.run(tiny.FINETUNE, tmp_path / "a", f"parent={parent}")
    before, after = weights(parent), weights(tmp_path / "a")
    assert "head.layers.0.dense.weight" in after or any("head" in name for name in after)
    kept = {name for name in after if name.startswith("head.")}
    assert kept < {name for name in before if name.startswith("head.")}
    # With a classifier that starts at zero the first update moves nothing but the classifier.
    for name, tensor in after.items():
        if not name.startswith("classifier.") and "num_batches" not in name:
            assert not torch.equal(before[name], tensor), name
    labels = (tmp_path / "a" / "labels.txt").read_text().splitlines()
    assert len(labels) == 20
    result = result_of(tmp_path / "a")
    assert result["data"]["labels"] == 20
    assert len(result["data"]["labels_hash"]) == 64
    assert result["protocol"]["labels_per_class"] == 2
    assert result["protocol"]["head_layer"] == 1
    assert (tmp_path / "a" / result["parent"]).resolve() == parent.resolve()


def test_linear_evaluation_moves_only_the_classifier(tmp_path: Path, parent: Path) -> None:
    tiny.run(tiny.LINEAR, tmp_path / "a", f"parent={parent}")
    before, after = weights(parent), weights(tmp_path / "a")
    assert not any(name.startswith("head.") for name in after)
    for name, tensor in after.items():
        if name.startswith("classifier."):
            assert tensor.abs().sum() > 0
        else:
            assert torch.equal(before[name], tensor), name


def test_knn_evaluates_without_training(tmp_path: Path, parent: Path) -> None:
    tiny.run(tiny.KNN, tmp_path / "a", f"parent={parent}")
    result = result_of(tmp_path / "a")
    assert result["metrics"]["accuracy"] == result_of(parent)["metrics"]["knn_accuracy"]
    assert result["checkpoint"] is None


def test_supervised_and_distillation(tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    tiny.run(tiny.SUPERVISED, teacher)
    before = weights(teacher)
    tiny.run(tiny.DISTILL, student, f"parent={teacher}")
    for name, tensor in weights(teacher).items():
        assert torch.equal(before[name], tensor), name
    loaded = load_network(student)
    assert loaded.architecture.backbone == load_network(teacher).architecture.backbone
    assert loaded.classes == tuple("0123456789")
    tiny.run(
        tiny.DISTILL,
        tmp_path / "small",
        f"parent={teacher}",
        "backbone.depth=18",
        "backbone.width=0.0625",
        "backbone.stem=cifar",
        "labelled_weight=0.5",
        "labels.per_class=2",
        "batch.micro_batch=8",
    )
    assert load_network(tmp_path / "small").architecture.backbone.depth == 18


def test_the_queue_survives_in_checkpoints(tmp_path: Path) -> None:
    tiny.run(tiny.PRETRAIN, tmp_path / "a", "loss.queue.length=48", "loss.queue.ema_decay=0.9")
    checkpoint = newest_checkpoint(tmp_path / "a" / "checkpoints")
    assert checkpoint is not None
    assert {"model", "optimizer", "averaged", "queue"} == set(checkpoint.tensors)
    rows = next(t for t in checkpoint.tensors["queue"].values() if t.ndim == 2)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(48))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_train_close_to_fp32(tmp_path: Path, precision: str) -> None:
    def losses(directory: Path, *keys: str) -> list[float]:
        gentle = ("optimizer={kind: adamw, learning_rate: 0.0001}", "loss.temperature=0.5")
        tiny.run(tiny.PRETRAIN, directory, *gentle, "log.every_steps=1", *keys)
        lines = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]
        return [x["values"]["train/loss"] for x in lines if "train/loss" in x["values"]]

    exact = losses(tmp_path / "fp32")
    close = losses(tmp_path / precision, f"parallel.precision={precision}")
    assert len(exact) == 6
    assert close == pytest.approx(exact, rel=0.03)
    assert close != exact
    kept = weights(tmp_path / precision)
    assert all(t.dtype == torch.float32 for name, t in kept.items() if name.endswith("weight"))


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = tiny.run(tiny.SUPERVISED, tmp_path / "a")
    stamp = (tmp_path / "a" / "result.json").stat().st_mtime_ns
    second = tiny.run(tiny.SUPERVISED, tmp_path / "a")
    assert second.metrics == first.metrics
    assert second.checkpoint == first.checkpoint
    assert (tmp_path / "a" / "result.json").stat().st_mtime_ns == stamp


def test_another_recipe_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    tiny.run(tiny.SUPERVISED, tmp_path / "a")
    with pytest.raises(RecipeError, match=r"optimizer.learning_rate \(0.5 -> 0.25\)"):
        tiny.run(tiny.SUPERVISED, tmp_path / "a", "optimizer.learning_rate=0.25")
    tiny.run(tiny.SUPERVISED, tmp_path / "a", "log.every_steps=5", "checkpoint.keep=3")


def test_a_stage_without_its_parent_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="parent=DIR"):
        tiny.run(tiny.FINETUNE, tmp_path / "a")
    with pytest.raises(CheckpointError, match="is not a run directory, nor a model file"):
        tiny.run(tiny.FINETUNE, tmp_path / "a", f"parent={tmp_path}")
    with pytest.raises(CheckpointError, match="not a run directory"):
        tiny.run(tiny.FINETUNE, tmp_path / "b", f"parent={tmp_path / 'none'}")


def test_a_layer_beyond_the_head_is_refused(tmp_path: Path, parent: Path) -> None:
    with pytest.raises(RecipeError, match="beyond the 3 head layers"):
        tiny.run(tiny.FINETUNE, tmp_path / "a", f"parent={parent}", "from_layer=4")


def test_pretraining_needs_a_full_batch(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"batch\.global_batch=1024"):
        tiny.run(tiny.PRETRAIN, tmp_path / "a", "batch.global_batch=2048")


def test_images_without_labels_pretrain_but_do_not_finetune(tmp_path: Path, parent: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        pixels = torch.randint(0, 256, (12, 10, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:02}.png")
    keys = ("data={kind: folder, root: " + str(folder) + ", labelled: false}",)
    tiny.run(tiny.PRETRAIN, tmp_path / "a", *keys)
    assert result_of(tmp_path / "a")["metrics"].keys() == {"loss"}
    with pytest.raises(DataError, match="sub-folder per class"):
        tiny.run(tiny.FINETUNE, tmp_path / "b", f"parent={parent}", *keys)


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    images = np.zeros((12, 8, 8, 3), dtype=np.uint8)
    images += np.arange(12, dtype=np.uint8)[:, None, None, None] * 20
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(12) % 3)
    data = "data={kind: arrays, root: " + str(tmp_path / "x.npz") + "}"
    tiny.run(tiny.SUPERVISED, tmp_path / "teacher", data)
    with pytest.raises(DataError, match=r"knows 3 classes .* the images have 10 classes"):
        tiny.run(tiny.DISTILL, tmp_path / "student", f"parent={tmp_path / 'teacher'}")


def test_a_parent_of_another_stage_is_refused(tmp_path: Path, parent: Path) -> None:
    with pytest.raises(RecipeError, match="is a pretrain run; this stage needs a finetune"):
        tiny.run(tiny.DISTILL, tmp_path / "a", f"parent={parent}")
    tiny.run(tiny.FINETUNE, tmp_path / "b", f"parent={parent}")
    with pytest.raises(RecipeError, match="is a finetune run; this stage needs a pretrain run"):
        tiny.run(tiny.FINETUNE, tmp_path / "c", f"parent={tmp_path / 'b'}")


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(RecipeError, match=r"it holds holiday\.jpg; choose another --out"):
        tiny.run(tiny.SUPERVISED, tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["holiday.jpg"]
    with pytest.raises(RecipeError, match="is a file"):
        tiny.run(tiny.SUPERVISED, tmp_path / "photos" / "holiday.jpg")


def test_one_class_is_nothing_to_learn(tmp_path: Path) -> None:
    images = np.arange(8 * 192, dtype=np.uint8).reshape(8, 8, 8, 3)
    np.savez(tmp_path / "x.npz", images=images, labels=np.zeros(8, dtype=np.int64))
    data = "data={kind: arrays, root: " + str(tmp_path / "x.npz") + "}"
    with pytest.raises(DataError, match="one class"):
        tiny.run(tiny.SUPERVISED, tmp_path / "a", data)


def test_paths_mean_the_same_in_any_directory(
    tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.run(tiny.FINETUNE, tmp_path / "a", f"parent={parent}")
    monkeypatch.chdir(parent.parent)
    tiny.run(tiny.FINETUNE, tmp_path / "a", f"parent={parent.name}")


def test_out_of_memory_names_a_smaller_micro_batch() -> None:
    recipe = tiny.recipe_of(tiny.PRETRAIN)
    assert isinstance(recipe, PretrainRecipe)
    plan = make_plan(recipe, examples=64)
    expected = r"parallel\.memory=block takes less.*batch\.micro_batch=16"
    with pytest.raises(RecipeError, match=expected), _explained_memory(recipe, plan):
        torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="shapes"), _explained_memory(recipe, plan):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


@pytest.fixture
def broken_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(40):
        pixels = np.full((9, 9, 3), 6 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (folder / "05.png").write_bytes(b"")
    (folder / "17.png").write_bytes(b"<html>")
    return folder


def test_unreadable_images_are_listed_in_the_run(tmp_path: Path, broken_folder: Path) -> None:
    tiny.run(
        tiny.PRETRAIN,
        tmp_path / "a",
        "input.unreadable_limit=0.1",
        "data={kind: folder, root: " + str(broken_folder) + ", labelled: false}",
    )
    lines = (tmp_path / "a" / "unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["05.png", "17.png"]
    assert all(line.split("\t")[1] for line in lines)
    assert result_of(tmp_path / "a")["data"]["unreadable"] == 2


def test_embedding_and_predicting_leave_unreadable_images_out(
    tmp_path: Path, broken_folder: Path
) -> None:
    tiny.run(tiny.SUPERVISED, tmp_path / "a")
    written = embed_to_file(tmp_path / "a", broken_folder, tmp_path / "deep" / "e.npz")
    assert (written.images, written.unreadable) == (38, ("05.png", "17.png"))
    stored = np.load(tmp_path / "deep" / "e.npz", allow_pickle=False)
    assert stored["features"].shape == (38, 32)
    assert stored["features"].dtype == np.float32
    assert stored["names"][0] == "00.png"
    images = torch.from_numpy(np.full((1, 3, 8, 8), 0, dtype=np.uint8))
    direct = embed(load_network(tmp_path / "a").model, images)
    np.testing.assert_allclose(stored["features"][:1], direct.numpy(), rtol=1e-4, atol=1e-5)
    predicted = predict_to_file(tmp_path / "a", broken_folder, tmp_path / "c.csv")
    rows = (tmp_path / "c.csv").read_text().splitlines()
    assert predicted.images == 38
    assert rows[0] == "name,class,probability"
    assert len(rows) == 39
    assert rows[1].split(",")[1] in tuple("0123456789")


def test_outputs_are_tried_before_the_work(tmp_path: Path, broken_folder: Path) -> None:
    tiny.run(tiny.SUPERVISED, tmp_path / "a")
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(StorageError, match="is a directory"):
        predict_to_file(tmp_path / "a", broken_folder, tmp_path / "x.csv")
    with pytest.raises(RecipeError, match=r"ends in \.csv"):
        predict_to_file(tmp_path / "a", broken_folder, tmp_path / "x.npz")
    with pytest.raises(StorageError, match="cannot be written"):
        embed_to_file(tmp_path / "a", broken_folder, Path("/proc/x.npz"))


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    tiny.run(tiny.SUPERVISED, tmp_path / "a")
    (tmp_path / "a" / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"result\.json"):
        tiny.run(tiny.SUPERVISED, tmp_path / "a")


def small_arrays(path: Path, labels: "np.ndarray", *, seed: int = 0) -> str:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=labels)
    return "data={kind: arrays, root: " + str(path) + ", held_out_fraction: 0.25}"


def test_images_without_a_label_are_not_counted_as_errors(tmp_path: Path) -> None:
    labels = np.where(np.arange(64) % 2 == 0, np.arange(64) % 4 // 2, -1)
    data = small_arrays(tmp_path / "x.npz", labels)
    tiny.run(tiny.SUPERVISED, tmp_path / "a", data, "labels={percent: 100.0}")
    result = result_of(tmp_path / "a")
    assert result["protocol"]["n"] < result["data"]["held_out"]
    hits = result["metrics"]["accuracy"] * result["protocol"]["n"]
    assert hits == pytest.approx(round(hits), abs=1e-4)


def test_distilling_without_labels_keeps_the_teachers_classes(tmp_path: Path) -> None:
    tiny.run(tiny.SUPERVISED, tmp_path / "teacher")
    np.savez(tmp_path / "x.npz", images=np.zeros((40, 8, 8, 3), dtype=np.uint8))
    data = "data={kind: arrays, root: " + str(tmp_path / "x.npz") + "}"
    tiny.run(tiny.DISTILL, tmp_path / "a", data, f"parent={tmp_path / 'teacher'}")
    assert load_network(tmp_path / "a").classes == tuple("0123456789")
    assert result_of(tmp_path / "a")["metrics"].keys() == {"loss"}
    assert result_of(tmp_path / "a")["data"]["labels"] is None


def test_a_parent_that_was_run_again_is_noticed(tmp_path: Path) -> None:
    tiny.run(tiny.PRETRAIN, tmp_path / "p")
    tiny.run(tiny.FINETUNE, tmp_path / "a", f"parent={tmp_path / 'p'}")
    shutil.rmtree(tmp_path / "p")
    tiny.run(tiny.PRETRAIN, tmp_path / "p", "seed=5")
    with pytest.raises(DataError, match="changed since the run began: parent"):
        tiny.run(tiny.FINETUNE, tmp_path / "a", f"parent={tmp_path / 'p'}")


def test_a_damaged_parent_is_not_replaced_by_an_older_one(tmp_path: Path) -> None:
    tiny.run(tiny.PRETRAIN, tmp_path / "p")
    model = tmp_path / "p" / "checkpoints" / f"{6 * 32:012}" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    assert newest_checkpoint(tmp_path / "p" / "checkpoints") is not None
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        tiny.run(tiny.KNN, tmp_path / "a", f"parent={tmp_path / 'p'}")


def test_another_held_out_share_of_the_same_images_is_refused(tmp_path: Path) -> None:
    labels = np.arange(64) % 4
    data = small_arrays(tmp_path / "x.npz", labels)
    tiny.run(tiny.PRETRAIN, tmp_path / "p", data)
    tiny.run(tiny.KNN, tmp_path / "same", data, f"parent={tmp_path / 'p'}")
    with pytest.raises(RecipeError, match=r"data\.split_seed=0 on the same images"):
        tiny.run(tiny.KNN, tmp_path / "a", data, f"parent={tmp_path / 'p'}", "data.split_seed=1")


def test_a_layer_beyond_the_head_is_refused_by_knn(tmp_path: Path, parent: Path) -> None:
    with pytest.raises(RecipeError, match="beyond the 3 head layers"):
        tiny.run(tiny.KNN, tmp_path / "a", f"parent={parent}", "from_layer=4")


def test_a_queue_longer_than_the_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"at most loss\.queue\.length=1405"):
        tiny.run(tiny.PRETRAIN, tmp_path / "a", "loss.queue.length=1406")


def test_training_survives_a_failing_evaluation(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "val/a", "val/b"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = np.full((9, 9, 3), 60 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    for number in (0, 1):
        (tmp_path / "images" / "val" / "a" / f"{number}.png").write_bytes(b"")
    keys = (
        "data={kind: folder, root: " + str(tmp_path / "images") + ", train: train, held_out: val}",
        "checkpoint.every_steps=null",
    )
    with pytest.raises(DataError, match="unreadable_limit"):
        tiny.run(tiny.SUPERVISED, tmp_path / "a", *keys)
    assert (tmp_path / "a" / "checkpoints" / f"{6 * 32:012}").is_dir()
    tiny.run(tiny.SUPERVISED, tmp_path / "a", *keys, "input.unreadable_limit=0.5")
    assert "accuracy" in result_of(tmp_path / "a")["metrics"]

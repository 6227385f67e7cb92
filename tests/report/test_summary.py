import json
import math
import statistics
from pathlib import Path

import pytest

from bigsimclr.report.document import report_json, summarise
from bigsimclr.report.facts import read_run_set
from tests.report.fabricate import (
    AMOUNTS,
    BACKBONE,
    BATCH,
    DRAWS,
    HELD_OUT,
    MEANS,
    accuracy,
    write,
    write_pipeline,
    write_run,
)

STAGE_OF_METHOD = {"supervised": "supervised", "finetuned": "finetune", "distilled": "distill"}


def report_of(directory: Path) -> dict:
    return json.loads(report_json(summarise(read_run_set(directory))))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return report_of(write_pipeline(tmp_path_factory.mktemp("runs") / "digits"))


def test_label_efficiency_holds_every_method_at_every_amount(finished):
    entries = finished["label_efficiency"]
    order = [(entry["labels_per_class"], entry["method"]) for entry in entries]
    assert order == [(amount, method) for amount in AMOUNTS for method in STAGE_OF_METHOD]
    for entry in entries:
        stage = STAGE_OF_METHOD[entry["method"]]
        values = [accuracy(stage, entry["labels_per_class"], draw) for draw in DRAWS]
        assert set(entry) == {"labels_per_class", "method", "mean", "std", "draws", "values"}
        assert entry["values"] == values
        assert entry["mean"] == pytest.approx(statistics.fmean(values), abs=1e-15)
        assert entry["std"] == pytest.approx(statistics.stdev(values), abs=1e-15)
        assert entry["draws"] == 5


def test_verdict_is_computed_from_the_fewest_labels(finished):
    ours = statistics.fmean(accuracy("distill", 1, draw) for draw in DRAWS)
    theirs = statistics.fmean(accuracy("supervised", 1, draw) for draw in DRAWS)
    assert finished["verdict"] == (
        f"With 1 label per class the distilled student reaches {100 * ours:.1f}% ± 2.0 on 360 "
        f"held-out images, {100 * (ours - theirs):.1f} points above the same network trained from "
        f"scratch ({100 * theirs:.1f}% ± 2.0; 5 label draws each)."
    )


def test_results_carry_the_whole_protocol(finished):
    rows = {(row["step"], row["measure"]): row for row in finished["results"]}
    assert rows["linear", "accuracy"]["accuracy"] == 0.9722
    assert rows["linear", "accuracy"]["std"] is None
    assert rows["linear", "accuracy"]["protocol"] == {
        "encoder": "frozen",
        "head_layer": 0,
        "epochs": 40.08,
        "augmentation": "crop",
        "n": HELD_OUT,
        "labels_per_class": None,
        "labels_percent": 100.0,
        "checkpoint": "last",
        "draws": [0],
        "seeds": [0],
    }
    few = [row for row in finished["results"] if row["step"] == "finetune"]
    assert [row["protocol"]["labels_per_class"] for row in few] == list(AMOUNTS)
    assert few[0]["runs"] == [f"finetune/per_class=1,draw={draw}" for draw in DRAWS]
    assert few[0]["protocol"]["draws"] == list(DRAWS)
    assert (few[0]["runs_planned"], len(few[0]["values"])) == (5, 5)
    assert {row["measure"] for row in finished["results"] if row["step"] == "pretrain"} == {
        "knn_accuracy",
        "probe_accuracy",
    }


def test_training_holds_the_last_value_of_every_record(finished):
    pretrain = finished["training"][0]
    assert (pretrain["run"], pretrain["steps"], pretrain["examples"]) == ("pretrain", 225, 57_600)
    assert pretrain["final"]["train/chance_loss"] == 2 * math.log(2 * BATCH - 1)
    assert pretrain["final"]["knn/accuracy"] == 0.985 - 0.2 * math.exp(-6)
    assert len(finished["training"]) == 1 + 3 * len(AMOUNTS) * len(DRAWS)


def test_lineage_names_parents_and_a_students_labels(finished):
    runs = {run["run"]: run for run in finished["lineage"]}
    student = runs["distill/per_class=2,draw=3"]
    assert student["parent"] == "finetune/per_class=2,draw=3"
    assert student["labels"] == "2 labels per class"
    assert runs["finetune/per_class=2,draw=3"]["parent"] == "pretrain"
    assert runs["pretrain"]["labels"] is None
    assert {run["state"] for run in runs.values()} == {"finished"}
    assert finished["runs"] == {"finished": 48, "total": 48}


def test_a_losing_student_is_said_to_lose(tmp_path, monkeypatch):
    monkeypatch.setitem(MEANS, "distill", (0.65, 0.92, 0.96))
    verdict = report_of(write_pipeline(tmp_path / "digits"))["verdict"]
    assert "points below the same network trained from scratch" in verdict
    assert "above" not in verdict


def test_an_equal_student_is_said_to_be_level(tmp_path, monkeypatch):
    monkeypatch.setitem(MEANS, "distill", MEANS["supervised"])
    verdict = report_of(write_pipeline(tmp_path / "digits"))["verdict"]
    assert "held-out images, level with the same network trained from scratch (" in verdict


def test_another_network_is_not_called_the_same(tmp_path):
    root = write_pipeline(tmp_path / "digits")
    for path in (root / "supervised").iterdir():
        recipe = (path / "recipe.yaml").read_text()
        (path / "recipe.yaml").write_text(recipe.replace("width: 0.25", "width: 0.5"))
    assert "above a network trained from scratch" in report_of(root)["verdict"]


def test_unfinished_draws_are_counted_honestly(tmp_path):
    root = write_pipeline(
        tmp_path / "digits", finished=lambda path: path != "supervised/per_class=1,draw=4"
    )
    report = report_of(root)
    entry = report["label_efficiency"][0]
    assert (entry["method"], entry["draws"], len(entry["values"])) == ("supervised", 4, 4)
    assert "5 label draws against 4)." in report["verdict"]
    assert report["verdict"].endswith("So far 47 of 48 runs have finished.")
    assert report["lineage"][7]["state"] == "not finished yet"


def test_fewer_finished_stages_give_smaller_claims(tmp_path):
    def verdict(name: str, *stages: str) -> str:
        root = write_pipeline(
            tmp_path / name,
            finished=lambda path: path.split("/")[0] in stages,
            started=lambda path: path.split("/")[0] in stages,
        )
        return report_of(root)["verdict"]

    assert verdict("a") == "Not run yet."
    assert verdict("b", "pretrain") == (
        "Pretraining has finished at a contrastive loss of "
        f"{report_of(tmp_path / 'b')['training'][0]['final']['train/loss']:.2f} (chance 12.47); "
        "nearest neighbours classify 98.5% of 360 held-out images right. "
        "So far 1 of 48 runs have finished."
    )
    assert verdict("c", "pretrain", "knn").startswith(
        "A nearest-neighbour vote over the frozen features reaches 98.3% on 360 held-out images "
        "with all labels."
    )
    assert verdict("d", "finetune").startswith(
        "With 1 label per class the fine-tuned network reaches 81.0% ± 2.0 on 360 held-out images "
        "(5 label draws)."
    )
    assert verdict("e", "finetune", "supervised").startswith(
        "With 1 label per class the fine-tuned network reaches 81.0% ± 2.0 on 360 held-out "
        "images, 9.0 points above a network trained from scratch (72.0% ± 2.0; "
    ), "without the pretraining recipe nothing says that the networks are equal"


def test_a_single_student_finds_its_teachers_labels(tmp_path):
    root = write_pipeline(tmp_path / "digits")
    report = report_of(root / "distill/per_class=5,draw=2")
    (entry,) = report["label_efficiency"]
    assert (entry["labels_per_class"], entry["method"], entry["std"]) == (5, "distilled", None)
    assert report["verdict"] == (
        f"With 5 labels per class the distilled student reaches "
        f"{100 * accuracy('distill', 5, 2):.1f}% on 360 held-out images (1 label draw)."
    )
    assert [run["stage"] for run in report["lineage"]] == ["finetune", "pretrain", "distill"]


def test_labels_in_percent_have_their_own_points(tmp_path):
    for stage, value in (("supervised", 0.5), ("finetune", 0.75)):
        write_run(
            tmp_path / stage,
            stage,
            recipe=f"backbone: {BACKBONE}\n",
            metrics={"accuracy": value},
            protocol={"labels_percent": 1.0, "draw": 0},
        )
    steps = [
        {"name": name, "stage": name, "runs": [{"path": name, "grid": {}, "parent": None}]}
        for name in ("supervised", "finetune")
    ]
    write(tmp_path / "pipeline.json", {"name": "p", "steps": steps})
    report = report_of(tmp_path)
    assert [entry["labels_percent"] for entry in report["label_efficiency"]] == [1.0, 1.0]
    assert report["label_efficiency"][0]["labels_per_class"] is None
    assert report["verdict"] == (
        "With 1% of the labels the fine-tuned network reaches 75.0% on 360 held-out images, "
        "25.0 points above the same network trained from scratch (50.0%; 1 label draw)."
    )


def test_unlike_protocols_are_never_averaged(tmp_path):
    runs = []
    for seed, epochs in ((0, 10), (1, 10), (2, 20)):
        path = f"finetune/seed={seed}"
        runs.append({"path": path, "grid": {"seed": seed}, "parent": None})
        write_run(
            tmp_path / path,
            "finetune",
            metrics={"accuracy": 0.5 + seed / 10},
            protocol={"labels_per_class": 1, "draw": 0, "seed": seed, "epochs": epochs},
        )
    steps = [{"name": "finetune", "stage": "finetune", "runs": runs}]
    write(tmp_path / "pipeline.json", {"name": "p", "steps": steps})
    rows = report_of(tmp_path)["results"]
    assert [(row["values"], row["protocol"]["seeds"]) for row in rows] == [
        ([0.5, 0.6], [0, 1]),
        ([0.7], [2]),
    ]


def test_grids_over_other_keys_are_told_apart(tmp_path):
    runs = []
    for rate in (0.1, 0.2):
        path = f"finetune/learning_rate={rate}"
        grid = {"optimizer.learning_rate": rate}
        runs.append({"path": path, "grid": grid, "parent": None})
        write_run(
            tmp_path / path,
            "finetune",
            metrics={"accuracy": rate},
            protocol={"labels_per_class": 1, "draw": 0},
        )
    steps = [{"name": "finetune", "stage": "finetune", "runs": runs}]
    write(tmp_path / "pipeline.json", {"name": "p", "steps": steps})
    report = report_of(tmp_path)
    assert [row["setting"] for row in report["results"]] == [
        "optimizer.learning_rate=0.1",
        "optimizer.learning_rate=0.2",
    ]
    assert [entry["step"] for entry in report["label_efficiency"]] == [
        "finetune (optimizer.learning_rate=0.1)",
        "finetune (optimizer.learning_rate=0.2)",
    ]


def test_the_noted_command_is_repeated(tmp_path):
    root = write_pipeline(tmp_path / "digits")
    assert report_of(root)["commands"][1] == (
        "bigsimclr run knn/recipe.yaml --out ../digits-again/knn"
    )
    tree = json.loads((root / "pipeline.json").read_text())
    write(root / "pipeline.json", tree | {"command": "bigsimclr run digits"})
    assert report_of(root)["commands"] == ["bigsimclr run digits"]

"""The CIFAR-10 benchmark as it runs on a GPU, cut down to what two cores do in a minute."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cifar10 import Epochs, choose_epochs, of_pretraining

pq = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).parents[2]
CIFAR10 = ROOT.parent / "shared" / "data" / "cifar10"
STEPS = [
    "knn",
    "linear",
    "supervised_1pct",
    "supervised_10pct",
    "finetune_1pct",
    "finetune_10pct",
    "distill_1pct",
    "distill_10pct",
]


def test_the_time_is_shared_between_pretraining_and_distillation() -> None:
    # 10 images a second for 1,000 seconds: 58 and 9 per cent of 100 epochs, the latter half again.
    assert choose_epochs(10.0, seconds=1000, images=100) == Epochs(pretrain=58, distill=13)
    assert choose_epochs(0.1, seconds=1, images=100) == Epochs(pretrain=1, distill=1)


def test_the_timed_run_takes_what_concerns_pretraining() -> None:
    keys = {"pretrain.batch.global_batch": "8", "linear.schedule.epochs": "2", "data.root": "x"}
    assert of_pretraining(keys) == {"batch.global_batch": "8", "data.root": "x"}


@pytest.mark.slow
def test_the_whole_target_on_a_few_images(tmp_path: Path) -> None:
    if not CIFAR10.exists():
        pytest.skip("no CIFAR-10 beside the checkout")
    for name, rows in (("train", 600), ("test", 120)):
        images = pq.read_table(CIFAR10 / f"{name}.parquet").slice(0, rows)
        pq.write_table(images, tmp_path / f"{name}.parquet")
    output = tmp_path / "cifar10.json"
    network = [f"{step}.backbone" for step in ("pretrain", "supervised_1pct", "supervised_10pct")]
    few = ("supervised_1pct", "finetune_1pct")
    changes = [
        *(f"{key}.width=0.0625" for key in network),
        *(f"{key}.depth=10" for key in network),
        *(f"{step}.batch.global_batch=4" for step in few),
        *(f"{step}.schedule.epochs=2" for step in STEPS[1:6]),
        *(f"{step}.schedule.warmup_epochs=0" for step in ("supervised_1pct", "supervised_10pct")),
        "pretrain.batch.global_batch=128",
        "linear.batch.global_batch=128",
        "distill_1pct.batch.global_batch=128",
        "distill_10pct.batch.global_batch=128",
        "parallel.cpu_threads=1",
        "parallel.device=cpu",
    ]
    command = [sys.executable, "-m", "benchmarks.cifar10", "--data", str(tmp_path)]
    command += ["--minutes", "0.01", "--timed-steps", "3", "--output", str(output), *changes]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(output.read_text(encoding="utf-8"))
    assert [row["step"] for row in result["results"]] == STEPS
    for row in result["results"]:
        # Every accuracy is a share of the held-out images.
        assert row["protocol"]["n"] == 120
        assert row["accuracy"] * 120 == pytest.approx(round(row["accuracy"] * 120), abs=1e-4)
    points = {(row["labels_percent"], row["method"]) for row in result["label_efficiency"]}
    methods = ("supervised", "finetuned", "distilled")
    assert points == {(percent, method) for percent in (1.0, 10.0) for method in methods}
    assert (result["pretrain_epochs"], result["distill_epochs"]) == (1, 1)
    assert result["images_per_second"] > 0
    assert "data.root=" in result["measured"]
    assert [line.split()[0] for line in ran.stdout.splitlines()[:-1]] == STEPS

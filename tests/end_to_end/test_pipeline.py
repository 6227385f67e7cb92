"""The digits pipeline as a user runs it, shortened: every stage, lineage, report, and a re-run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SHORT = (
    "pretrain.schedule.epochs=1",
    "pretrain.schedule.warmup_epochs=0",
    "pretrain.probe.knn_every_epochs=0.5",
    "linear.schedule.epochs=1",
    "supervised.schedule.steps=2",
    "finetune.schedule.steps=2",
    "distill.schedule.steps=2",
)


def _run(directory: Path) -> str:
    command = [sys.executable, "-m", "bigsimclr", "run", "digits", *SHORT, "--out", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_digits_pipeline(tmp_path: Path) -> None:
    directory = tmp_path / "digits"
    _run(directory)
    report = json.loads((directory / "report.json").read_text())
    points = report["label_efficiency"]
    assert [(p["labels_per_class"], p["method"]) for p in points] == [
        (labels, method)
        for labels in (1, 2, 5)
        for method in ("supervised", "finetuned", "distilled")
    ]
    for point in points:
        assert point["draws"] == len(point["values"]) == 5
        assert point["mean"] == pytest.approx(sum(point["values"]) / 5)
        squares = sum((value - point["mean"]) ** 2 for value in point["values"])
        assert point["std"] == pytest.approx((squares / 4) ** 0.5, abs=1e-9)
        # 360 held-out images: every accuracy is a multiple of one image.
        assert all(value * 360 == pytest.approx(round(value * 360)) for value in point["values"])
    assert "1 label per class" in report["verdict"]
    assert (directory / "report.html").stat().st_size > 50_000

    lists = [directory / f"finetune/per_class=5,draw={d}/labels.txt" for d in range(5)]
    drawn = [set(path.read_text().splitlines()) for path in lists]
    assert all(len(names) == 50 for names in drawn)
    assert drawn[0] != drawn[1]
    same = directory / "supervised/per_class=5,draw=0/labels.txt"
    assert set(same.read_text().splitlines()) == drawn[0]

    student = directory / "distill/per_class=2,draw=3"
    lineage = json.loads((student / "result.json").read_text())
    teacher = (student / lineage["parent"]).resolve()
    assert teacher == (directory / "finetune/per_class=2,draw=3").resolve()
    grand = json.loads((teacher / "result.json").read_text())["parent"]
    assert (teacher / grand).resolve() == (directory / "pretrain").resolve()

    before = {p: p.stat().st_mtime_ns for p in directory.rglob("result.json")}
    assert len(before) == 48
    assert "48 of 48 runs finished before" in _run(directory)
    assert before == {p: p.stat().st_mtime_ns for p in directory.rglob("result.json")}

"""Goodput: what was kept of what was computed, against runs whose truth is known."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bigsimclr.report.attempts import Attempt
from bigsimclr.report.goodput import Goodput, goodput_of
from bigsimclr.report.html import write_report
from bigsimclr.report.records import Record
from tests.report.fabricate import classifier_records, write, write_pipeline, write_run

WHOLE = Attempt(began=1000.0, first_step=0, world_size=1, job=None, restart=0)


def record(step: int) -> Record:
    return Record(examples=32 * step, step=step, time=1e9, values={})


def test_an_uninterrupted_run_keeps_everything() -> None:
    done = replace(WHOLE, ended=1100.0, last_step=80, why="done")
    assert goodput_of([done], [record(80)]) == Goodput(80, 80, 0, 0.0)
    assert goodput_of([], [record(80)]) is None


def test_steps_of_a_run_in_progress_are_those_recorded() -> None:
    assert goodput_of([WHOLE], []) == Goodput(0, 0, 0, 0.0)
    assert goodput_of([WHOLE], [record(5), record(10)]) == Goodput(10, 10, 0, 0.0)
    goes_on = replace(WHOLE, first_step=12)
    assert goodput_of([goes_on], [record(10)]) == Goodput(12, 12, 0, 0.0)


def test_killed_stopped_and_failed_attempts_add_up() -> None:
    attempts = [
        # Killed; its last record is of step 406, the next attempt goes on from step 400.
        WHOLE,
        # Stopped by a signal in step 800, and went on from there 60 s later.
        Attempt(1500.0, 400, 8, "7", 1, reached=406, alive=1440.0, ended=1900.0, last_step=800),
        # Killed before its first record.
        Attempt(1960.0, 800, 8, "7", 2, reached=800, alive=1890.0),
        # Met an error in step 910.
        Attempt(2160.0, 800, 8, "7", 3, reached=800, alive=1890.0, ended=2300.0, last_step=910),
        Attempt(2350.0, 900, 8, "7", 4, reached=900, alive=2290.0, ended=2900.0, last_step=1200),
    ]
    found = goodput_of(attempts, [record(1200)])
    assert found == Goodput(1200, 1200 + 6 + 10, 4, 60.0 + 60.0 + 200.0 + 50.0)
    assert found.share == 1200 / 1216
    assert found.words == (
        "goodput 98.7%: 1,200 of 1,216 steps kept, 4 restarts, 0:06:10 lost between attempts"
    )


def test_clocks_that_differ_lose_no_negative_time() -> None:
    earlier = replace(WHOLE, ended=1100.0, last_step=10)
    later = replace(WHOLE, began=1050.0, first_step=10, ended=1200.0, last_step=20)
    assert goodput_of([earlier, later], []) == Goodput(20, 20, 1, 0.0)


def test_words_of_little_and_of_much() -> None:
    assert Goodput(0, 0, 1, 0.4).words == (
        "goodput: 0 of 0 steps kept, 1 restart, 0:00:00 lost between attempts"
    )
    assert "12,345 restarts, 100:00:01 lost" in Goodput(1, 2, 12_345, 360_001.2).words


def began(moment: float, step: int, **changes: object) -> dict[str, object]:
    facts = {"event": "began", "time": moment, "step": step, "world_size": 1, "job": "7"}
    return {**facts, "restart": 0, "reached": None, "alive": None, **changes}


def write_attempts(folder: Path, *events: dict[str, object]) -> None:
    write(folder / "attempts.jsonl", "".join(json.dumps(event) + "\n" for event in events))


def ended(moment: float, step: int, why: str) -> dict[str, object]:
    return {"event": "ended", "time": moment, "step": step, "why": why}


def report_of(folder: Path) -> tuple[dict, str]:
    page = write_report(folder).read_text(encoding="utf-8")
    words = re.sub(r"\s+", " ", re.sub(r"<style>.*</style>|<[^>]*>", " ", page, flags=re.DOTALL))
    return json.loads((folder / "report.json").read_text()), html.unescape(words)


def test_the_report_shows_what_an_interruption_cost(tmp_path: Path) -> None:
    write_run(
        tmp_path / "run", "finetune", metrics={"accuracy": 0.5}, records=classifier_records(0.5)
    )
    write_attempts(
        tmp_path / "run",
        began(1000.0, 0),
        began(1100.0, 60, reached=70, alive=1090.5, restart=1),
        ended(1200.0, 80, "done"),
    )
    report, words = report_of(tmp_path / "run")
    assert report["lineage"][0]["goodput"] == {
        "share": 80 / 90,
        "steps_kept": 80,
        "steps_computed": 90,
        "restarts": 1,
        "seconds_lost": 9.5,
    }
    line = "goodput 88.9%: 80 of 90 steps kept, 1 restart, 0:00:10 lost between attempts"
    assert f"run, interrupted {line}" in words


def test_one_attempt_is_in_the_json_alone(tmp_path: Path) -> None:
    write_run(
        tmp_path / "run", "finetune", metrics={"accuracy": 0.5}, records=classifier_records(0.5)
    )
    write_attempts(tmp_path / "run", began(1000.0, 0), ended(1200.0, 80, "done"))
    report, words = report_of(tmp_path / "run")
    assert report["lineage"][0]["goodput"] == {
        "share": 1.0,
        "steps_kept": 80,
        "steps_computed": 80,
        "restarts": 0,
        "seconds_lost": 0.0,
    }
    assert "goodput" not in words


@pytest.mark.slow
def test_a_pipeline_names_the_interrupted_runs(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path / "digits")
    for path in ("pretrain", "finetune/per_class=1,draw=0"):
        write_attempts(root / path, began(1000.0, 0), began(1100.0, 0), ended(1200.0, 80, "done"))
    write_attempts(root / "linear", began(1000.0, 0), ended(1200.0, 80, "done"))
    report, words = report_of(root)
    found = {run["run"]: run["goodput"] for run in report["lineage"]}
    assert found["knn"] is None
    assert (found["linear"]["restarts"], found["pretrain"]["restarts"]) == (0, 1)
    assert words.count(", interrupted goodput 100.0%: 80 of 80 steps kept, 1 restart, ") == 2


@pytest.mark.parametrize("content", ["{", "null\n", "[" * 100_000, '{"event": "began"}\n'])
def test_damaged_attempts_never_stop_a_report(tmp_path: Path, content: str) -> None:
    write_run(tmp_path / "run", "finetune", metrics={"accuracy": 0.5})
    write(tmp_path / "run/attempts.jsonl", content)
    report, words = report_of(tmp_path / "run")
    assert report["lineage"][0]["goodput"] is None
    assert "goodput" not in words


def test_a_job_that_is_no_text_of_slurm_stays_out_of_the_page(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "finetune", metrics={"accuracy": 0.5})
    hostile = "<script>alert(1)</script>"
    attempts = [began(1000.0, 0, job=hostile), began(1100.0, 0, job=hostile)]
    write_attempts(tmp_path / "run", *attempts, ended(1200.0, 80, hostile))
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "alert" not in page
    assert "goodput 100.0%: 80 of 80 steps kept" in page


def test_a_folder_in_the_place_of_the_attempts_is_noted(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "finetune", metrics={"accuracy": 0.5})
    (tmp_path / "run/attempts.jsonl").mkdir()
    report, _ = report_of(tmp_path / "run")
    assert report["notes"] == ["attempts.jsonl: cannot be read (IsADirectoryError)"]

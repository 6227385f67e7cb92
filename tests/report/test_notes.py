"""What the page says where a file is damaged or there is nothing to show."""

import html
import json
import re
from pathlib import Path

import pytest

from bigsimclr.report.html import write_report
from tests.report.fabricate import classifier_records, write, write_pipeline, write_run

pytestmark = pytest.mark.slow


def words_of(directory: Path) -> str:
    """Return the text of a run's page, each element apart from the next."""
    page = write_report(directory).read_text(encoding="utf-8")
    return html.unescape(
        re.sub(r"\s+", " ", re.sub(r"<style>.*</style>|<[^>]*>", " ", page, flags=re.S))
    )


def test_unlike_draws_are_counted_in_the_table(tmp_path):
    root = write_pipeline(
        tmp_path / "digits", finished=lambda path: path != "supervised/per_class=1,draw=4"
    )
    words = words_of(root)
    assert "± 2.0 (5) 86.0 ± 2.0 (5) +" in words
    assert re.search(r"1 / class \d+\.\d ± \d\.\d \(4\)", words)
    assert "mean ± sample standard deviation (label draws)" in words


@pytest.mark.parametrize(
    ("content", "note", "state"),
    [
        ("{", "damaged, so its run is shown as not finished", "not finished yet"),
        ("", "damaged, so its run is shown as not finished", "not finished yet"),
        ("[1, 2]", "damaged, so its run is shown as not finished", "not finished yet"),
        ("null", "damaged, so its run is shown as not finished", "not finished yet"),
        ('{"metrics": 3}', "damaged, metrics is no list of names and numbers", "none measured"),
        ('{"metrics": {"accuracy": NaN}}', "accuracy is no finite number", "none measured"),
    ],
)
def test_a_damaged_result_is_named_on_the_page(content, note, state, tmp_path):
    root = write_pipeline(tmp_path / "digits")
    name = "finetune/per_class=1,draw=0/result.json"
    write(root / name, content)
    report = words_of(root)
    assert f"{name}: {note}" in report
    single = tmp_path / "run"
    write_run(single, "finetune", metrics={"accuracy": 0.5}, protocol={"labels_per_class": 1})
    write(single / "result.json", content)
    words = words_of(single)
    assert f"Not everything could be read result.json: {note}" in words
    assert state in words
    (noted,) = json.loads((single / "report.json").read_text())["notes"]
    assert noted.startswith(f"result.json: {note}")


def unreadable(folder: Path, names: int, stated: int | None) -> list[str]:
    """Report on a run with unreadable images and return its notes."""
    write_run(folder, "finetune", metrics={"accuracy": 0.5}, protocol={"labels_per_class": 1})
    if names:
        lines = [f"b/{number}.jpg\tcannot identify <image>\n" for number in range(names)]
        write(folder / "unreadable.txt", "".join(lines))
    if stated is not None:
        result = json.loads((folder / "result.json").read_text())
        result["data"]["unreadable"] = stated
        write(folder / "result.json", result)
    words = words_of(folder)
    notes = json.loads((folder / "report.json").read_text())["notes"]
    assert all(note in words for note in notes)
    return notes


def test_unreadable_images_are_counted_and_named(tmp_path):
    apart = "could not be read and took no part"
    assert unreadable(tmp_path / "none", 0, 0) == unreadable(tmp_path / "old", 0, None) == []
    assert unreadable(tmp_path / "one", 1, 1) == [f"1 image {apart}: b/0.jpg"]
    assert unreadable(tmp_path / "three", 3, 3) == [f"3 images {apart}: b/0.jpg, b/1.jpg, b/2.jpg"]
    assert unreadable(tmp_path / "many", 1200, 1200) == [
        f"1,200 images {apart}: b/0.jpg, b/1.jpg, b/2.jpg and 1,197 more (all in unreadable.txt)"
    ]
    assert unreadable(tmp_path / "begun", 2, None) == [f"2 images {apart}: b/0.jpg, b/1.jpg"]
    assert unreadable(tmp_path / "lost", 0, 72) == [f"72 images {apart}"]


def test_unreadable_images_of_a_pipeline_name_their_run(tmp_path):
    root = write_pipeline(tmp_path / "digits")
    write(root / "linear/unreadable.txt", "a.png\ttruncated\n")
    assert "linear: 1 image could not be read and took no part: a.png" in words_of(root)


def test_many_notes_are_folded(tmp_path):
    root = write_pipeline(tmp_path / "digits")
    for draw in range(5):
        for stage in ("finetune", "distill"):
            write(root / f"{stage}/per_class=1,draw={draw}/result.json", "{")
    words = words_of(root)
    assert "4 more" in words
    assert words.count("damaged, so its run") == 10


def test_sections_without_content_say_why(tmp_path):
    def page(name: str, stage: str, *, metrics: object = None, records: int = 0) -> str:
        write_run(
            tmp_path / name,
            stage,
            metrics=metrics,
            protocol={"labels_per_class": 1, "draw": 0},
            records=classifier_records(0.5)[:records],
        )
        return words_of(tmp_path / name)

    short = page("short", "finetune", metrics={"accuracy": 0.5}, records=1)
    assert "Finished, but with one record: too few points for a plot." in short
    assert "Not run yet" not in short
    none = page("none", "finetune", metrics={"accuracy": 0.5})
    assert "Finished, but with no record: too few points for a plot." in none
    assert "Not run yet" not in none
    unmeasured = page("unmeasured", "finetune", metrics={"loss": 0.5}, records=8)
    assert "none measured" in unmeasured
    assert "of the finished classifiers none measured an accuracy" in unmeasured
    assert "not run yet" not in unmeasured.lower()
    assert "not finished yet" not in unmeasured.lower()
    begun = page("begun", "finetune", records=1)
    assert "Not finished yet: too few records for a plot so far." in begun
    assert "Not finished yet: no classifier has come to its end." in begun
    neighbours = page("knn", "knn", metrics={"accuracy": 0.5})
    assert "Nothing is trained here" in neighbours
    assert "Accuracy by" not in neighbours


def test_a_pretraining_alone_has_no_empty_curve(tmp_path):
    write_run(tmp_path / "run", "pretrain", metrics={"knn_accuracy": 0.5}, records=[])
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert 'id="curve"' not in page
    assert "#curve" not in page

"""The page of benchmarks: fresh, complete, and with the figures of the files."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.markdown import shown, table
from benchmarks.render import PAGE, PLOT, RESULTS, bars, page, plot


def _result(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _cells(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(RESULTS), "run `make bench-docs`"


def test_plot_is_fresh() -> None:
    # Versions of matplotlib draw other lines, but they write the same words.
    text = PLOT.read_text(encoding="utf-8")
    drawn = bars(RESULTS)
    assert drawn
    for label, ratio in drawn:
        assert f">{label}</text>" in text, "run `make bench-docs`"
        assert f">{ratio:.2f}</text>" in text, "run `make bench-docs`"
    assert text.count("</text>") == plot(RESULTS).count("</text>")


def test_equal_files_give_an_equal_plot() -> None:
    assert plot(RESULTS) == plot(RESULTS)


def test_page_has_the_figures_of_the_loss() -> None:
    result = _result("loss.json")
    rows = [row for row in result["results"] if (row["pairs"], row["threads"]) == (4096, 1)]
    lines = [cells for cells in _cells(page(RESULTS)) if cells[:2] == ["4096", "1"]]
    found = {line[2]: line for line in lines}
    assert {row["method"] for row in rows} == {*found} - {"tile-wise"}
    for row in rows:
        cells = found[row["method"]]
        assert cells[3:6] == [repr(row[key]) for key in ("median_seconds", "min_seconds", "spread")]
        assert str(row["time_over"]["lightly"]) in cells
        assert str(row["memory_over"]["solo"]) in cells


def test_what_is_said_of_the_chunked_loss_holds() -> None:
    # Of one thread, whose time is that of the processor.
    (row,) = (
        row
        for row in _result("loss.json")["results"]
        if (row["pairs"], row["threads"], row["method"]) == (4096, 1, "chunked")
    )
    assert row["time_over"]["lightly"] < 1 / 4
    assert row["memory_over"]["lightly"] < 1 / 20


def test_page_has_the_figures_of_others() -> None:
    text = page(RESULTS)
    for row in _result("augment.json")["results"]:
        line = next(cells for cells in _cells(text) if cells[0] == row["method"])
        assert line[1] == repr(row["median_microseconds_per_view"])
    for name in ("loss.json", "augment.json", "digits.json", "scaling.json"):
        result = _result(name)
        assert f"`{result['command']}`" in text
        assert (result.get("commit") or result["environment"]["commit"]) in text


def test_figures_stay_as_they_are_unless_long() -> None:
    assert [shown(value) for value in (3.10206, 1132.6, 17, "bytes", None, True)] == [
        "3.10206", "1132.6", "17", "bytes", "", "True",
    ]  # fmt: skip
    assert [shown(value) for value in (2.631568063147869e-07, 0.8400000095367431)] == [
        "2.632e-07", "0.84",
    ]  # fmt: skip


def test_columns_that_no_row_has_are_left_out() -> None:
    rows = [{"name": "a", "deep": {"er": 1.5}}, {"name": "b", "out": {}}]
    columns = {"who": "name", "value": "deep.er", "none": "deep.none", "other": "out.none"}
    assert table(rows, columns) == "| who | value |\n| --- | ---: |\n| a | 1.5 |\n| b |  |\n"


# --- files as a GPU leaves them --------------------------------------------------------------

_HEAD = {"command": "python -m benchmarks.x", "commit": "0123456789ab", "machine": {"gpu": "H100"}}


def _write(folder: Path, name: str, **content: object) -> None:
    (folder / name).write_text(json.dumps({**_HEAD, **content}), encoding="utf-8")


def _loss_on_a_gpu(folder: Path) -> None:
    fast = {"pairs": 32768, "method": "fused-bf16", "median_seconds": 0.0065, "spread": 0.01}
    slow = {"pairs": 32768, "method": "strong", "median_seconds": 0.052, "spread": 0.02}
    _write(
        folder,
        "loss-gpu.json",
        relative_errors_against_float64={"4096": {"fused-bf16": {"gradient": 4e-4}}},
        results=[
            {**fast, "time_over": {"strong": 0.125}},
            {**slow, "time_over": {"strong": 1.0}},
            {"pairs": 32768, "method": "dense", "out_of_memory": True},
        ],
        another_problem={"what": "two sets", "results": []},
    )


def test_what_runs_out_of_memory_says_so(tmp_path: Path) -> None:
    _loss_on_a_gpu(tmp_path)
    cells = _cells(page(tmp_path))
    assert cells[0] == ["pairs", "method", "median s", "spread", "over strong", ""]
    assert cells[2] == ["32768", "fused-bf16", "0.0065", "0.01", "0.125", ""]
    assert cells[4] == ["32768", "dense", "", "", "", "out of memory"]
    assert bars(tmp_path) == [("loss of 32768 pairs, GPU: strong", pytest.approx(8.0))]


def test_each_network_of_the_steps_has_a_file(tmp_path: Path) -> None:
    for model, rate in (("r50-1x", 3000.0), ("r152-3x-sk", 210.0)):
        methods = {
            "ours": {"precision": "bf16", "images_per_second": rate},
            "strong": {"precision": "bf16", "images_per_second": rate / 2},
            "solo": {"precision": "fp16", "out_of_memory": True},
        }
        case = {"model": model, "batch": 64, "size": 224, "methods": methods}
        case["ratios"] = {"ours_over_strong": 2.0}
        _write(tmp_path, f"step-{model}-gpu.json", cases=[case])
    text = page(tmp_path)
    assert text.count("## Whole training steps") == 1
    assert text.index("### step-r152-3x-sk-gpu.json") < text.index("### step-r50-1x-gpu.json")
    assert "| r50-1x | 64 | 224 | strong | bf16 | 1500.0 | 2.0 |  |" in text
    assert "| r50-1x | 64 | 224 | solo | fp16 |  |  | out of memory |" in text
    assert bars(tmp_path) == [
        ("step of r152-3x-sk, GPU: strong", pytest.approx(2.0)),
        ("step of r50-1x, GPU: strong", pytest.approx(2.0)),
    ]


def test_files_of_the_other_kernels(tmp_path: Path) -> None:
    row = {"method": "fused", "median_milliseconds": 0.5}
    other = {"method": "lightly", "median_milliseconds": 6.0}
    _write(
        tmp_path,
        "optimizer-gpu.json",
        settings={"model": "r50-1x", "device": "cuda"},
        largest_errors_against_float64={"fused": 1e-6, "lightly": 2e-6},
        results=[{"threads": 1, "methods": [row, other]}],
    )
    both = {"forward": {"median_ms": 1.0}, "backward": {"median_ms": 2.0}}
    _write(
        tmp_path,
        "norm_act-gpu.json",
        network_milliseconds={
            "fused": {"forward": 1.0, "backward": 2.0},
            "eager": {"forward": 2.5, "backward": 3.5},
        },
        layers=[{"layer": "stem", "count": 1, "passes": {}, "methods": {"fused": both}}],
    )
    sides = [{"network": "R50 1x SK", "features": 64, "side": side} for side in (56, 28)]
    _write(
        tmp_path,
        "select-gpu.json",
        results=[
            {**layer, "way": way, "median_ms": ms}
            for layer in sides
            for way, ms in (("eager", 4.5), ("fused", 1.5))
        ],
    )
    text = page(tmp_path)
    assert "| r50-1x | fused | 0.5 | 1e-06 |" in text
    assert "| eager | 2.5 | 3.5 |" in text
    assert "| stem | 1 | 1.0 | 2.0 |" in text
    assert "| R50 1x SK | 64 | 28 | fused | 1.5 |" in text
    assert bars(tmp_path) == [
        ("LARS of r50-1x, GPU: lightly", pytest.approx(12.0)),
        ("batch norm, GPU: eager", pytest.approx(2.0)),
        ("selective kernels of R50 1x SK, GPU: eager", pytest.approx(3.0)),
    ]


def test_a_file_that_was_cut_says_so_and_is_not_added_up(tmp_path: Path) -> None:
    cut = {"measured": 1, "of": 8, "what": "layers"}
    both = {"forward": {"median_ms": 1.0}, "backward": {"median_ms": 2.0}}
    stem = {"layer": "stem", "count": 1, "passes": {}, "methods": {"fused": both}}
    last = {"layer": "last", "count": 3, "passes": {"sums": {"fraction_of_copy": 0.75}}}
    _write(tmp_path, "norm_act-gpu.json", cut=cut, layers=[stem, last])
    rows = [
        {"network": "R50 1x SK", "features": 64, "side": 56, "way": way, "median_ms": 1.5}
        for way in ("eager", "fused")
    ]
    _write(tmp_path, "select-gpu.json", cut=cut, results=rows)
    text = page(tmp_path)
    assert text.count("* Stopped after 1 of 8 layers.") == 2
    assert "| stem | 1 |  | 1.0 | 2.0 |" in text
    assert "| last | 3 | 0.75 |  |  |" in text
    assert "| R50 1x SK | 64 | 56 | fused | 1.5 |" in text
    assert bars(tmp_path) == []

"""The page of targets: fresh, every figure from a file, and verdicts that follow from figures."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import predictions as predicted, render
from benchmarks.gpu_check import CHECK
from benchmarks.markdown import number
from benchmarks.performance import PAGE, TARGETS, page, plot, results_in, shares
from benchmarks.render import RESULTS
from benchmarks.targets import CPU, GPU, Figure, Target, at_least, at_most, is_close, verdict
from bigsimclr.augment.device import crop_resize

RESULTS_NOW = results_in(RESULTS)
LONGEST = 1100  # words outside of tables: five minutes


def _lines(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def _line(text: str, beginning: str) -> list[str]:
    return next(cells for cells in _lines(text) if cells[0] == beginning)


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(RESULTS), "run `make bench-docs`"


def test_plot_is_fresh() -> None:
    # Versions of matplotlib draw other lines, but they write the same words.
    text = PAGE.with_suffix(".svg").read_text(encoding="utf-8")
    for bar in shares(RESULTS):
        assert f">{bar.label}</text>" in text, "run `make bench-docs`"
        if bar.measured is not None:
            assert f">{bar.measured:.2f}</text>" in text, "run `make bench-docs`"
    assert text.count("</text>") == plot(RESULTS).count("</text>")


def test_equal_files_give_an_equal_page_and_plot(tmp_path: Path) -> None:
    for file in sorted(RESULTS.glob("*.json"), reverse=True):
        shutil.copy(file, tmp_path)
    assert page(tmp_path) == page(RESULTS)
    assert plot(tmp_path) == plot(RESULTS)


def test_page_is_short() -> None:
    words = [line for line in page(RESULTS).splitlines() if not line.startswith("|")]
    assert len(" ".join(words).split()) < LONGEST


def test_every_link_leads_to_a_heading_of_the_tables() -> None:
    text, tables = page(RESULTS), render.page(RESULTS)
    anchors = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", tables, re.MULTILINE)
    }
    linked = re.findall(r"\(benchmarks\.md#([^)]*)\)", text)
    assert linked
    assert set(linked) <= anchors


def test_every_figure_has_machine_commit_and_command() -> None:
    text, results = page(RESULTS), results_in(RESULTS)
    files = {name for target in TARGETS if (f := target.find(results)) for name in f.files}
    assert files >= {"loss", "optimizer", "step", "loader"}
    sources = {cells[0].partition("]")[0].lstrip("["): cells for cells in _lines(text)}
    for name in files:
        machine, _, commit, command = sources[f"{name}.json"][1:]
        assert machine
        assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", commit)
        assert command == f"`{results[name]['command']}`"


# --- what a CPU has measured -----------------------------------------------------------------


def _loss_of_one_thread(method: str, key: str) -> float:
    rows = _result("loss")["results"]
    (value,) = (
        row[key]
        for row in rows
        if (row["pairs"], row["threads"], row["method"]) == (4096, 1, method)
    )
    return value


def test_figures_of_a_cpu_are_those_of_the_files() -> None:
    lars = {row["method"]: row for row in _result("optimizer")["results"][0]["methods"]}
    (turbo,) = (
        row["over_torch_and_pil"]
        for row in _result("loader")["results"]
        if (row["decoder"], row["source"], row["workers"]) == ("turbo", "folder", 2)
    )
    expected = [
        _loss_of_one_thread("lightly", "median_seconds")
        / _loss_of_one_thread("chunked", "median_seconds"),
        _loss_of_one_thread("lightly", "peak_megabytes")
        / _loss_of_one_thread("chunked", "peak_megabytes"),
        lars["lightly"]["median_milliseconds"] / lars["plain"]["median_milliseconds"],
        _result("step")["cases"][0]["ratios"]["ours_over_strong"],
        turbo,
        _result("loader")["training"]["speed_with_over_without"],
    ]
    text = page(RESULTS)
    for target, value in zip(CPU, expected, strict=True):
        figure = target.find(results_in(RESULTS))
        assert figure is not None
        assert figure.value == pytest.approx(value, rel=1e-12)
        assert _line(text, target.what)[2] == f"{number(value)}{target.goal.unit}"


def test_a_miss_says_by_how_much_and_why() -> None:
    text, results = page(RESULTS), results_in(RESULTS)
    for target in CPU:
        figure = target.find(results)
        assert figure is not None
        said = _line(text, target.what)[3]
        if figure.value < target.goal.value:
            assert said.startswith(f"missed by {1 - figure.value / target.goal.value:.0%}")
            assert f"*{target.what}:*" in text
        else:
            assert said.startswith("reached")


def test_what_is_said_of_lars_on_a_cpu_holds() -> None:
    found = _result("optimizer")
    one_thread = found["results"][0]
    (theirs,) = (row for row in one_thread["methods"] if row["method"] == "lightly")
    copied = 28 * found["parameters"] / one_thread["copied_gigabytes_per_second"] / 1e6
    bound = theirs["median_milliseconds"] / copied
    (words,) = (target.why(RESULTS_NOW) for target in CPU if target.part == "optimizer")
    (said,) = re.findall(r"an update is ([\d.]+) times", words)
    assert one_thread["threads"] == 1
    assert float(said) == pytest.approx(bound, rel=0.01)
    assert bound < 2


# --- verdicts --------------------------------------------------------------------------------


def _target(goal: Any) -> Target:
    return Target("loss", "something", goal, lambda _: None)


@pytest.mark.parametrize(
    ("goal", "value", "expected"),
    [
        (at_least(2.0), 2.0, "reached"),
        (at_least(2.0), 1.99, "missed"),
        (at_most(2.0), 2.0, "reached"),
        (at_most(2.0), 2.01, "missed"),
        (at_most(2.0), math.inf, "missed"),
        (at_least(2.0), 0.0, "missed"),
    ],
)
def test_verdicts(goal: Any, value: float, expected: str) -> None:
    assert verdict(_target(goal), Figure(value, ("loss",))) == expected
    assert verdict(_target(goal), None) == "not measured"


def test_close_is_nearer_to_the_target_than_rounds_to_each_other() -> None:
    figure = Figure(1.05, ("loss",), spread=0.06)
    assert is_close(_target(at_least(1.0)), figure)
    assert not is_close(_target(at_least(1.0)), replace(figure, spread=0.04))


def test_numbers_have_three_digits_and_all_before_the_point() -> None:
    found = [number(value) for value in (0.9944, 9.137, 42.51, 99.96, 3786.4)]
    assert found == ["0.994", "9.14", "42.5", "100", "3,786"]


# --- predictions -----------------------------------------------------------------------------


def _predicted(predict: predicted.Predict) -> predicted.Prediction:
    found = predict(RESULTS_NOW)
    assert found is not None
    return found


def test_loss_is_at_least_its_products() -> None:
    # 2 D for a logit; half of 8192^2 of them, again all of them, and as much for the gradient.
    flops = 2 * 128 * (0.5 + 1 + 1) * 8192**2
    assert predicted.loss_floor(RESULTS_NOW, 8192) == pytest.approx(flops / 798e12)
    found = _predicted(predicted.loss_time(8192, unit=1e-6))
    assert found.low == pytest.approx(1e6 * flops / 477e12)
    assert found.high == pytest.approx(1e6 * flops / 389e12)


def test_parameters_are_those_of_a_model_with_its_head() -> None:
    count = _result("optimizer")["parameters"]  # of the network that was updated
    assert predicted.parameters(RESULTS_NOW, "r50-1x") == count
    assert _predicted(predicted.lars_time("r50-1x")).low == pytest.approx(count * 28 / 3e9)


def test_the_plain_crop_multiplies_as_much_as_predicted() -> None:
    pixels = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
    boxes = np.broadcast_to(np.array([0, 0, 224, 224], dtype=np.int32), (2, 2, 4))
    with FlopCounterMode(display=False) as counter:
        crop_resize(pixels, boxes, (224, 224), "tf2")
    views = 4
    assert predicted.dense_crop_seconds() == counter.get_total_flops() / views / 67e12


def test_a_view_takes_the_bytes_of_its_kernels() -> None:
    values = 3 * 224 * 224
    crop = values / 2 + 4 * values  # bytes of an image for two views, float32 of each
    colours = 1.8 * 4 * values + (4 + 2) / 2 * values  # read; float32 if blurred, else bf16
    blur = (4 + 4 + 4 + 2) / 2 * values
    assert predicted.crop_seconds(RESULTS_NOW) == pytest.approx(crop / 3e12)
    found = _predicted(predicted.views_time)
    assert found.low == found.high == pytest.approx(1e6 * (crop + colours + blur) / 3e12)
    assert predicted.crop_seconds(RESULTS_NOW) < predicted.dense_crop_seconds() / 8


def test_floors_are_those_of_the_counted_networks() -> None:
    text = page(RESULTS)
    networks = _result("roofline")["networks"]
    assert len(networks) == 13
    for row in networks:
        cells = _line(text, row["network"])
        tiers = row["tiers"].values()
        rates = [str(round(tier["op_roofline_images_per_second"])) for tier in tiers]
        assert cells[5:9] == rates
        assert cells[1] == str(round(row["training_gflop_per_view"], 1))


# --- files as a GPU leaves them --------------------------------------------------------------


def _with(folder: Path, **files: dict[str, object]) -> Path:
    """Copy what is counted, and add results of a GPU."""
    shutil.copy(RESULTS / "roofline.json", folder)
    for name, content in files.items():
        head = {"command": f"python -m benchmarks.{name}", "commit": "0123456789ab"}
        machine = {"cpu": "some", "cores": 16, "torch": "2.11", "gpu": "NVIDIA H100 80GB HBM3"}
        file = folder / f"{name.replace('_', '-').replace('norm-act', 'norm_act')}.json"
        file.write_text(json.dumps({**head, "machine": machine, **content}), encoding="utf-8")
    return folder


def _loss(pairs: int, method: str, seconds: float, size: float) -> dict[str, object]:
    row = {"pairs": pairs, "method": method, "median_seconds": seconds}
    return {**row, "spread": 0.01, "peak_megabytes": size}


def _case(model: str, batch: int, ours: dict[str, object], **others: float) -> dict[str, object]:
    rows = {
        name: {"precision": "bf16", "images_per_second": 1000.0, "spread": 0.02} for name in others
    }
    ratios = {f"ours_over_{name}": ratio for name, ratio in others.items()}
    methods = {"ours": {"precision": "bf16", "spread": 0.01, **ours}, **rows}
    case = {"model": model, "batch": batch, "size": 224, "methods": methods, "ratios": ratios}
    return {"device": "cuda", "cases": [case]}


def _lars(method: str, milliseconds: float) -> dict[str, object]:
    quartiles = [milliseconds, milliseconds]
    return {
        "method": method,
        "median_milliseconds": milliseconds,
        "quartiles_milliseconds": quartiles,
    }


def _everything(folder: Path) -> Path:
    wide = {"bytes": 8e9, "copy_gigabytes_per_second": 2000.0}
    layer = {"count": 2, "passes": {"apply": {**wide, "median_ms": 5.0}}}
    views = {"method": "fused bf16", "median_microseconds_per_view": 3.5, "spread": 0.05}
    big = {"images_per_second": 230.0, "peak_bytes": 65 * 10**9}
    selective = {"images_per_second": 220.0, "peak_bytes": 75 * 10**9}
    return _with(
        folder,
        loss_gpu={
            "results": [
                _loss(4096, "fused-bf16", 115e-6, 11.0),
                _loss(4096, "lightly", 2.3e-3, 1100.0),
                _loss(32768, "fused-bf16", 7.15e-3, 60.0),
            ]
        },
        norm_act_gpu={"layers": [layer]},
        optimizer_gpu={
            "results": [{"threads": 1, "methods": [_lars("fused", 0.5), _lars("lightly", 9.0)]}]
        },
        augment_gpu={"results": [views]},
        step_r50_1x_gpu=_case(
            "r50-1x",
            256,
            {"images_per_second": 3028.8, "peak_bytes": 30 * 10**9},
            lightly=2.5,
            strong=1.2,
        ),
        step_r152_3x_sk_gpu=_case("r152-3x-sk", 64, big, strong=1.3),
        step_selective_gpu=_case("r152-3x-sk", 128, selective),
    )


def test_every_target_of_a_gpu_has_a_finder_that_finds(tmp_path: Path) -> None:
    results = results_in(_everything(tmp_path))
    values = [115, 20, 7.15, 60, 80, 0.5, 3.5, 2.5, 1.2, 3028.8, 1.3, 230, 65, 75, 230 / 220]
    for target, value in zip(GPU, values, strict=True):
        figure = target.find(results)
        assert figure is not None, target.what
        assert figure.value == pytest.approx(value), target.what


def test_finders_look_into_files_that_gpu_check_writes(tmp_path: Path) -> None:
    written = {Path(word).stem for step in CHECK for word in step.words if word.endswith(".json")}
    results = results_in(_everything(tmp_path))
    files = {name for target in GPU if (f := target.find(results)) for name in f.files}
    assert files <= written


def test_page_of_a_gpu_compares_with_prediction_and_floor(tmp_path: Path) -> None:
    text = page(_everything(tmp_path))
    line = _line(text, "NT-Xent of 65,536 views")
    assert line[2:4] == ["5.76 to 7.07 ms", "7.15 ms"]
    assert line[4] == "missed by 10%"
    assert "measured 7.15 ms, 1% above." in text
    assert "measured 0.5 ms, 60% of the limit." in text
    assert "measured 115 us, 4% above." in text
    assert "*A view of 224 px:* why is not known yet." in text
    cells = _line(text, "r50-1x")
    assert cells[-2] == "3029"
    assert cells[-1].startswith("79% ([step-r50-1x-gpu.json](benchmarks.md#step-r50-1x-gpujson)")
    assert "NVIDIA H100 80GB HBM3, some, 16 cores" in text


def test_a_profile_says_why_a_step_misses(tmp_path: Path) -> None:
    def profile(convolution: float, normalisation: float) -> dict[str, object]:
        busy = convolution + normalisation + 0.1
        kinds = {"normalisation": normalisation, "convolution": convolution, "loss": 0.1}
        classes = {
            kind: {"microseconds": 1e3 * taken, "share": taken / busy}
            for kind, taken in kinds.items()
        }
        return {"busy_milliseconds": busy, "classes": classes}

    content = _case("r50-1x", 256, {"images_per_second": 2560.0}, strong=1.1, lightly=2.5)
    (case,) = content["cases"]  # type: ignore[misc]
    case["methods"]["ours"]["profile"] = profile(50.0, 36.4)
    case["methods"]["strong"]["profile"] = profile(52.0, 60.0)
    text = " ".join(page(_with(tmp_path, step_r50_1x_gpu=content)).split())
    ours = "ours takes 100 ms a step, the GPU works 86.5 (convolution 50, normalisation 36.4)"
    theirs = "strong takes 256 ms a step, the GPU works 112 (normalisation 60, convolution 52)"
    assert f"*R50-1x, 256 images: speed over the strong baseline's:* {ours}; {theirs}." in text
    assert f"*R50-1x, 256 images:* {ours}." in text
    assert "lightly takes" not in text


def test_what_runs_out_of_memory_is_missed(tmp_path: Path) -> None:
    ours: dict[str, object] = {"out_of_memory": True}
    text = page(_with(tmp_path, step_selective_gpu=_case("r152-3x-sk", 128, ours)))
    line = _line(text, "R152-3x SK, 128 images, selective recompute: memory")
    assert line[3:5] == ["out of memory", "missed"]


@pytest.mark.parametrize("change", [{"device": "cpu"}, {"gpu": "NVIDIA H200"}])
def test_floors_of_an_h100_are_compared_with_an_h100(
    tmp_path: Path, change: dict[str, str]
) -> None:
    content = _case("r50-1x", 256, {"images_per_second": 9999.0})
    _with(tmp_path, step_other={**content, "machine": change})
    assert "of fused" not in page(tmp_path)


@pytest.mark.parametrize("kept", [(), ("loss",)])
def test_without_results_nothing_is_measured(tmp_path: Path, kept: tuple[str, ...]) -> None:
    _with(tmp_path)
    for name in kept:
        shutil.copy(RESULTS / f"{name}.json", tmp_path)
    text, results = page(tmp_path), results_in(tmp_path)
    missing = sum(target.find(results) is None for target in TARGETS)
    assert missing == len(TARGETS) - 2 * len(kept)
    assert f"{missing} not measured yet." in text

"""What benchmarks.norm_act writes: after every layer, and not as if it were all."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import norm_act
from benchmarks.norm_act import LAYERS, measure, totals_of
from benchmarks.result_file import ResultFile
from benchmarks.tables import norm_act_times
from benchmarks.targets import share_of_copy

PASSES = {
    "statistics": {
        "median_ms": 0.5,
        "bytes": 10**9,
        "copy_gigabytes_per_second": 4000.0,
        "fraction_of_copy": 0.5,
    }
}


def run(file: Path, monkeypatch: pytest.MonkeyPatch, *, compiled: int, passed: int = 99) -> Any:
    """Measure until a pass or a method of a layer stops the run, and return the file."""
    counts = {"passes": 0, "methods": 0}

    def time_passes(*_args: object, **_way: object) -> object:
        counts["passes"] += 1
        if counts["passes"] > passed:
            raise KeyboardInterrupt
        return PASSES

    def time_methods(*_args: object, **_way: object) -> object:
        counts["methods"] += 1
        if counts["methods"] > compiled:
            raise KeyboardInterrupt
        return {"fused": {way: {"median_ms": 0.25} for way in ("forward", "backward")}}

    monkeypatch.setattr(norm_act, "Clock", object)
    monkeypatch.setattr(norm_act, "errors", lambda *_: {"fused": 1e-3, "eager": 1e-3})
    monkeypatch.setattr(norm_act, "time_passes", time_passes)
    monkeypatch.setattr(norm_act, "time_methods", time_methods)
    where = ResultFile(file, {"command": "python -m benchmarks.norm_act"}, "layers")
    with suppress(KeyboardInterrupt):
        measure(where, views=2, dtype=torch.bfloat16, rounds=1)
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_whole_run_adds_up_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tmp_path / "norm_act.json", monkeypatch, compiled=99)
    assert "cut" not in result
    assert result["network_milliseconds"] == {"fused": {"forward": 13.25, "backward": 13.25}}
    assert norm_act_times(result) == {"batch norm": {"fused": 26.5}}
    assert sum(layer.count for layer in LAYERS) == 53
    assert totals_of(result["layers"][:2]) == {"fused": {"forward": 1.75, "backward": 1.75}}


def test_a_run_that_is_stopped_keeps_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(tmp_path / "norm_act.json", monkeypatch, compiled=3)
    assert result["cut"] == {"measured": 3, "of": 16, "what": "layers"}
    assert ["methods" in row for row in result["layers"]] == [True] * 3 + [False] * 13
    assert norm_act_times(result) == {}
    figure = share_of_copy("a")({"a": result})  # the passes are of all layers
    assert figure is not None
    assert figure.value == pytest.approx(50.0)


def test_passes_of_some_layers_are_not_those_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(tmp_path / "norm_act.json", monkeypatch, compiled=99, passed=5)
    assert len(result["layers"]) == 5
    assert result["cut"]["measured"] == 0
    assert share_of_copy("a")({"a": result}) is None

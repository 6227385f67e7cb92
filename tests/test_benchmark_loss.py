"""What benchmarks.loss compares: all compute the same, and ratios are of the right things."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import loss
from benchmarks.loss import errors, forward_backward, inputs, over, rows_of
from benchmarks.loss_methods import (
    APART,
    _strong as strong,
    build,
    names,
    reference,
    runs,
    tile_wise,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("pairs", [5, 60])
def test_methods_agree_with_float64(pairs: int) -> None:
    found = errors(
        {name: build(name, CPU) for name in ("dense", "chunked", "solo", APART)}, pairs, CPU
    )
    assert max(max(error.values()) for error in found.values()) < 5e-6


def test_the_strong_baseline_computes_the_loss() -> None:
    found = errors({"strong": strong}, 60, CPU)["strong"]
    assert found["value"] < 5e-3
    assert found["gradient"] < 2e-2


def test_another_loss_is_refused() -> None:
    with pytest.raises(AssertionError, match="solo computes something else"):
        errors({"solo": lambda first, second: 0.5 * build("solo", CPU)(first, second)}, 9, CPU)


@pytest.mark.parametrize("side", [1, 7, 100])
def test_tiles_of_any_side_give_the_loss_of_two_sets(side: int) -> None:
    both = [view.detach().double().requires_grad_() for view in inputs(10, CPU)]
    found = forward_backward(lambda *views: tile_wise(*views, side=side), *both)
    for one, other in zip(found, forward_backward(reference(APART), *both), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_cubic_method_runs_for_few_pairs_only() -> None:
    assert runs("metric-learning", 256)
    assert not runs("metric-learning", 512)
    assert runs("dense", 10**6)


def test_methods_of_a_gpu_are_no_methods_of_a_cpu() -> None:
    assert not {"fused-bf16", "fused-fp32", "strong"} & set(names(CPU))
    assert {"fused-bf16", "fused-fp32", "strong"} < set(names(torch.device("cuda")))


def test_rows_compare_with_each_peer_that_ran() -> None:
    seconds = {"chunked": [1.0, 2.0, 4.0], "solo": [8.0, 8.0, 8.0]}
    peaks = {"chunked": 3.0, "lightly": None, "solo": 12.0}
    ours, lost, solo = rows_of({"pairs": 7}, peaks, seconds)
    assert lost == {"pairs": 7, "method": "lightly", "out_of_memory": True}
    assert (ours["median_seconds"], ours["min_seconds"], ours["spread"]) == (2.0, 1.0, 1.5)
    assert ours["time_over"] == {"solo": 0.25}
    assert ours["min_time_over"] == {"solo": 0.125}
    assert ours["memory_over"] == {"solo": 0.25}
    assert solo["time_over"] == {"solo": 1.0}
    assert over({"a": 1.0, "strong": 3.0}, "a") == {"strong": 0.3333}


def test_a_run_that_is_stopped_keeps_its_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(_losses: object, pairs: int, _device: object, **_way: object) -> object:
        if pairs > 50:
            raise KeyboardInterrupt
        return [{"pairs": pairs, "method": method} for method in ("dense", APART)]

    monkeypatch.setattr(loss, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "loss.json"
    words = ["loss", "--pairs", "5", "50", "60", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(KeyboardInterrupt):
        loss.main()
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["cut"] == {"measured": 2, "of": 3, "what": "sizes"}
    assert [row["pairs"] for row in result["results"]] == [5, 50]
    assert [row["method"] for row in result["another_problem"]["results"]] == [APART] * 2
    monkeypatch.setattr(sys, "argv", [*words[:4], *words[5:]])
    loss.main()
    assert "cut" not in json.loads(output.read_text(encoding="utf-8"))

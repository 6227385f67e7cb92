"""A first look at a GPU: figures by target, which the page takes where nothing better is there."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import glance
from benchmarks.performance import page
from benchmarks.render import RESULTS
from benchmarks.targets import GPU, Figure, glanced

OTHERS = {"NT-Xent of 8,192 views: memory", "R50-1x, 256 images, in a CUDA graph"}


def row(what: str, median: float) -> dict[str, object]:
    return {
        "what": what,
        "unit": "us",
        "median": median,
        "least": 0.9 * median,
        "most": 1.1 * median,
        "busy_microseconds": 100.0,
        "kernels": {"slope": 60.0, "void at::native::vectorized_elementwise_kernel": 3.0},
        "commit": "",
    }


def test_a_figure_is_the_median_of_its_rounds() -> None:
    found = glance.figure("NT-Xent of 8,192 views", "us", [130.0, 120.0, 140.0])
    assert (found.median, found.least, found.most) == (130.0, 120.0, 140.0)
    assert found.kernels == {}


def test_the_page_takes_it_where_the_part_has_no_result(tmp_path: Path) -> None:
    for file in RESULTS.glob("*.json"):
        if not file.name.endswith("-gpu.json"):
            (tmp_path / file.name).write_text(file.read_text())
    facts = {"command": "look", "commit": "0123456789ab", "machine": {"gpu": "NVIDIA H100"}}
    figures = [row("NT-Xent of 8,192 views", 132.0)]
    (tmp_path / "glance-gpu.json").write_text(json.dumps({**facts, "figures": figures}))
    text = page(tmp_path)
    assert (
        "| NT-Xent of 8,192 views | ≤ 120 us | 90 to 110 us | 132 us | missed by 10%, close" in text
    )
    assert "the GPU works 100 us for all of it: slope 60, others 40." in text


def test_a_figure_of_nothing_is_none() -> None:
    assert glanced({}, "NT-Xent of 8,192 views") is None
    results = {"glance-gpu": {"figures": [row("a", 10.0)]}}
    assert glanced(results, "a") == Figure(10.0, ("glance-gpu",), pytest.approx(0.2))
    assert glanced(results, "b") is None


def test_all_figures_have_a_target() -> None:
    named = {target.what for target in GPU} | OTHERS
    found = json.loads((RESULTS / "glance-gpu.json").read_text())["figures"]
    assert {one["what"] for one in found} <= named


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["glance"])
    with pytest.raises(SystemExit) as stopped:
        glance.main()
    assert stopped.value.code == 2
    assert "there is none here" in capsys.readouterr().err


@pytest.mark.gpu
def test_an_update_is_measured_and_profiled() -> None:
    (found,) = glance.of_update(torch.device("cuda"))
    assert 0 < found.least <= found.median <= found.most
    assert {"square", "scale", "move"} <= set(found.kernels)

"""What benchmarks.sweep compares and chooses; its candidates compute what the chosen ones do."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.capture import captured
from benchmarks.norm_act import Clock
from benchmarks.sweep import (
    CASES,
    SHARED_BYTES,
    Case,
    Found,
    compare,
    described,
    difference,
    measure,
    over_chosen,
    time_size,
    unfit,
)
from bigsimclr.kernels import (
    distort,
    lars,
    max_pool,
    norm_act,
    norm_gradients,
    norm_statistics,
    nt_xent,
    select,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = {
    "nt_xent sums": (150,),
    "nt_xent slope": (150,),
    "norm_act": (3, 70, 9, True),
    "select": (3, 70, 7),
    "max_pool": (1, 20, 9),
    "lars": ("r10-0.0625x-cifar",),
    "distort": (2, 32),
}
CHOSEN = {
    "measure": norm_statistics.MEASURE,
    "apply": norm_act.APPLY,
    "reduce": norm_gradients.REDUCE,
    "differentiate": norm_gradients.DIFFERENTIATE,
    "pool": select.POOL,
    "mix": select.MIX,
    "mix_backward": select.MIX_BACKWARD,
    "pool_backward": select.POOL_BACKWARD,
    "forward": max_pool.FORWARD,
    "backward": max_pool.BACKWARD,
    "with bf16 copies": lars.TILES,
    "colours": distort.TILES,
    "blur": distort.TILES,
}
NAMES = [case.name for case in CASES]


def case_of(name: str) -> Case:
    return CASES[NAMES.index(name)]


def tiny(case: Case) -> Case:
    return replace(case, sizes={"tiny": TINY[case.kernel]})


def nothing_known(case: Case) -> list[Found]:
    return [Found(32, 0, 0) for _ in case.candidates]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_candidate_is_what_is_chosen(name: str) -> None:
    case = case_of(name)
    facts = [tuple(candidate.facts.values()) for candidate in case.candidates]
    assert len(facts) == len(set(facts)) > 3
    first = case.candidates[0].tiles
    if case.mode in CHOSEN:
        assert first == CHOSEN[case.mode]
        return
    assert first == nt_xent.cut_of(128, split=case.mode == "fp32", hopper=True)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the sweep itself compares them on a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_candidates_compute_the_same(name: str) -> None:
    case = tiny(case_of(name))
    found = nothing_known(case)
    compare(case, found, "tiny", DEVICE)
    assert not any(one.dropped for one in found), found
    assert all(one.difference is not None and one.difference < 2e-5 for one in found)


def test_a_candidate_that_computes_something_else_is_dropped() -> None:
    results = iter([1.0, 1.0, 1.5, float("nan")])
    case = case_of("norm_act, apply")
    case = replace(
        case,
        candidates=case.candidates[:3],
        prepare=lambda _device: lambda _tiles: lambda: (torch.tensor([next(results), 2.0]),),
        sizes={"one": ()},
    )
    found = nothing_known(case)
    compare(case, found, "one", DEVICE)
    assert [one.dropped for one in found] == [
        "",
        "differs by 2.5e-01 at one",
        "differs by inf at one",
    ]


def test_a_difference_is_relative_to_the_largest_value() -> None:
    one = torch.tensor([1.0, -4.0])
    assert difference([one, one], [one, torch.tensor([1.5, -4.0])]) == 0.125
    assert difference([torch.zeros(3)], [torch.zeros(3)]) == 0.0
    assert difference([torch.empty(0)], [torch.empty(0)]) == 0.0


def test_a_case_that_fails_does_not_end_the_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    def prepare(device: torch.device) -> object:
        raise torch.OutOfMemoryError(f"no room on {device}\nand more")

    case = replace(case_of("norm_act, apply"), prepare=prepare, sizes={"one": ()})
    clock = Clock.__new__(Clock)  # its memory is a GPU's
    trouble = measure(case, nothing_known(case), clock, rounds=2)
    assert trouble == "OutOfMemoryError: no room on cuda"
    assert capsys.readouterr().out == f"norm_act, apply: {trouble}\n"


def test_the_fastest_over_all_sizes_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    case = case_of("lars, with bf16 copies")
    case = replace(case, candidates=case.candidates[:4])
    found = nothing_known(case)
    times = [(2.0, 8.0), (3.0, 4.0), (1.0, 7.0), (0.1, 0.1)]
    for one, (small, large) in zip(found, times, strict=True):
        one.milliseconds = {"small": [small] * 3, "large": [large] * 3}
    found[3].dropped = "spills registers"
    assert over_chosen(found) == [1.0, 1.0, 0.6875, None]
    entry = described(case, found)
    assert entry["chosen"] == case.candidates[0].facts
    assert entry["fastest"] == case.candidates[2].facts
    assert entry["fastest_over_chosen"] == 0.6875
    assert "spills registers" in capsys.readouterr().out


def test_without_a_gpu_there_is_no_fastest() -> None:
    case = case_of("select, mix")
    entry = described(case, nothing_known(case))
    assert entry["fastest"] is entry["fastest_over_chosen"] is None
    assert all(row["milliseconds"] is row["dropped"] is None for row in entry["candidates"])


def test_what_cannot_run_well_is_dropped() -> None:
    assert unfit(Found(255, 0, SHARED_BYTES)) == ""
    assert unfit(Found(255, 8, 0)) == "spills registers"
    assert unfit(Found(64, 0, SHARED_BYTES + 1)) == "needs more shared memory than there is"


@pytest.mark.slow
def test_candidates_are_built_without_a_gpu(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.sweep", "--only", "slope, fp32"]
    output = tmp_path / "sweep.json"
    subprocess.run([*command, "-o", str(output)], env=environment, check=True, capture_output=True)
    (case,) = json.loads(output.read_text())["cases"]
    rows = case["candidates"]
    assert len({row["registers"] for row in rows}) > 1
    assert all(0 < row["registers"] <= 255 and row["shared_bytes"] > 0 for row in rows)
    for row in rows:
        built = Found(row["registers"], row["spilled_bytes"], row["shared_bytes"])
        assert row["dropped"] == (unfit(built) or None)
    assert rows[0]["spilled_bytes"] == 0  # the chosen one's


@pytest.mark.gpu
def test_candidates_are_timed_on_a_gpu() -> None:
    case = tiny(case_of("norm_act, apply"))
    case = replace(case, candidates=case.candidates[:2])
    found = nothing_known(case)
    compare(case, found, "tiny", DEVICE)
    time_size(case, found, "tiny", Clock(), rounds=3)
    assert all(len(one.milliseconds["tiny"]) == 3 for one in found)
    assert min(min(one.milliseconds["tiny"]) for one in found) > 0


@pytest.mark.gpu
def test_a_captured_update_outlives_what_it_was_made_of() -> None:
    case = tiny(case_of("lars, with bf16 copies"))
    given = case.prepare(DEVICE, *case.sizes["tiny"])
    tiles = [candidate.tiles for candidate in case.candidates[:3]]
    graphs = [captured(given(one)) for one in tiles]  # each capture frees what can be freed
    for graph, one in zip(graphs, tiles, strict=True):
        updated = given(one)()  # weights and momenta, put back before
        expected = [tensor.clone() for tensor in updated]
        given(one)
        graph()
        assert difference(updated, expected) <= case.tolerance

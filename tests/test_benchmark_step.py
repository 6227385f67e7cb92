"""What benchmarks.step compares: the plain network, the peers' formulas, and the race itself."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks import step
from benchmarks.loops import (
    LEARNING_RATE,
    MOMENTUM,
    TEMPERATURE,
    WEIGHT_DECAY,
    Case,
    ForeachLars,
    OurLoop,
    StrongLoop,
    Ways,
    build_loop,
    dense_nt_xent,
    views_of,
)
from benchmarks.networks import network
from benchmarks.peers import Loss, lightly_lars, lightly_loss, solo_lars, solo_loss
from benchmarks.plain_network import compile_blocks, plain_network
from benchmarks.roofline import Ceilings
from benchmarks.step import (
    Entrant,
    cases_of,
    check,
    kept_by_graphs,
    main,
    measure,
    of_op_roofline,
    reference_losses,
)
from bigsimclr.losses.nt_xent import nt_xent, unit_rows
from bigsimclr.models import build_model
from bigsimclr.optim import LARS
from bigsimclr.world import ALONE, use_device

CPU = torch.device("cpu")
PLAIN = Ways("plain", "none", cuda_graph=False)
TINY = Case("r10-0.125x-cifar", batch=6, size=8)
HAS_LIGHTLY = find_spec("lightly") is not None
needs_lightly = pytest.mark.skipif(not HAS_LIGHTLY, reason="lightly is not installed")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("r18-cifar", 8),
        ("r50-0.25x", 65),
        ("r50-0.25x-sk", 65),
        ("r50-0.5x-sk-cifar", 9),
        ("r34-0.25x-sk", 33),
    ],
)
def test_the_plain_network_is_ours(name: str, size: int) -> None:
    model = build_model(network(name), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # scales that start at zero would hide most of a block
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    plain = plain_network(network(name), model.state_dict()).double()
    model = model.double().train()
    images = torch.rand(6, 3, size, size, generator=torch.Generator().manual_seed(2)).double()
    ours, theirs = model(images).projections[-1], plain(images)
    torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    own = dict(model.named_parameters())
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter.grad, own[key].grad, rtol=1e-8, atol=1e-8)
    assert len(own) == len(list(plain.parameters()))


def projections() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(9, 16, generator=generator, dtype=torch.float64)
    return first, first + torch.randn(9, 16, generator=generator, dtype=torch.float64)


def dense_of_unit_rows(first: Tensor, second: Tensor) -> Tensor:
    return dense_nt_xent(unit_rows(first), unit_rows(second))


@pytest.mark.parametrize(
    "make", [lambda: dense_of_unit_rows, lambda: solo_loss(TEMPERATURE)], ids=["strong", "solo"]
)
def test_losses_are_the_official_one(make: Callable[[], Loss]) -> None:
    first, second = projections()
    expected = nt_xent(first, second, temperature=TEMPERATURE)
    torch.testing.assert_close(make()(first, second), expected, rtol=1e-9, atol=0)


@needs_lightly
def test_the_loss_of_lightly_is_the_official_one() -> None:
    first, second = projections()
    expected = nt_xent(first, second, temperature=TEMPERATURE)
    torch.testing.assert_close(lightly_loss(TEMPERATURE)(first, second), expected)


def parameters() -> tuple[list[Parameter], list[Parameter]]:
    generator = torch.Generator().manual_seed(4)
    kernels = [Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 4), (3, 2, 2))]
    others = [Parameter(torch.randn(7, generator=generator))]
    for parameter in (*kernels, *others):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return kernels, others


def by_formula(kernels: list[Parameter], others: list[Parameter]) -> list[Tensor]:
    """Return where two updates by the peers' LARS lead, whose momentum does not hold the rate."""
    found = []
    for parameter in (*kernels, *others):
        assert parameter.grad is not None
        value, gradient = parameter.detach().double(), parameter.grad.double()
        velocity = torch.zeros_like(value)
        for _ in range(2):
            step = gradient
            if parameter.ndim > 1:
                length, slope = value.norm(), gradient.norm()
                ratio = 0.001 * length / (slope + WEIGHT_DECAY * length)
                step = ratio * (gradient + WEIGHT_DECAY * value)
            velocity = MOMENTUM * velocity + step
            value = value - LEARNING_RATE * velocity
        found.append(value.float())
    return found


@pytest.mark.parametrize(
    "make", [solo_lars, pytest.param(lightly_lars, marks=needs_lightly)], ids=["solo", "lightly"]
)
def test_lars_of_the_peers(make: Callable[..., Optimizer]) -> None:
    kernels, others = parameters()
    expected = by_formula(kernels, others)
    optimizer = make(kernels, others, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optimizer.step()
    optimizer.step()
    for parameter, value in zip((*kernels, *others), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_the_strong_baseline_updates_as_we_do() -> None:
    kernels, others = parameters()
    ours, theirs = parameters(), (kernels, others)
    groups = [
        {"params": ours[0], "weight_decay": WEIGHT_DECAY, "adapt": True},
        {"params": ours[1], "weight_decay": 0.0, "adapt": False},
    ]
    own = LARS(groups, learning_rate=LEARNING_RATE, momentum=MOMENTUM)
    strong = ForeachLars(*theirs)
    for _ in range(2):
        gradients = [p.grad for p in (*ours[0], *ours[1]) if p.grad is not None]
        for parameter, gradient in zip((*kernels, *others), gradients, strict=True):
            parameter.grad = gradient.clone()
        own.step()
        strong.step()
    for mine, other in zip((*ours[0], *ours[1]), (*kernels, *others), strict=True):
        torch.testing.assert_close(other, mine)


def options(**changed: object) -> Namespace:
    given: dict[str, object] = {
        "kernels": "plain",
        "memory": "none",
        "cuda_graph": False,
        "compile": "none",
        "profile": False,
        "rounds": 2,
        "steps": 1,
        "model": None,
        "batch": 32,
        "size": None,
    }
    return Namespace(**(given | changed))


def test_a_race_on_a_tiny_network() -> None:
    methods = ("ours", "strong", "solo", *(["lightly"] if HAS_LIGHTLY else []))
    found = measure(TINY, methods, ALONE, options())
    rows = found["methods"]
    assert isinstance(rows, dict)
    assert list(rows) == list(methods)
    for row in rows.values():
        assert len(row["images_per_second_of_rounds"]) == 2
        assert row["images_per_second"] > 0
        assert row["precision"] == "fp32"
    # Their first losses, and those after updates, are one and the same.
    assert rows["strong"]["first_losses"] == pytest.approx(rows["ours"]["first_losses"], rel=1e-4)
    assert all("of_op_roofline" not in row for row in rows.values())
    ratios = found["ratios"]
    assert isinstance(ratios, dict)
    assert set(ratios) == {f"ours_over_{method}" for method in methods[1:]}


def test_what_a_graph_keeps_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 1000, "allocated_size": 10},
        {"segment_pool_id": (0, 3), "total_size": 200, "allocated_size": 50},
        {"segment_pool_id": (0, 3), "total_size": 40, "allocated_size": 40},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert kept_by_graphs(torch.device("cuda")) == 150
    assert kept_by_graphs(CPU) == 0


@pytest.mark.gpu
def test_a_recorded_step_needs_no_less_than_another() -> None:
    case = Case("r50-0.5x", batch=32, size=64)
    world = use_device(ALONE, "cuda")
    peaks = []
    for recorded in (False, True):
        found = measure(case, ["ours", "solo"], world, options(cuda_graph=recorded))["methods"]
        assert isinstance(found, dict)
        peaks.append({method: row["peak_bytes"] for method, row in found.items()})
    # Streams of its own have workspaces of their own.
    assert 0.9 * peaks[0]["ours"] < peaks[1]["ours"] < 2 * peaks[0]["ours"]
    assert peaks[1]["solo"] == pytest.approx(peaks[0]["solo"], rel=0.25)


def test_a_race_that_is_stopped_keeps_its_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raced(case: Case, *_: object, **__: object) -> dict[str, object]:
        if case is not TINY:
            raise KeyboardInterrupt
        return {"model": case.model}

    output = tmp_path / "step.json"
    monkeypatch.setattr(step, "cases_of", lambda *_: (TINY, Case("r18-cifar", 4, 32)))
    monkeypatch.setattr(step, "measure", raced)
    words = ["step", "--device", "cpu", "--methods", "ours", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(KeyboardInterrupt):
        main()
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["cut"] == {"measured": 1, "of": 2, "what": "cases"}
    assert result["cases"] == [{"model": TINY.model}]


def test_the_fraction_of_the_op_roofline() -> None:
    case, ceilings = Case("r50-1x", batch=64, size=224), Ceilings(flops=798e12, bandwidth=3.0e12)
    row = {"precision": "bf16", "images_per_second": 1938.0}
    # 3876 images a second, counted by a program that shares no code with ours.
    assert of_op_roofline(row, case, ceilings) == pytest.approx(0.5, abs=0.02)
    assert of_op_roofline({"out_of_memory": True}, case, ceilings) is None
    raced = measure(TINY, ["ours"], ALONE, options(), ceilings=ceilings)["methods"]
    assert isinstance(raced, dict)
    assert 0 <= raced["ours"]["of_op_roofline"] < 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler looks at gradients of what is no leaf
def test_compiled_blocks_are_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    counters["stats"].clear()
    # Not down to machine code, so that all of the difference would be a mistake of ours.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    architecture = network("r50-0.125x-sk-cifar")
    weights = build_model(architecture, seed=0).state_dict()
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    found = []
    for compiled in (False, True):
        model = plain_network(architecture, weights)
        if compiled:
            compile_blocks(model)
        outputs = model(images)
        outputs.square().sum().backward()
        found.append([outputs.detach(), *(p.grad for p in model.parameters())])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    # Stem, four groups' first and further blocks, the head's layers but the last, and the last.
    assert counters["stats"]["unique_graphs"] == 1 + 2 * 4 + 2


def test_our_loop_trains() -> None:
    views = views_of(TINY, CPU)
    loop = build_loop("ours", TINY, views, ALONE, ways=PLAIN, compiled="none")
    assert isinstance(loop, OurLoop)
    losses = [float(loop.step()) for _ in range(8)]
    assert losses[0] == pytest.approx(reference_losses(TINY, views.channels_last)["one_pass"])
    assert losses[-1] < losses[0]


def test_what_computes_something_else_is_not_timed() -> None:
    views = views_of(TINY, CPU)
    loop = StrongLoop(TINY, views.channels_last, compiled="none")
    expected = {"one_pass": 4.0, "two_passes": 3.0}
    fine: Mapping[str, Entrant] = {
        "ours": Entrant(loop, [4.0001, 3.9], stays=0),
        "strong": Entrant(loop, [4.0, 3.9001], stays=0),
        "solo": Entrant(loop, [3.0, 2.0], stays=0),
    }
    check(fine, expected, CPU)
    for method, losses in {
        "ours": [3.0, 3.9],
        "solo": [4.0, 2.0],
        "strong": [4.0, 3.8],
        "lightly": [float("nan"), 2.0],
    }.items():
        with pytest.raises(ValueError, match="loss of"):
            check({**fine, method: Entrant(loop, losses, stays=0)}, expected, CPU)


def test_cases() -> None:
    assert [case.model for case in cases_of(options(), CPU)] == ["r18-cifar"]
    assert [case.model for case in cases_of(options(), torch.device("cuda"))] == [
        "r50-1x",
        "r152-3x-sk",
    ]
    assert cases_of(options(model="r50-2x-sk"), CPU) == (Case("r50-2x-sk", 32, 224),)
    assert cases_of(options(model="r18-cifar", batch=4), CPU) == (Case("r18-cifar", 4, 32),)

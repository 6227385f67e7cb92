"""Whole training steps side by side: ours, a strong baseline, lightly's and solo-learn's loops.

    pip install --no-deps 'lightly>=1.5.20'
    python -m benchmarks.step -o benchmarks/results/step.json

`benchmarks.loops` says what the four do. Data is synthetic and on the device: two views of each
image, which count as one image in images per second.

Before anything is timed, all make a few steps from the same weights on the same views. Their first
losses must be those of our network in float32, with both views in one forward pass, or, where the
loop makes two, one by one; those of ours and of the strong baseline must stay together.

Time: one process; every round lets every method make some steps, in turns and every other round in
the opposite order, so that a busy moment of the machine meets all of them. The median of the rounds
counts; spread is largest less smallest, over the median. On a GPU the clock waits for the last
step of a turn, and what the others hold rests on the host meanwhile. On a CPU with one thread the
clock is that of the process, which what else the machine does hardly moves.

Memory, on a GPU only: the most that is allocated in a method's turns, without the views; with
--cuda-graph also what the graph keeps for itself, which counts as free. A step before each turn is
in no figure, nor are those before the race, in which libraries try what suits them.

With --profile, on a GPU only: after the race the profiler watches two more steps of every method,
and their time is divided by classes of kernels, as `benchmarks.kernel_classes` tells them by name.
Fractions of the op-roofline, as `benchmarks.roofline` counts it with batch norm, ReLU and sums
fused, are of the two ceilings that this GPU reached before the race.
"""

import argparse
import gc
import importlib.metadata
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

import torch
from torch import Tensor

from benchmarks.kernel_trace import facts, trace
from benchmarks.loops import (
    TEMPERATURE,
    Case,
    Compiling,
    Loop,
    MethodName,
    Views,
    Ways,
    build_loop,
    initial_model,
    precision_of,
    views_of,
)
from benchmarks.machine import machine
from benchmarks.networks import network
from benchmarks.peers import has_lightly
from benchmarks.result_file import ResultFile
from benchmarks.roofline import Ceilings, floors, measure_ceilings
from bigsimclr.kernels import Choice
from bigsimclr.losses.nt_xent import nt_xent
from bigsimclr.models.anatomy import Memory
from bigsimclr.stages.run_directory import environment, source_commit
from bigsimclr.world import ALONE, World, keep_freed_memory, use_device

METHODS: Final[tuple[MethodName, ...]] = get_args(MethodName)
TWO_PASSES: Final = ("lightly", "solo")
CPU_CASES: Final = (Case("r18-cifar", batch=32, size=32),)
GPU_CASES: Final = (Case("r50-1x", batch=256, size=224), Case("r152-3x-sk", batch=64, size=224))
WARM_STEPS: Final = 3
TRACED_STEPS: Final = 2
# Of a loss; 16-bit arithmetic rounds every layer by 1/256 (bf16) or 1/2048 (fp16).
TOLERANCE: Final = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
DRIFT: Final = 10.0  # times the tolerance, after a few updates


def reference_losses(case: Case, views: Tensor) -> dict[str, float]:
    """Return the first loss of our network in float32, of one forward pass and of two."""
    model = initial_model(case).to(views.device)
    with torch.no_grad():
        together = model(views).projections[-1].chunk(2)
        apart = [model(view).projections[-1] for view in views.chunk(2)]
    return {
        "one_pass": float(nt_xent(*together, temperature=TEMPERATURE)),
        "two_passes": float(nt_xent(*apart, temperature=TEMPERATURE)),
    }


@dataclass
class Entrant:
    """A method in the race."""

    loop: Loop
    losses: list[float]  # of the first steps
    stays: int  # bytes that it holds on the device while it rests
    recorded: int = 0  # bytes beside them that only its graph may use
    peak: int = 0  # bytes
    last_loss: float = math.nan
    seconds: list[float] = field(default_factory=list)  # of one step, by round
    profile: dict[str, object] | None = None


def enter(
    method: MethodName, case: Case, views: Views, world: World, options: argparse.Namespace
) -> Entrant | None:
    """Build a method and let it make its first steps; None if it runs out of memory."""
    before, recorded = _allocated(world.device), kept_by_graphs(world.device)
    try:
        ways = Ways(options.kernels, options.memory, options.cuda_graph)
        loop = build_loop(method, case, views, world, ways=ways, compiled=options.compile)
        losses = [float(loop.step()) for _ in range(WARM_STEPS)]
    except torch.OutOfMemoryError:
        return None
    _move(loop, torch.device("cpu"))
    stays = _allocated(world.device) - before
    return Entrant(loop, losses, stays, recorded=kept_by_graphs(world.device) - recorded)


def take_turn(entrant: Entrant, device: torch.device, steps: int) -> None:
    """Let a method make some steps and note what a step took.

    Raises:
        ValueError: its loss is not finite any more, so that it may have left out updates.
    """
    others = _allocated(device) - entrant.stays
    _move(entrant.loop, device)
    entrant.loop.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = _clock(device)()
    losses = [entrant.loop.step() for _ in range(steps)]
    if device.type == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - others + entrant.recorded
        entrant.peak = max(entrant.peak, peak)
    entrant.seconds.append((_clock(device)() - begin) / steps)
    entrant.last_loss = float(losses[-1])
    if not math.isfinite(entrant.last_loss):
        raise ValueError(f"a loss became {entrant.last_loss}")
    _move(entrant.loop, torch.device("cpu"))


def watch(entrant: Entrant, device: torch.device) -> None:
    """Let the profiler watch a method make some steps."""
    _move(entrant.loop, device)
    entrant.loop.step()
    entrant.profile = facts(trace(entrant.loop.step, steps=TRACED_STEPS))
    _move(entrant.loop, torch.device("cpu"))


def _clock(device: torch.device) -> Callable[[], float]:
    """Return the clock; with one thread of a CPU, one that other processes do not move."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def _allocated(device: torch.device) -> int:
    """Return what is allocated on a GPU, after what is free went back to it."""
    if device.type == "cpu":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def kept_by_graphs(device: torch.device) -> int:
    """Return bytes of graphs that are not allocated: activations, in memory of theirs alone.

    A replay does not allocate them, so that no peak has them.
    """
    if device.type == "cpu":
        return 0
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) != (0, 0)  # that is everyone's
    )


def _move(loop: Loop, device: torch.device) -> None:
    for tensor in loop.held():
        tensor.data = tensor.data.to(device)


def check(
    entrants: Mapping[MethodName, Entrant], expected: Mapping[str, float], device: torch.device
) -> None:
    """Refuse to time methods that compute something else.

    Raises:
        ValueError: a loss is another one.
    """
    for method, entrant in entrants.items():
        right = expected["two_passes" if method in TWO_PASSES else "one_pass"]
        tolerance = TOLERANCE[precision_of(method, device)]
        if not abs(entrant.losses[0] / right - 1) < tolerance:
            raise ValueError(f"{method} begins with a loss of {entrant.losses[0]}, not {right}")
    if "ours" in entrants and "strong" in entrants:
        tolerance = DRIFT * TOLERANCE[precision_of("ours", device)]
        for own, other in zip(entrants["ours"].losses, entrants["strong"].losses, strict=True):
            if not abs(own / other - 1) < tolerance:
                raise ValueError(f"ours comes to a loss of {own}, the strong baseline to {other}")


def measure(
    case: Case,
    methods: Sequence[MethodName],
    world: World,
    options: argparse.Namespace,
    *,
    ceilings: Ceilings | None = None,
) -> dict[str, object]:
    """Race the methods on one case, print the table and return it.

    Args:
        case: what is trained.
        methods: in the order of the table.
        world: one process.
        options: of the command.
        ceilings: what the device can do at most; None: no fractions of it.
    """
    device = world.device
    views = views_of(case, device)
    expected = reference_losses(case, views.channels_last)
    found = {method: enter(method, case, views, world, options) for method in methods}
    entrants = {method: entrant for method, entrant in found.items() if entrant is not None}
    check(entrants, expected, device)
    for number in range(options.rounds):
        order = list(entrants.values())
        for entrant in order if number % 2 == 0 else reversed(order):
            take_turn(entrant, device, options.steps)
    if options.profile:
        for entrant in entrants.values():
            watch(entrant, device)
    rows = {method: _facts(method, found[method], case, device) for method in methods}
    if ceilings is not None:
        for row in rows.values():
            row["of_op_roofline"] = of_op_roofline(row, case, ceilings)
    seconds = {method: statistics.median(entrant.seconds) for method, entrant in entrants.items()}
    ratios = {
        f"ours_over_{method}": round(taken / seconds["ours"], 3)
        for method, taken in seconds.items()
        if "ours" in seconds and method != "ours"
    }
    print(f"\n{case.model}, {case.batch} images of {case.size} px, {device.type}")
    print(
        f"{'method':>8} {'type':>5} {'images/s':>9} {'spread':>6} {'peak GB':>7} {'loss':>8}  "
        "of op-roofline"
    )
    for method, row in rows.items():
        if "out_of_memory" in row:
            print(f"{method:>8} {row['precision']:>5}  out of memory")
            continue
        print(
            f"{method:>8} {row['precision']:>5} {row['images_per_second']:>9.2f} "
            f"{row['spread']:>6.0%} {(row['peak_bytes'] or 0) / 1e9:>7.2f} "
            f"{row['first_losses'][0]:>8.4f}  {row.get('of_op_roofline') or ''}"
        )
    print("  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    return {**asdict(case), "reference_losses": expected, "methods": rows, "ratios": ratios}


def of_op_roofline(row: dict[str, Any], case: Case, ceilings: Ceilings) -> float | None:
    """Return which fraction of the fused op-roofline a method reached; None: it never ran."""
    if "out_of_memory" in row:
        return None
    allowed = floors(
        case.model,
        ceilings,
        image_size=case.size,
        views=2 * case.batch,
        precision=row["precision"],
    )
    rate: float = row["images_per_second"]
    return round(rate / allowed["fused_elementwise"].op_images_per_second, 4)


def _facts(
    method: MethodName, entrant: Entrant | None, case: Case, device: torch.device
) -> dict[str, Any]:
    precision = precision_of(method, device)
    if entrant is None:
        return {"precision": precision, "out_of_memory": True}
    rates = [case.batch / seconds for seconds in entrant.seconds]
    median = statistics.median(rates)
    return {
        "precision": precision,
        "images_per_second": round(median, 3),
        "images_per_second_of_rounds": [round(rate, 3) for rate in rates],
        "spread": round((max(rates) - min(rates)) / median, 3),
        "peak_bytes": entrant.peak if device.type == "cuda" else None,
        "first_losses": entrant.losses,
        "last_loss": entrant.last_loss,
        **({} if entrant.profile is None else {"profile": entrant.profile}),
    }


def cases_of(options: argparse.Namespace, device: torch.device) -> tuple[Case, ...]:
    """Return what is measured: what is asked for, or what suits the device."""
    if options.model is None:
        return CPU_CASES if device.type == "cpu" else GPU_CASES
    small = network(options.model).backbone.stem == "cifar"
    return (Case(options.model, options.batch, options.size or (32 if small else 224)),)


def installed(methods: Sequence[MethodName]) -> list[MethodName]:
    """Leave out lightly where it is not, and say so."""
    if has_lightly():
        return list(methods)
    return [method for method in methods if method != "lightly"]


def main() -> None:
    """Race, and write the result file after every case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="as r50-1x, r152-3x-sk, r18-cifar; default by device")
    parser.add_argument("--batch", type=int, default=32, help="images, where --model is given")
    parser.add_argument("--size", type=int, help="pixels, where --model is given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=installed(METHODS))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--kernels", choices=get_args(Choice), default="auto", help="of ours")
    parser.add_argument("--memory", choices=get_args(Memory), default="none", help="of ours")
    parser.add_argument("--cuda-graph", action="store_true", help="record ours")
    parser.add_argument(
        "--compile", choices=get_args(Compiling), default="whole", help="of the strong baseline"
    )
    parser.add_argument("--profile", action="store_true", help="time by class of kernels, on a GPU")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the findings")
    options = parser.parse_args()
    where = {**environment(), **machine()}  # before the machine is busy with this
    keep_freed_memory()  # of all methods alike: they share this process
    world = use_device(ALONE, options.device)
    on_gpu = world.device.type == "cuda"
    if options.profile and not on_gpu:
        parser.error("--profile: needs a GPU")
    ceilings = measure_ceilings() if on_gpu else None
    file = ResultFile(
        options.output,
        {
            "command": " ".join(["python", "-m", "benchmarks.step", *sys.argv[1:]]),
            "commit": source_commit(),
            "device": world.device.type,
            "machine": where | _versions(options.methods),
            "settings": settings_of(options, world.device),
            "ceilings": None if ceilings is None else asdict(ceilings),
        },
        "cases",
    )
    cases = cases_of(options, world.device)
    found: list[dict[str, object]] = []
    for case in cases:
        found.append(measure(case, options.methods, world, options, ceilings=ceilings))
        file.write({"cases": found}, measured=len(found), of=len(cases))


def settings_of(options: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Return what a result file says of the command."""
    return {
        "rounds": options.rounds,
        "steps": options.steps,
        "clock": _clock(device).__name__,
        "kernels": options.kernels,
        "memory": options.memory,
        "cuda_graph": options.cuda_graph,
        "strong_is_compiled": options.compile != "none",
        "strong_compiles": options.compile,
    }


def _versions(methods: Sequence[str]) -> dict[str, str]:
    return {"lightly": importlib.metadata.version("lightly")} if "lightly" in methods else {}


if __name__ == "__main__":
    main()

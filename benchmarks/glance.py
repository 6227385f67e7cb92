"""A first look at a GPU: most targets in one process, in a minute, and what the time goes to.

    python -m benchmarks.glance -o benchmarks/results/glance-gpu.json

Measured as the benchmarks of the parts do it, by their functions, but in fewer rounds and without
their peers; where a part has a result of its own, docs/performance.md takes that. Nothing is
compared with float64 here: the kernels' tests do it. The file is written after each part.

Beside each time stand the kernels that took most of it, as the profiler sees them.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch

from benchmarks import augment, loss, norm_act, optimizer
from benchmarks.kernel_trace import trace
from benchmarks.loops import Case, Ways, build_loop, views_of
from benchmarks.loss_methods import build
from benchmarks.machine import machine
from benchmarks.optimizer_methods import methods as optimizers
from benchmarks.result_file import ResultFile
from bigsimclr.stages.run_directory import environment, source_commit
from bigsimclr.world import ALONE, use_device

ROUNDS: Final = 9
SHOWN_KERNELS: Final = 10
NETWORK: Final = Case("r50-1x", batch=256, size=224)
VIEWS_OF_NORMS: Final = 128


@dataclass(frozen=True)
class Figure:
    """A target's figure, under the target's name."""

    what: str
    unit: str
    median: float
    least: float
    most: float
    busy_microseconds: float | None = None  # what the GPU works for it once
    kernels: dict[str, float] = field(default_factory=dict)  # their microseconds, largest first
    commit: str = ""  # where it is not that of the file


def figure(
    what: str,
    unit: str,
    taken: list[float],
    work: Callable[[], object] | None = None,  # what took them, to be profiled
) -> Figure:
    """Sum up the rounds, and profile what was timed."""
    found = Figure(what, unit, statistics.median(taken), min(taken), max(taken))
    if work is None:
        return found
    seen = trace(work, steps=2)
    largest = sorted(seen.kernels, key=lambda one: -one.microseconds)[:SHOWN_KERNELS]
    kernels = {one.name[:100]: round(one.microseconds / 2, 1) for one in largest}
    busy = round(1e6 * seen.busy_seconds / 2, 1)
    return Figure(what, unit, found.median, found.least, found.most, busy, kernels)


def of_loss(device: torch.device) -> Iterator[Figure]:
    for pairs, unit in ((4096, 1e6), (32768, 1e3)):
        first, second = loss.inputs(pairs, device)
        work = partial(loss.forward_backward, build("fused-bf16", device), first, second)
        taken = [unit * loss.gpu_seconds(work, head_start=True) for _ in range(ROUNDS)]
        what = f"NT-Xent of {2 * pairs:,} views"
        yield figure(what, "us" if unit == 1e6 else "ms", taken, work)
        peak = loss.gpu_peak(work)
        if peak is not None:
            yield figure(f"{what}: memory", "MB", [peak])


def of_update(device: torch.device) -> Iterator[Figure]:
    parameters = optimizer.parameters_of("r50-1x", device)
    steps = {"fused": optimizers(device)["fused"](parameters)}
    initial = [parameter.detach().clone() for parameter in parameters]
    taken = optimizer.times(steps, parameters, initial, rounds=ROUNDS)["fused"]
    yield figure("LARS of R50-1x", "ms", [1e3 * one for one in taken], steps["fused"])


def of_views(device: torch.device) -> Iterator[Figure]:
    images, side = NETWORK.batch, augment.SIZE
    decoded = np.random.default_rng(0).integers(0, 256, (images, 3, side, side), dtype=np.uint8)
    pixels = torch.from_numpy(decoded).to(device)
    work = augment.methods(pixels, augment.draw(images, side))["fused bf16"]
    augment.seconds_of(work, device, 1)
    taken = [augment.seconds_of(work, device, 3) / (2 * images) * 1e6 for _ in range(ROUNDS)]
    yield figure("A view of 224 px", "us", taken, work)


def of_norms(_: torch.device) -> Iterator[Figure]:
    clock, copying, own = norm_act.Clock(), 0.0, 0.0
    way = {"views": VIEWS_OF_NORMS, "dtype": torch.bfloat16, "rounds": ROUNDS}
    for layer in norm_act.LAYERS:
        for found in norm_act.time_passes(layer, clock, **way).values():
            own += layer.count * found["median_ms"]
            copying += layer.count * found["median_ms"] * found["fraction_of_copy"]
    yield figure("Batch norm + ReLU (+ sum): speed over a copy's", "%", [100 * copying / own])


def of_step(device: torch.device) -> Iterator[Figure]:
    views = views_of(NETWORK, device)
    for graph in (False, True):
        ways = Ways("auto", "none", cuda_graph=graph)
        step = build_loop(
            "ours", NETWORK, views, use_device(ALONE, "cuda"), ways=ways, compiled="none"
        ).step
        rates = []
        for _ in range(ROUNDS + 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            end.synchronize()
            rates.append(1e3 * NETWORK.batch / begin.elapsed_time(end))
        name = f"R50-1x, {NETWORK.batch} images" + ", in a CUDA graph" * graph
        yield figure(name, "images/s", rates[1:], step)


PARTS: Final = (of_loss, of_update, of_views, of_norms, of_step)


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the findings")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.glance looks at a GPU, and there is none here", file=sys.stderr)
        raise SystemExit(2)
    facts = {
        "command": " ".join(["python", "-m", "benchmarks.glance", *sys.argv[1:]]),
        "commit": source_commit(),
        "machine": {**environment(), **machine()},
        "settings": {"rounds": ROUNDS, "dtype": "bfloat16"},
    }
    file = ResultFile(options.output, facts, "parts")
    found: list[Figure] = []
    for number, part in enumerate(PARTS, 1):
        for one in part(torch.device("cuda")):
            found.append(one)
            print(f"{one.what}: {one.median:.4g} {one.unit} ({one.least:.4g} to {one.most:.4g})")
        torch.cuda.empty_cache()
        file.write({"figures": [asdict(one) for one in found]}, measured=number, of=len(PARTS))


if __name__ == "__main__":
    main()

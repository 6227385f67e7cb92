"""LARS side by side, on the parameters of a network with its head: ours, others', and plain SGD.

    pip install --no-deps "lightly>=1.5.20"
    python -m benchmarks.optimizer -o benchmarks/results/optimizer.json

The methods are those of `benchmarks.optimizer_methods`. Two updates of each are compared with its
own definition in float64 before anything is timed: the largest error of a weight's change, over the
largest change of that parameter.

Time: one process; every round runs every method once, in turns, so that a busy moment of the
machine meets all of them. Methods share weights and gradients, which stay where they are; each has
a momentum of its own. Memory: the highest use in one update less what was held before it, on a
CPU in a fresh process.

LARS has to move 28 bytes a parameter in float32, 8 for the norms and 20 for the update, and 2 more
for a bf16 copy. `gigabytes_per_second` is that over the median. What the machine reaches when it
copies a large tensor is `copied_gigabytes_per_second`; `time_over_30_byte_floor` is the median over
30 bytes a parameter at that speed. A CPU is faster where it writes what it has just read, and may
get below it.
"""

import argparse
import importlib.metadata
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from benchmarks.loss import resident
from benchmarks.machine import machine
from benchmarks.optimizer_methods import (
    DECAY,
    MOMENTUM,
    TRUST,
    Parameters,
    Step,
    error,
    methods,
    restore,
)
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.simclr import parameter_kind
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone
from bigsimclr.stages.run_directory import source_commit

MODELS: Final = {
    "r50-1x": ResNetBackbone(depth=50, width=1.0),
    "r152-3x-sk": ResNetBackbone(depth=152, width=3.0, selective_kernel=True),
}


def parameters_of(model: str, device: torch.device) -> Parameters:
    """Return a network's parameters with gradients of about a training's size."""
    network = build_model(Architecture(MODELS[model], HeadSection(), None, 0), seed=0).to(device)
    kinds = parameter_kind(network)
    generator = torch.Generator(device).manual_seed(0)
    found = Parameters([], [])
    for name, parameter in network.named_parameters():
        noise = torch.empty_like(parameter).normal_(0.0, 1e-2, generator=generator)
        parameter.grad = noise.detach()
        (found.kernels if kinds[name] == "kernel" else found.others).append(parameter)
    return found


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(
    steps: dict[str, Step], parameters: Parameters, initial: list[Tensor], *, rounds: int
) -> dict[str, list[float]]:
    """Return every method's seconds per round, the methods taking turns."""
    device = initial[0].device
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    for _ in range(rounds):
        restore(parameters, initial)
        for method, step in steps.items():
            wait(device)
            begin = time.perf_counter()
            step()
            wait(device)
            seconds[method].append(time.perf_counter() - begin)
    return seconds


def copied_per_second(device: torch.device, rounds: int) -> float:
    """Return the most bytes per second, read and written, of copying a large tensor."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    least = float("inf")
    for _ in range(rounds):
        wait(device)
        begin = time.perf_counter()
        target.copy_(source)
        wait(device)
        least = min(least, time.perf_counter() - begin)
    return 2 * source.nbytes / least


def peak(method: str, model: str, device: torch.device) -> int:
    """Return the bytes that one update needs at its highest, in this process."""
    parameters = parameters_of(model, device)
    step = methods(device)[method](parameters)
    step()  # momenta, libraries and their buffers
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from now
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def peak_megabytes(method: str, model: str, device: torch.device) -> float:
    """Return the peak in MB; on a CPU, whose marks count all of a process, from a fresh one."""
    if device.type == "cuda":
        return peak(method, model, device) / 1e6
    command = [sys.executable, "-m", "benchmarks.optimizer", "--peak", method]
    command += ["--model", model, "--device", device.type]
    # Freed blocks above this size go back to the system at once, so that the mark shows use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    answer = subprocess.run(  # noqa: S603 - this file, with arguments made here
        command, env=environment, check=True, capture_output=True, text=True
    )
    return int(answer.stdout) / 1e6


def rows(
    seconds: dict[str, list[float]],
    peaks: dict[str, float],
    parameters: int,
    copied: float,
) -> list[dict[str, object]]:
    """Return a row of results for each method, and print them."""
    medians = {method: statistics.median(taken) for method, taken in seconds.items()}
    found: list[dict[str, object]] = []
    for method, taken in seconds.items():
        low, _, high = statistics.quantiles(taken, n=4)
        moved = (30 if method == "copying" else 28) * parameters
        row: dict[str, object] = {
            "method": method,
            "median_milliseconds": round(1e3 * medians[method], 4),
            "quartiles_milliseconds": [round(1e3 * low, 4), round(1e3 * high, 4)],
            "min_milliseconds": round(1e3 * min(taken), 4),
            "peak_megabytes": round(peaks[method], 1),
        }
        if method != "sgd":
            row["gigabytes_per_second"] = round(moved / medians[method] / 1e9, 1)
            row["time_over_30_byte_floor"] = round(medians[method] * copied / 30 / parameters, 2)
        if "lightly" in seconds:
            row["time_over_lightly"] = round(medians[method] / medians["lightly"], 3)
            row["min_over_lightly"] = round(min(taken) / min(seconds["lightly"]), 3)
        found.append(row)
        print(
            f"{method:>9} median {1e3 * medians[method]:9.3f} ms  min {1e3 * min(taken):9.3f} ms  "
            f"peak {peaks[method]:8.1f} MB"
        )
    return found


def measure(
    model: str, device: torch.device, *, rounds: int, threads: list[int]
) -> dict[str, object]:
    """Check and measure all methods."""
    parameters = parameters_of(model, device)
    initial = [parameter.detach().clone() for parameter in parameters]
    makers = methods(device)
    errors = {name: error(name, make, parameters, initial) for name, make in makers.items()}
    peaks = {name: peak_megabytes(name, model, device) for name in makers}
    steps = {name: make(parameters) for name, make in makers.items()}
    results: list[dict[str, object]] = []
    for number in threads:
        torch.set_num_threads(number)
        print(f"{model}, {number} threads")
        copied = copied_per_second(device, rounds)
        seconds = times(steps, parameters, initial, rounds=rounds)
        results.append(
            {
                "threads": number,
                "copied_gigabytes_per_second": round(copied / 1e9, 1),
                "methods": rows(seconds, peaks, parameters.count(), copied),
            }
        )
    return {
        "parameters": parameters.count(),
        "tensors": len(initial),
        "largest_errors_against_float64": errors,
        "results": results,
    }


def versions(device: torch.device) -> dict[str, object]:
    """Return what the figures depend on."""
    found = machine()
    for package in ("lightly", "triton"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", choices=sorted(MODELS), default="r50-1x")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    cores = [1] if on_gpu else sorted({1, os.cpu_count() or 1})
    parser.add_argument("--threads", type=int, nargs="+", default=cores)
    parser.add_argument("-o", "--output", type=Path, help="write JSON here")
    parser.add_argument("--peak", metavar="METHOD", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.peak is not None:
        print(peak(arguments.peak, arguments.model, device))
        return
    facts = versions(device)
    found = measure(arguments.model, device, rounds=arguments.rounds, threads=arguments.threads)
    words = ["--model", arguments.model, "--device", arguments.device]
    words += ["--threads", *map(str, arguments.threads), "--rounds", str(arguments.rounds)]
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.optimizer", *words]),
        "commit": source_commit(),
        "machine": facts,
        "settings": {
            "model": arguments.model,
            "device": arguments.device,
            "dtype": "float32",
            "rounds": arguments.rounds,
            "momentum": MOMENTUM,
            "weight_decay": DECAY,
            "trust_coefficient": TRUST,
        },
        **found,
    }
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

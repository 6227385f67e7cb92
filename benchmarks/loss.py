"""NT-Xent side by side: all logits at once, in chunks, and lightly's NTXentLoss.

    pip install "bigsimclr[bench]"
    python -m benchmarks.loss

Time: one process; every round runs every method once, forward and backward, in turns, so that a
busy moment of the machine meets all of them. The median of the rounds counts. With one thread the
figures hardly depend on what else the machine does; with all cores they show what a user gets.

Memory: one fresh process per method and size, one forward and backward pass each; the highest
resident memory of the process less what it held just before. The inputs are not counted.

Before anything is measured, values and gradients are compared with float64. lightly's value is the
mean over the 2N anchors, half of the official sum over directions; it is doubled to compare.

lightly's loss runs as installed and unchanged; `benchmarks.peers` says how.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.peers import Loss, lightly_loss
from bigsimclr.losses.nt_xent import nt_xent
from bigsimclr.stages.run_directory import source_commit

TEMPERATURE = 0.1
WIDTH = 128
ROW_CHUNK = 1024
METHODS = ("dense", "chunked", "lightly")
RESULTS = Path(__file__).parent / "results" / "loss.json"


def build(method: str) -> Loss:
    """Return one method's loss, as the official sum over directions."""
    if method == "lightly":
        return lightly_loss(TEMPERATURE)
    row_chunk = ROW_CHUNK if method == "chunked" else None
    return lambda first, second: nt_xent(
        first, second, temperature=TEMPERATURE, row_chunk=row_chunk
    )


def inputs(pairs: int) -> tuple[Tensor, Tensor]:
    """Return two views' projections, somewhat alike."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(pairs, WIDTH, generator=generator)
    second = first + torch.randn(pairs, WIDTH, generator=generator)
    return first.requires_grad_(), second.requires_grad_()


def forward_backward(loss: Loss, first: Tensor, second: Tensor) -> tuple[float, Tensor]:
    """Return value and gradient [2B, D]."""
    value = loss(first, second)
    slopes = torch.autograd.grad(value, (first, second))
    return float(value.detach()), torch.cat(slopes)


def errors(losses: dict[str, Loss], pairs: int) -> dict[str, dict[str, float]]:
    """Compare every method in float32 with the dense one in float64."""
    first, second = inputs(pairs)
    exact_value, exact = forward_backward(
        build("dense"), *(x.detach().double().requires_grad_() for x in (first, second))
    )
    found = {}
    for method, loss in losses.items():
        value, gradient = forward_backward(loss, first, second)
        difference = (gradient.double() - exact).abs().max() / exact.abs().max()
        found[method] = {
            "value": abs(value - exact_value) / exact_value,
            "gradient": float(difference),
        }
        assert max(found[method].values()) < 1e-4, f"{method} computes something else"
    return found


def times(losses: dict[str, Loss], pairs: int, rounds: int) -> dict[str, list[float]]:
    """Return every method's seconds per round, the methods taking turns."""
    first, second = inputs(pairs)
    for loss in losses.values():
        forward_backward(loss, first, second)
    seconds: dict[str, list[float]] = {method: [] for method in losses}
    for _ in range(rounds):
        for method, loss in losses.items():
            begin = time.perf_counter()
            forward_backward(loss, first, second)
            seconds[method].append(time.perf_counter() - begin)
    return seconds


def resident(key: str) -> int:
    """Return VmRSS or VmHWM, the resident memory now or at its highest, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def peak_in_this_process(method: str, pairs: int) -> int:
    """Return the bytes that one forward and backward pass needs at its highest."""
    loss = build(method)
    forward_backward(loss, *inputs(32))  # libraries, threads and their buffers
    first, second = inputs(pairs)
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from now
    before = resident("VmRSS")
    value = loss(first, second)
    torch.autograd.grad(value, (first, second))
    return resident("VmHWM") - before


def peak_in_a_child(method: str, pairs: int) -> float:
    """Return the peak in MB, measured in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loss", "--peak", method, str(pairs)]
    # Freed blocks above this size go back to the system at once, so that the mark shows use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    answer = subprocess.run(  # noqa: S603 - this file, with arguments made here
        command, env=environment, check=True, capture_output=True, text=True
    )
    return int(answer.stdout) / 1e6


def measure(
    losses: dict[str, Loss], sizes: list[int], *, rounds: int, threads: list[int]
) -> list[dict[str, object]]:
    """Measure all methods at all sizes and print the table."""
    rows: list[dict[str, object]] = []
    print(f"{'pairs':>6} {'threads':>7} {'method':>8} {'median s':>9} {'min s':>8} {'peak MB':>8}")
    for pairs in sizes:
        peaks = {method: peak_in_a_child(method, pairs) for method in METHODS}
        for number in threads:
            torch.set_num_threads(number)
            seconds = times(losses, pairs, rounds)
            medians = {method: statistics.median(taken) for method, taken in seconds.items()}
            for method in METHODS:
                least = min(seconds[method])
                rows.append(
                    {
                        "pairs": pairs,
                        "threads": number,
                        "method": method,
                        "median_seconds": round(medians[method], 5),
                        "min_seconds": round(least, 5),
                        "peak_megabytes": round(peaks[method], 1),
                        "time_over_lightly": round(medians[method] / medians["lightly"], 3),
                        "memory_over_lightly": round(peaks[method] / peaks["lightly"], 3),
                    }
                )
                print(
                    f"{pairs:>6} {number:>7} {method:>8} {medians[method]:>9.4f} {least:>8.4f} "
                    f"{peaks[method]:>8.1f}"
                )
    return rows


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=7)
    cores = sorted({1, os.cpu_count() or 1})
    parser.add_argument("--threads", type=int, nargs="+", default=cores)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--peak", nargs=2, metavar=("METHOD", "PAIRS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak is not None:
        print(peak_in_this_process(arguments.peak[0], int(arguments.peak[1])))
        return
    facts = {**machine(), "lightly": importlib.metadata.version("lightly")}
    losses = {method: build(method) for method in METHODS}
    wrong = errors(losses, arguments.pairs[0])
    sizes, threads = (" ".join(map(str, n)) for n in (arguments.pairs, arguments.threads))
    result = {
        "command": f"python -m benchmarks.loss --pairs {sizes} --threads {threads} "
        f"--rounds {arguments.rounds}",
        "commit": source_commit(),
        "machine": facts,
        "settings": {
            "width": WIDTH,
            "temperature": TEMPERATURE,
            "row_chunk": ROW_CHUNK,
            "rounds": arguments.rounds,
            "dtype": "float32",
            "work": "forward and backward",
        },
        "relative_errors_against_float64": wrong,
        "results": measure(
            losses, arguments.pairs, rounds=arguments.rounds, threads=arguments.threads
        ),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

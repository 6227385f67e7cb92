"""NT-Xent side by side: ours in several ways, a strong baseline, and other libraries'.

    pip install --no-deps "lightly>=1.5.20" pytorch-metric-learning
    python -m benchmarks.loss

`benchmarks.loss_methods` says what is compared; what is not installed is left out.

Before anything is measured, values and gradients are compared with float64.

Time: one process; every round runs every method, forward and backward, in turns and every other
round in the opposite order, so that a busy moment of the machine meets all of them. The median of
the rounds counts; spread is largest less smallest, over the median. With one thread of a CPU, time
is that of the processor, which hardly depends on what else the machine does; with all cores it is
what a user waits. On a GPU, events take the time, after one run that is not timed: with a head
start the GPU is given other work first, so that it never waits for the host unless the method makes
it; `called_` is without it.

Memory: the most that one forward and backward pass holds, inputs not counted. On a CPU in one fresh
process per method and size, the highest resident memory less what was held just before; on a GPU
what PyTorch allocates.
"""

import argparse
import gc
import importlib.metadata
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.loss_methods import (
    APART,
    FLOAT32_TOLERANCE,
    ROW_CHUNK,
    TEMPERATURE,
    TOLERANCE,
    build,
    names,
    reference,
    runs,
)
from benchmarks.machine import machine
from benchmarks.peers import Loss
from benchmarks.result_file import ResultFile
from bigsimclr.stages.run_directory import source_commit

WIDTH: Final = 128
PAIRS: Final = {"cpu": [128, 1024, 4096], "cuda": [256, 4096, 32768]}
MOST_CHECKED: Final = {"cpu": 1024, "cuda": 4096}  # pairs that are compared with float64
PEERS: Final = ("lightly", "solo", "metric-learning", "strong")
PACKAGES: Final = ("lightly", "pytorch-metric-learning", "triton")
RESULTS: Final = Path(__file__).parent / "results" / "loss.json"
HEAD_START_BYTES: Final = 1 << 33  # 3 ms of an H100's memory, written before what is timed
FILLED_BYTES: Final = 1 << 28

Work = Callable[[], object]
Ratios = dict[str, float]


def inputs(pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return two views' projections, somewhat alike."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(pairs, WIDTH, generator=generator)
    second = first + torch.randn(pairs, WIDTH, generator=generator)
    return first.to(device).requires_grad_(), second.to(device).requires_grad_()


def forward_backward(loss: Loss, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return value and gradients."""
    value = loss(first, second)
    return value.detach(), *torch.autograd.grad(value, (first, second))


def errors(
    losses: dict[str, Loss], pairs: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Compare every method with its definition in float64."""
    first, second = inputs(pairs, device)
    exact = [x.detach().double().requires_grad_() for x in (first, second)]
    found = {}
    for method, loss in losses.items():
        if not runs(method, pairs):
            continue
        right, *slopes = forward_backward(reference(method), *exact)
        value, *gradients = forward_backward(loss, first, second)
        steepest = max(float(slope.abs().max()) for slope in slopes)
        found[method] = {
            "value": float((value - right).abs() / right),
            "gradient": max(
                float((gradient - slope).abs().max()) / steepest
                for gradient, slope in zip(gradients, slopes, strict=True)
            ),
        }
        limit = TOLERANCE.get(method, FLOAT32_TOLERANCE)
        assert max(found[method].values()) < limit, f"{method} computes something else: {found}"
    return found


# --- on a CPU --------------------------------------------------------------------------------


def cpu_seconds(work: Work) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    work()
    return clock() - begin


def resident(key: str) -> int:
    """Return VmRSS or VmHWM, the resident memory now or at its highest, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def peak_in_this_process(method: str, pairs: int) -> int:
    """Return the bytes that one forward and backward pass needs at its highest."""
    device = torch.device("cpu")
    loss = build(method, device)
    forward_backward(loss, *inputs(32, device))  # libraries, threads and their buffers
    first, second = inputs(pairs, device)
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


# --- on a GPU --------------------------------------------------------------------------------


def gpu_seconds(work: Work, *, head_start: bool) -> float:
    """Return what the GPU takes from the first to the last kernel, after one run untimed."""
    torch.cuda.empty_cache()  # others' blocks, which may be of no use here
    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if head_start:
        filled = torch.empty(FILLED_BYTES, dtype=torch.int8, device="cuda")
        torch.cuda.synchronize()
        for _ in range(HEAD_START_BYTES // FILLED_BYTES):
            filled.zero_()
        del filled
    else:
        torch.cuda.synchronize()
    begin.record()
    kept = work()
    end.record()
    end.synchronize()
    del kept
    return begin.elapsed_time(end) / 1e3


def gpu_peak(work: Work) -> float | None:
    """Return the peak in MB; None if there is not enough memory."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    try:
        work()  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return None
    return (torch.cuda.max_memory_allocated() - before) / 1e6


# --- all of it -------------------------------------------------------------------------------


def race(works: dict[str, Work], clock: Callable[[Work], float], rounds: int) -> dict[str, list]:
    """Return every method's seconds by round."""
    seconds: dict[str, list[float]] = {method: [] for method in works}
    for number in range(rounds):
        order = list(works)
        for method in order if number % 2 == 0 else reversed(order):
            seconds[method].append(clock(works[method]))
    return seconds


def over(values: dict[str, float], method: str, digits: int = 4) -> Ratios:
    """Return a method's value over that of each peer."""
    return {peer: round(values[method] / values[peer], digits) for peer in PEERS if peer in values}


def rows_of(
    where: dict[str, int],
    peaks: dict[str, float | None],
    seconds: dict[str, list],
    prefix: str = "",
) -> list[dict[str, Any]]:
    """Return a row for each method."""
    medians = {method: statistics.median(taken) for method, taken in seconds.items()}
    least = {method: min(taken) for method, taken in seconds.items()}
    held = {method: peak for method, peak in peaks.items() if peak is not None}
    rows: list[dict[str, Any]] = []
    for method, peak in peaks.items():
        row: dict[str, Any] = {**where, "method": method}
        if peak is None:
            rows.append({**row, "out_of_memory": True})
            continue
        taken = seconds[method]
        rows.append(
            {
                **row,
                f"{prefix}median_seconds": round(medians[method], 7),
                f"{prefix}min_seconds": round(least[method], 7),
                f"{prefix}spread": round((max(taken) - min(taken)) / medians[method], 3),
                "peak_megabytes": round(peak, 1),
                f"{prefix}time_over": over(medians, method),
                f"{prefix}min_time_over": over(least, method),
                "memory_over": over(held, method),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows of one size."""
    for row in rows:
        where = f"{row['pairs']:>6} {row.get('threads', ''):>7} {row['method']:>15}"
        if "out_of_memory" in row:
            print(f"{where}  out of memory")
            continue
        ratios = ", ".join(f"{peer} {ratio:.3f}" for peer, ratio in row["time_over"].items())
        print(
            f"{where} {1e3 * row['median_seconds']:>10.3f} {1e3 * row['min_seconds']:>10.3f} "
            f"{row['spread']:>6.0%} {row['peak_megabytes']:>9.1f}  {ratios}",
            flush=True,
        )


def measure(
    losses: dict[str, Loss], pairs: int, device: torch.device, *, rounds: int, threads: list[int]
) -> list[dict[str, Any]]:
    """Measure all methods on one size."""
    first, second = inputs(pairs, device)
    works: dict[str, Work] = {
        method: partial(forward_backward, loss, first, second)
        for method, loss in losses.items()
        if runs(method, pairs)
    }
    if device.type == "cuda":
        peaks = {method: gpu_peak(work) for method, work in works.items()}
        works = {method: work for method, work in works.items() if peaks[method] is not None}
        rows, called = (
            rows_of({"pairs": pairs}, peaks, race(works, clock, rounds), prefix)
            for prefix, clock in (
                ("", partial(gpu_seconds, head_start=True)),
                ("called_", partial(gpu_seconds, head_start=False)),
            )
        )
        rows = [row | other for row, other in zip(rows, called, strict=True)]
        show(rows)
        return rows
    peaks = {method: peak_in_a_child(method, pairs) for method in works}
    found = []
    for number in threads:
        torch.set_num_threads(number)
        for work in works.values():
            work()
        rows = rows_of({"pairs": pairs, "threads": number}, peaks, race(works, cpu_seconds, rounds))
        show(rows)
        found += rows
    return found


def main() -> None:
    """Measure and write the result file, after every size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cores = sorted({1, os.cpu_count() or 1}) if device.type == "cpu" else [torch.get_num_threads()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=PAIRS[device.type])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=cores, help="of a CPU")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--peak", nargs=2, metavar=("METHOD", "PAIRS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        print(peak_in_this_process(options.peak[0], int(options.peak[1])))
        return
    facts = machine()  # before this makes it busy
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    facts |= versions()
    losses = {method: build(method, device) for method in names(device)}
    checked = [pairs for pairs in options.pairs if pairs <= MOST_CHECKED[device.type]]
    wrong = {str(pairs): errors(losses, pairs, device) for pairs in checked}
    print(f" pairs threads {'method':>15}  median ms     min ms spread   peak MB  time over")
    file = ResultFile(
        options.output,
        {
            "command": " ".join(["python", "-m", "benchmarks.loss", *sys.argv[1:]]),
            "commit": source_commit(),
            "machine": facts,
            "settings": {
                "device": device.type,
                "width": WIDTH,
                "temperature": TEMPERATURE,
                "row_chunk": ROW_CHUNK[device.type],
                "rounds": options.rounds,
                "dtype": "float32",
                "work": "forward and backward",
            },
            "relative_errors_against_float64": wrong,
        },
        "sizes",
    )
    rows: list[dict[str, Any]] = []
    for number, pairs in enumerate(options.pairs, start=1):
        rows += measure(losses, pairs, device, rounds=options.rounds, threads=options.threads)
        file.write(found_in(rows), measured=number, of=len(options.pairs))


def found_in(rows: list[dict[str, Any]]) -> dict[str, object]:
    """Return what a result file has of the rows."""
    return {
        "results": [row for row in rows if row["method"] != APART],
        "another_problem": {
            "what": "two sets, nothing masked: as many logits, but not NT-Xent",
            "results": [row for row in rows if row["method"] == APART],
        },
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that are compared, of those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()

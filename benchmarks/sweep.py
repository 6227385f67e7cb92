"""Which tiles, warps and stages suit each kernel: every candidate built, and on a GPU timed.

    python -m benchmarks.sweep -o benchmarks/results/sweep.json

Candidates are in `benchmarks.sweep_cases` and `benchmarks.sweep_norms`. All of them are compiled
ahead, several at once, for the GPU that is there, or where there is none for compute capability
9.0. What spills registers or needs more shared memory than a block has is dropped.

On a GPU the others are first compared with what is chosen now: their results may differ as far as
the kernel's own tolerance. Then they are timed. Each is captured in a CUDA graph, so that the host
does not count; before each replay a gigabyte is overwritten, which empties the cache. Every round
runs every candidate once, in turns; the median of the rounds counts, and the spread is that between
the quartiles over the median. The fastest has the least sum, over the sizes, of its time over that
of what is chosen. Where both passes have to be run to get at one, their time is that of both.

Nothing is chosen at run time: a run's sums must not depend on what was fast on some day. What is
found here is written into the tables of `bigsimclr.kernels` by hand.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
import triton
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from benchmarks.capture import captured
from benchmarks.machine import machine
from benchmarks.norm_act import FLUSHED_BYTES, Clock
from benchmarks.result_file import ResultFile
from benchmarks.sweep_cases import Case, loss_cases, update_case, view_cases
from benchmarks.sweep_norms import norm_cases, pool_cases, select_cases
from bigsimclr.stages.run_directory import source_commit
from tests.kernels.ahead import build

CASES: Final[tuple[Case, ...]] = (
    *loss_cases(),
    *norm_cases(),
    *select_cases(),
    *pool_cases(),
    *view_cases(),
    update_case(),  # last, as it holds most memory: weights, gradients and momenta of a network
)
CAPABILITY: Final = 90  # where there is no GPU
SHARED_BYTES: Final = 227 * 1024  # of a block of an H100
MOST_PROCESSES: Final = 12  # each holds half a gigabyte of a GPU
WARM_ROUNDS: Final = 2


@dataclass
class Found:
    """What is known of a candidate."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    dropped: str = ""  # why; nothing if it may be chosen
    difference: float | None = None  # of its results from those of what is chosen, at most
    milliseconds: dict[str, list[float]] = field(default_factory=dict)  # by size, of each round


# --- compiled ahead ------------------------------------------------------------------------------


def capability() -> int:
    if not torch.cuda.is_available():
        return CAPABILITY
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def unfit(found: Found) -> str:
    """Say why a candidate cannot be chosen, by what it was built to; nothing if it can."""
    if found.spilled_bytes:
        return "spills registers"
    if found.shared_bytes > SHARED_BYTES:
        return "needs more shared memory than there is"
    return ""


def prepare(number: int, candidate: int) -> Found:
    """Build a candidate; on a GPU launch it once too, so that its launches are built for later."""
    case = CASES[number]
    wanted = case.candidates[candidate]
    made = [build(module, one, capability()) for module, one in wanted.builds]
    found = Found(
        registers=max(one.registers for one in made),
        spilled_bytes=sum(one.spilled_bytes for one in made),
        shared_bytes=max(one.shared_bytes for one in made),
    )
    found.dropped = unfit(found)
    if not found.dropped and torch.cuda.is_available():
        size = next(iter(case.sizes.values()))
        try:
            case.prepare(torch.device("cuda"), *size)(wanted.tiles)()
            torch.cuda.synchronize()
        except OutOfResources as error:
            found.dropped = str(error)
        except torch.OutOfMemoryError:
            pass  # of the other processes: its launches are built when it is compared
        torch.cuda.empty_cache()  # other processes are beside this one
    return found


def prepare_all(numbers: Sequence[int], processes: int) -> dict[int, list[Found]]:
    """Prepare every candidate of some cases."""
    jobs = [(number, one) for number in numbers for one in range(len(CASES[number].candidates))]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        made = list(pool.map(prepare, *zip(*jobs, strict=True)))
    found: dict[int, list[Found]] = {number: [] for number in numbers}
    for (number, _), one in zip(jobs, made, strict=True):
        found[number].append(one)
    return found


# --- compared and timed --------------------------------------------------------------------------


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference, over the largest value of its tensor; NaN is infinitely far.

    Both are compared a tensor at a time, in float32.
    """
    largest = 0.0
    for one, other in zip(found, expected, strict=True):
        if not one.numel():
            continue
        scale = float(other.float().abs().max()) or 1.0
        apart = float((one.float() - other.float()).abs().max()) / scale
        largest = max(largest, apart if apart == apart else float("inf"))  # noqa: PLR0124 - NaN
    return largest


def compare(case: Case, found: Sequence[Found], size: str, device: torch.device) -> None:
    """Drop the candidates that compute something else than what is chosen."""
    given = case.prepare(device, *case.sizes[size])
    expected = [tensor.clone() for tensor in given(case.candidates[0].tiles)()]
    for candidate, one in zip(case.candidates, found, strict=True):
        if one.dropped:
            continue
        apart = difference(given(candidate.tiles)(), expected)
        one.difference = max(one.difference or 0.0, apart)
        if apart > case.tolerance:
            one.dropped = f"differs by {apart:.1e} at {size}"


def measure(case: Case, found: Sequence[Found], clock: Clock, *, rounds: int) -> str:
    """Compare and time the candidates of a case; return what went wrong, or nothing."""
    try:
        for size in case.sizes:
            compare(case, found, size, torch.device("cuda"))
            time_size(case, found, size, clock, rounds=rounds)
            torch.cuda.empty_cache()
    except (RuntimeError, TritonError) as error:  # other cases may go well
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{case.name}: {said}", flush=True)
        return said
    return ""


def time_size(case: Case, found: Sequence[Found], size: str, clock: Clock, *, rounds: int) -> None:
    """Time what is left of the candidates at one size."""
    given = case.prepare(torch.device("cuda"), *case.sizes[size])
    graphs = [
        (one, captured(given(candidate.tiles)))
        for candidate, one in zip(case.candidates, found, strict=True)
        if not one.dropped
    ]
    for number in range(rounds + WARM_ROUNDS):
        for one, graph in graphs if number % 2 == 0 else reversed(graphs):
            milliseconds = clock.milliseconds(graph)
            if number >= WARM_ROUNDS:
                one.milliseconds.setdefault(size, []).append(milliseconds)


# --- what is said of them ------------------------------------------------------------------------


def over_chosen(found: Sequence[Found]) -> list[float | None]:
    """Return each candidate's time over that of what is chosen, a mean over the sizes."""
    ratios: list[float | None] = []
    chosen = {size: statistics.median(taken) for size, taken in found[0].milliseconds.items()}
    for one in found:
        own = [
            statistics.median(one.milliseconds[size]) / median
            for size, median in chosen.items()
            if size in one.milliseconds
        ]
        is_whole = bool(own) and len(own) == len(chosen) and not one.dropped
        ratios.append(statistics.mean(own) if is_whole else None)
    return ratios


def described(case: Case, found: Sequence[Found]) -> dict[str, object]:
    """Return the entry of a case in the results, and print it."""
    ratios = over_chosen(found)
    timed = [number for number, ratio in enumerate(ratios) if ratio is not None]
    fastest = min(timed, key=lambda number: ratios[number] or 0.0) if timed else None
    rows = []
    for candidate, one, ratio in zip(case.candidates, found, ratios, strict=True):
        rows.append(
            {
                "tiles": candidate.facts,
                "registers": one.registers,
                "spilled_bytes": one.spilled_bytes,
                "shared_bytes": one.shared_bytes,
                "dropped": one.dropped or None,
                "largest_difference": one.difference,
                "milliseconds": {
                    size: round(statistics.median(taken), 5)
                    for size, taken in one.milliseconds.items()
                }
                or None,
                "spread": {size: spread(taken) for size, taken in one.milliseconds.items()} or None,
                "time_over_chosen": None if ratio is None else round(ratio, 4),
            }
        )
        last = one.dropped or ("not timed" if ratio is None else f"{ratio:.3f} of the time chosen")
        print(
            f"{case.name}: {sides(candidate.facts)}: {one.registers} registers, "
            f"{one.spilled_bytes} bytes spilled, {one.shared_bytes} shared, {last}",
            flush=True,
        )
    return {
        "kernel": case.kernel,
        "mode": case.mode,
        "sizes": list(case.sizes),
        "tolerance": case.tolerance,
        "chosen": case.candidates[0].facts,
        "fastest": None if fastest is None else case.candidates[fastest].facts,
        "fastest_over_chosen": None if fastest is None else rows[fastest]["time_over_chosen"],
        "candidates": rows,
    }


def spread(taken: list[float]) -> float:
    low, median, high = statistics.quantiles(taken, n=4)
    return round((high - low) / median, 4)


def sides(facts: dict[str, int]) -> str:
    return " ".join(f"{name} {value}" for name, value in facts.items())


def sweep(numbers: Sequence[int], file: ResultFile, *, processes: int, rounds: int) -> list[str]:
    """Build, compare and time some cases, write what is known after each; return what failed."""
    made = prepare_all(numbers, processes)
    clock = Clock() if torch.cuda.is_available() else None
    cases: list[dict[str, object]] = []
    failed = []
    for number in numbers:
        case, found, trouble = CASES[number], made[number], ""
        if clock is not None:
            trouble = measure(case, found, clock, rounds=rounds)
        entry = described(case, found)
        if trouble:
            entry |= {"fastest": None, "fastest_over_chosen": None}
            failed.append(f"{case.name}: {trouble}")
        elif any(one.dropped.startswith("differs") for one in found):
            failed.append(f"{case.name}: some candidates compute something else")
        cases.append({**entry, "trouble": trouble or None})
        file.write({"cases": cases}, measured=len(cases), of=len(numbers))
    return failed


def main() -> None:
    """Sweep the cases that are asked for, and exit with 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases with it")
    parser.add_argument("--rounds", type=int, default=15)
    processes = min(os.cpu_count() or 1, MOST_PROCESSES)
    parser.add_argument("--processes", type=int, default=processes, help="that build")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the findings")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: at least 2, for a spread")
    numbers = [
        number
        for number, case in enumerate(CASES)
        if not options.only or any(text in case.name for text in options.only)
    ]
    if not numbers:
        parser.error("--only: no case has it: " + "; ".join(case.name for case in CASES))
    has_gpu = torch.cuda.is_available()
    facts = {**machine(), "triton": triton.__version__}
    if has_gpu:
        facts["gpu"] = torch.cuda.get_device_name()
    result: dict[str, object] = {
        "command": " ".join(["python", "-m", "benchmarks.sweep", *sys.argv[1:]]),
        "commit": source_commit(),
        "machine": facts,
        "settings": {
            "capability": capability(),
            "rounds": options.rounds if has_gpu else 0,
            "flushed_bytes": FLUSHED_BYTES if has_gpu else 0,
            "shared_bytes_of_a_block": SHARED_BYTES,
        },
    }
    file = ResultFile(options.output, result, "cases")
    failed = sweep(numbers, file, processes=options.processes, rounds=options.rounds)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()

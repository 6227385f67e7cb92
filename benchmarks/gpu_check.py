"""Everything that needs a GPU, one after the other, within nine minutes: tests, then benchmarks.

    python -m benchmarks.gpu_check

Needs no environment of its own: it runs in that of the Python that runs it. Each step has a time
limit, and what fails or takes too long does not stop the next one; at the end the tables are
printed, and the exit status says whether all went well. Results are benchmarks/results/*-gpu.json.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

SECONDS: Final = 530.0  # for all steps; the tables take the rest of nine minutes
LEAST: Final = 10.0  # seconds; in fewer, no step comes to anything


@dataclass(frozen=True)
class Step:
    """A command of Python modules with its limit."""

    seconds: float
    words: tuple[str, ...]  # after `python -m`


def tests(seconds: float, *words: str) -> Step:
    return Step(seconds, ("pytest", "-q", *words))


def benchmark(seconds: float, name: str, *words: str, result: str = "") -> Step:
    output = f"benchmarks/results/{result or name}-gpu.json"
    return Step(seconds, (f"benchmarks.{name}", *words, "--output", output))


R50: Final = ("--model", "r50-1x", "--batch", "256", "--rounds", "3", "--steps", "4")
# To compile its strong baseline, or to build all four, would take minutes of the nine.
R152: Final = ("--model", "r152-3x-sk", "--batch", "64", "--rounds", "2", "--steps", "2",
               "--methods", "ours", "strong", "--eager")  # fmt: skip
SELECTIVE: Final = ("--model", "r152-3x-sk", "--batch", "128", "--memory", "selective",
                    "--rounds", "2", "--steps", "2", "--methods", "ours")  # fmt: skip
GRAPH: Final = ("--model", "r50-1x", "--batch", "64", "--cuda-graph",
                "--rounds", "3", "--steps", "10", "--methods", "ours")  # fmt: skip
# The limits together are more than there is, because few steps need theirs; what matters most
# comes first, and the largest network has what is left.
STEPS: Final = (
    # A package that only other tests need may be missing.
    tests(120, "-m", "gpu", "--continue-on-collection-errors"),
    tests(120, "tests/kernels", "tests/golden/test_augment.py", "-m", "not gpu and not slow"),
    benchmark(90, "loss", "--rounds", "5"),
    benchmark(90, "step", *R50, result="step-r50-1x"),
    benchmark(70, "optimizer", "--rounds", "10"),
    benchmark(40, "optimizer", "--model", "r152-3x-sk", "--rounds", "5", result="optimizer-r152"),
    benchmark(40, "augment", "--rounds", "7"),
    benchmark(60, "norm_act", "--rounds", "10"),
    benchmark(60, "select", "--rounds", "5"),
    benchmark(60, "step", *GRAPH, result="step-graph"),
    benchmark(200, "step", *R152, result="step-r152-3x-sk"),
    benchmark(90, "step", *SELECTIVE, result="step-selective"),
)


def run(step: Step, seconds: float) -> str:
    """Run a step and return what went wrong, or nothing."""
    command = [sys.executable, "-m", *step.words]
    print(f"\n--- {shlex.join(command[1:])}", flush=True)
    # A session of its own, so that the workers of a compiler end with it.
    process = subprocess.Popen(command, start_new_session=True)  # noqa: S603 - listed above
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {seconds:.0f} seconds"
    return "" if status == 0 else f"exit status {status}"


def run_all(steps: Sequence[Step], seconds: float, *, least: float = LEAST) -> list[str]:
    """Run the steps and return a line for each that failed.

    Args:
        steps: in their order.
        seconds: for all of them.
        least: a step that has fewer seconds left is not begun.
    """
    deadline = time.monotonic() + seconds
    failed = []
    for step in steps:
        left = min(step.seconds, deadline - time.monotonic())
        begin = time.monotonic()
        trouble = run(step, left) if left >= least else "no time left"
        print(f"--- {time.monotonic() - begin:.0f} s", flush=True)
        if trouble:
            failed.append(f"{shlex.join(step.words)}: {trouble}")
    return failed


def main() -> None:
    """Run everything, print the tables, and exit with 1 if a step failed."""
    failed = run_all(STEPS, SECONDS)
    if trouble := run(Step(60, ("benchmarks.render",)), 60):
        failed.append(f"benchmarks.render: {trouble}")
    for line in failed:
        print(f"gpu-check: failed: {line}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""Everything that needs a GPU, in parts of nine minutes: tests, then benchmarks.

    python -m benchmarks.gpu_check [PART]

check       the kernels' tests, then the benchmarks of speed; where no part is named
proof       golden tests and loss curves on the GPU, memory under the sanitizer, plain PyTorch
networks    the step of five networks beside the other loops, with profiles
sweep       every kernel with other tiles, warps and stages
input       a GPU's hardware decoder and the loader, on the folder or shards `photographs`

Needs no environment of its own: it runs in that of the Python that runs it. Each step has a time
limit, and what fails or takes too long does not stop the next one; at the end the tables are
printed, and the exit status says whether all went well. Results are benchmarks/results/*-gpu.json;
PART-steps-gpu.json says what became of each step, and what tests counted.

Where the checkout travels to the GPU alone, put the golden values into its folder shared/golden.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

from benchmarks.machine import machine
from bigsimclr.stages.run_directory import environment, source_commit

SECONDS: Final = 530.0  # for all steps; the tables take the rest of nine minutes
LEAST: Final = 10.0  # seconds; in fewer, no step comes to anything
WORKERS: Final = min(8, os.cpu_count() or 1)  # of tests; each holds half a gigabyte of a GPU


@dataclass(frozen=True)
class Step:
    """A command of Python modules with its limit."""

    seconds: float
    words: tuple[str, ...]  # after `python -m`


def tests(seconds: float, *words: str) -> Step:
    # Every test is named as it ends: what is stopped says nothing more.
    return Step(seconds, ("pytest", "-v", "--tb=short", *words))


def benchmark(seconds: float, name: str, *words: str, result: str = "") -> Step:
    output = f"benchmarks/results/{result or name}-gpu.json"
    return Step(seconds, (f"benchmarks.{name}", *words, "--output", output))


def race(seconds: float, model: str, batch: int, *words: str, result: str = "") -> Step:
    """Race our step of a network."""
    case = ("--model", model, "--batch", str(batch))
    return benchmark(seconds, "step", *case, *words, result=result or f"step-{model}")


SHORT: Final = ("--rounds", "2", "--steps", "2")
# To compile the strong baseline of the largest network, or to build all four, would take minutes.
R152: Final = (*SHORT, "--methods", "ours", "strong", "--compile", "blocks")
SELECTIVE: Final = (*SHORT, "--memory", "selective", "--methods", "ours")
GRAPH: Final = ("--cuda-graph", "--rounds", "3", "--steps", "10", "--methods", "ours")
# In each part the limits together are more than there is, because few steps need theirs; what
# matters most comes first, and the last has what is left.
CHECK: Final = (
    tests(150, "tests/kernels", "tests/golden/test_augment.py", "-m", "not slow"),
    # Folders of tests for a GPU, as to collect all tests takes as long as these. A package that
    # only others of them need may be missing. Those of `proof` have their turn there.
    tests(120, "tests/augment", "tests/engine", "tests/models", "tests/parallel", "tests/data",
          "tests/test_benchmark_sweep.py", "tests/test_benchmark_optimizer.py",
          "tests/test_benchmark_glance.py",
          "tests/test_benchmark_step.py",
          "-m", "gpu", "--continue-on-collection-errors"),
    benchmark(90, "glance"),  # what the others may have no time left for
    benchmark(90, "loss", "--rounds", "5"),
    race(120, "r50-1x", 256, "--rounds", "3", "--steps", "4", "--profile"),  # explains a miss
    benchmark(70, "optimizer", "--rounds", "10"),
    benchmark(40, "optimizer", "--model", "r152-3x-sk", "--rounds", "5", result="optimizer-r152"),
    benchmark(40, "augment", "--rounds", "7"),
    benchmark(60, "norm_act", "--rounds", "10"),
    benchmark(60, "select", "--rounds", "5"),
    race(60, "r50-1x", 64, *GRAPH, result="step-graph"),
    race(200, "r152-3x-sk", 64, *R152),
    race(90, "r152-3x-sk", 128, *SELECTIVE, result="step-selective"),
)  # fmt: skip
# The kernels build in the first of these, so that the sanitizer finds them built.
PROOF: Final = (
    tests(120, "tests/golden", "-m", "gpu"),
    tests(60, "tests/golden/test_optim.py", "tests/golden/test_loss.py", "-k", "fused"),
    tests(120, "tests/stages/test_on_gpu.py", "-m", "gpu"),
    benchmark(170, "precisions"),
    benchmark(230, "sanitize", "--seconds", "220"),
)
NETWORKS: Final = (
    race(120, "r50-1x", 256, "--rounds", "3", "--steps", "4", "--profile", result="network-r50-1x"),
    race(230, "r152-3x-sk", 64, *SHORT, "--compile", "blocks", "--profile",
         result="network-r152-3x-sk"),
    race(100, "r50-1x-sk", 256, *SHORT, "--compile", "blocks", "--profile",
         result="network-r50-1x-sk"),
    race(120, "r50-2x-sk", 128, *SHORT, "--compile", "blocks", "--profile",
         result="network-r50-2x-sk"),
    race(150, "r152-1x-sk", 128, *SHORT, "--compile", "blocks", "--profile",
         result="network-r152-1x-sk"),
)  # fmt: skip
SWEEP: Final = (benchmark(300, "sweep", "--rounds", "10"),)
INPUT: Final = (benchmark(300, "input", "--data", "photographs", "--workers", "8", "16"),)
PARTS: Final = {
    "check": CHECK,
    "proof": PROOF,
    "networks": NETWORKS,
    "sweep": SWEEP,
    "input": INPUT,
}


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    command: str
    seconds: float
    trouble: str  # nothing where it went well
    counted: dict[str, int]  # tests, by what became of them


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


def suited() -> list[str]:
    """Return options of pytest for the plugins that are here."""
    options = []
    if find_spec("xdist") is not None:
        # Tests of kernels wait for compilers, which run on the processor: several at once take a
        # fraction of the time. They are small, and share the one GPU.
        options += ["-n", str(WORKERS)]
    if find_spec("pytest_benchmark") is not None:
        options += ["-p", "no:benchmark"]  # beside xdist it warns, and a warning is an error here
    return options


def run_counted(step: Step, seconds: float) -> tuple[str, dict[str, int]]:
    """Run a step; return what went wrong and, of tests, how many passed, failed, were left out."""
    if step.words[0] != "pytest":
        return run(step, seconds), {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        words = (*step.words, *suited(), f"--junitxml={file}")
        trouble = run(Step(step.seconds, words), seconds)
        if not file.exists():
            return trouble, {}
        suite = ET.parse(file).getroot().find("testsuite")  # noqa: S314 - pytest's own
    assert suite is not None
    counts = {name: int(suite.attrib[name]) for name in ("failures", "errors", "skipped")}
    return trouble, {"passed": int(suite.attrib["tests"]) - sum(counts.values()), **counts}


def run_all(steps: Sequence[Step], seconds: float, *, least: float = LEAST) -> list[Outcome]:
    """Run the steps and return what became of each.

    Args:
        steps: in their order.
        seconds: for all of them.
        least: a step that has fewer seconds left is not begun.
    """
    deadline = time.monotonic() + seconds
    outcomes = []
    for step in steps:
        left = min(step.seconds, deadline - time.monotonic())
        begin = time.monotonic()
        trouble, counted = run_counted(step, left) if left >= least else ("no time left", {})
        taken = time.monotonic() - begin
        print(f"--- {taken:.0f} s", flush=True)
        outcomes.append(Outcome(shlex.join(step.words), round(taken, 1), trouble, counted))
    return outcomes


def main() -> None:
    """Run a part, print the tables, and exit with 1 if a step failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=PARTS, default="check")
    part: str = parser.parse_args().part
    where = {**environment(), **machine()}
    outcomes = run_all(PARTS[part], SECONDS)
    result = {
        "command": f"python -m benchmarks.gpu_check {part}",
        "commit": source_commit(),
        "machine": where,
        "steps": [asdict(outcome) for outcome in outcomes],
    }
    file = Path(f"benchmarks/results/{part}-steps-gpu.json")
    file.write_text(json.dumps(result, indent=1) + "\n")
    failed = [f"{one.command}: {one.trouble}" for one in outcomes if one.trouble]
    if trouble := run(Step(60, ("benchmarks.render",)), 60):
        failed.append(f"benchmarks.render: {trouble}")
    for line in failed:
        print(f"gpu-{part}: failed: {line}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()

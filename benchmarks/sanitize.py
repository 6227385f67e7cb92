"""The kernels' small tests under compute-sanitizer: reads and writes out of bounds, and races.

    python -m benchmarks.sanitize -o benchmarks/results/sanitize-gpu.json

Tests of sizes that fill no tile, one or a few of each kernel; each file of tests and each tool in a
process of its own, as long as there is time. Every tensor has an allocation of its own with nothing
behind it, since PyTorch's would hide what goes beyond one tensor into the next. Only our kernels
are watched. The tests must have passed without the sanitizer before: under it they compute the
same, slowly.

compute-sanitizer comes with the CUDA toolkit, and as the wheel nvidia-cuda-sanitizer-api.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from benchmarks.kernel_classes import OURS
from benchmarks.machine import machine
from bigsimclr.stages.run_directory import environment, source_commit

Tool = Literal["memcheck", "racecheck"]
TOOLS: Final[tuple[Tool, ...]] = get_args(Tool)
PROGRAM: Final = "compute-sanitizer"
WHEEL: Final = "nvidia-cuda-sanitizer-api"
FOLDER: Final = "tests/kernels"
# By file of tests, those that run, as pytest's -k takes them: all kernels, sizes with remainders.
TESTS: Final[dict[str, str]] = {
    "test_nt_xent": "test_any_size or (test_any_temperature_and_queue and 70)",
    "test_norm_act": "test_values_and_gradients",
    "test_norm_statistics": "test_of_one_and_of_several_tiles",
    "test_select": "test_values_and_gradients or test_any_cut_of_the_images",
    "test_max_pool": "test_values_and_gradients or test_any_tiles",
    "test_lars": "test_it_is_the_plain_update or test_tensors_may_begin_anywhere",
    "test_distort": "test_blur_alone or test_all_orders or test_any_strides",
}
FAILED: Final = 99  # the status with which the sanitizer ends where it found something
PADDING: Final = 4096  # bytes behind each allocation that nothing may touch
LEAST: Final = 15.0  # seconds; in fewer, no process comes to anything
_SUMMARY: Final = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazard"),
}
_SHOWN_LINES: Final = 40


@dataclass(frozen=True)
class Finding:
    """What one tool said of one file of tests."""

    tool: Tool
    tests: str
    outcome: Literal["clean", "errors", "tests failed", "stopped", "no summary"]
    errors: int | None  # None where it came to no summary
    passed: int  # tests
    seconds: float
    said: list[str]  # the first lines of what it said, unless clean


def find_program() -> str | None:
    """Return where compute-sanitizer lies: on the PATH, in the toolkit, or in the wheel."""
    if found := shutil.which(PROGRAM):
        return found
    toolkit = Path("/usr/local/cuda/bin") / PROGRAM
    if toolkit.exists():
        return str(toolkit)
    specification = importlib.util.find_spec("nvidia")
    places = () if specification is None else specification.submodule_search_locations or ()
    for place in places:
        for program in sorted(Path(place).glob(f"cu*/bin/{PROGRAM}")):
            return str(program)
    return None


def command_of(program: str, tool: Tool, tests: str, log: Path) -> list[str]:
    """Return the command that runs a file of tests under a tool."""
    options = ["--tool", tool, "--target-processes", "application-only", "--print-limit", "20"]
    options += ["--error-exitcode", str(FAILED), "--log-file", str(log)]
    if tool == "memcheck":
        # Libraries ask for what may not be there, and that is not an error.
        options += ["--padding", str(PADDING), "--report-api-errors", "no"]
    for name in OURS:
        options += ["--kernel-name", f"kernel_name={name}"]
    pytest = ["pytest", "-q", "-p", "no:cacheprovider", f"{FOLDER}/{tests}.py", "-k", TESTS[tests]]
    chosen = ["-m", "not slow and not gpu"]
    return [program, *options, sys.executable, "-m", *pytest, *chosen]


def watch(program: str, tool: Tool, tests: str, seconds: float) -> Finding:
    """Run a file of tests under a tool, for so long at most."""
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with (Path(folder) / "output").open("w+") as output:
            # A session of its own, so that what it starts ends with it.
            process = subprocess.Popen(  # noqa: S603 - made here
                command_of(program, tool, tests, log),
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = None
            output.seek(0)
            printed = output.read()
        said = log.read_text(errors="replace") if log.exists() else ""
    return judge(tool, tests, status, said, printed, seconds=time.monotonic() - begin)


def judge(
    tool: Tool,
    tests: str,
    status: int | None,  # None: stopped
    said: str,  # by the sanitizer
    printed: str,  # by the tests
    *,
    seconds: float,
) -> Finding:
    """Make a finding of how a process ended and of what it said."""
    summaries = _SUMMARY[tool].findall(said)
    errors = sum(map(int, summaries)) if summaries else None
    passed = re.search(r"(\d+) passed", printed)
    count = 0 if passed is None else int(passed[1])
    shown = (said + "\n" + printed).strip().splitlines()[:_SHOWN_LINES]
    seconds = round(seconds, 1)
    if errors:
        return Finding(tool, tests, "errors", errors, count, seconds, shown)
    tail = (said + "\n" + printed).strip().splitlines()[-_SHOWN_LINES:]
    if status is None:
        return Finding(tool, tests, "stopped", errors, count, seconds, tail)
    if errors is None:
        return Finding(tool, tests, "no summary", None, count, seconds, tail)
    if status or not count:
        return Finding(tool, tests, "tests failed", errors, count, seconds, tail)
    return Finding(tool, tests, "clean", 0, count, seconds, [])


def watch_all(program: str, tools: Sequence[Tool], seconds: float) -> list[Finding]:
    """Run every file of tests under every tool, as far as the time goes."""
    deadline = time.monotonic() + seconds
    findings: list[Finding] = []
    for tool in tools:
        for tests in TESTS:
            left = deadline - time.monotonic()
            if left < LEAST:
                print(f"{tool:>9} {tests:<22} no time left", flush=True)
                continue
            found = watch(program, tool, tests, left)
            findings.append(found)
            print(
                f"{tool:>9} {tests:<22} {found.outcome}, {found.passed} tests, "
                f"{found.seconds:.0f} s",
                flush=True,
            )
    return findings


def main() -> None:
    """Write what was found, and exit with 1 if it was anything, or nothing could be watched."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--seconds", type=float, default=420.0, help="for all of it")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the findings")
    options = parser.parse_args()
    program = find_program()
    if program is None:
        raise SystemExit(f"{PROGRAM} is missing: put it on the PATH, or pip install {WHEEL}")
    where = {**environment(), **machine()}
    version = subprocess.run(  # noqa: S603 - found above
        [program, "--version"], capture_output=True, text=True, check=False
    )
    findings = watch_all(program, options.tools, options.seconds)
    result = {
        "command": " ".join(["python", "-m", "benchmarks.sanitize", *sys.argv[1:]]),
        "commit": source_commit(),
        "machine": where,
        "sanitizer": version.stdout.strip().splitlines()[-1:],
        "kernels": sorted(OURS),
        "errors": sum(found.errors or 0 for found in findings),
        "findings": [asdict(found) for found in findings],
        "not_run": [
            {"tool": tool, "tests": tests}
            for tool in options.tools
            for tests in TESTS
            if (tool, tests) not in {(found.tool, found.tests) for found in findings}
        ],
    }
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(0 if all(found.outcome == "clean" for found in findings) else 1)


if __name__ == "__main__":
    main()

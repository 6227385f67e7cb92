"""Which kernels a piece of work launches on a GPU, and how long each of them takes."""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernel_classes import KernelTime, by_class

# Of a trace's events; annotations of ranges are drawn on the GPU as well, over their kernels.
_ON_THE_GPU: Final = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Trace:
    """Some steps as the profiler saw them."""

    kernels: Sequence[KernelTime]
    steps: int
    busy_seconds: float  # in which at least one kernel ran
    seconds: float  # from before the first step until the GPU was done


def trace(step: Callable[[], object], *, steps: int) -> Trace:
    """Run some steps under the profiler; make a few of them before.

    The profiler itself takes time on the host, so that a step which waits for its host looks slower
    than it is; how long kernels take does not change.
    """
    torch.cuda.synchronize()
    # There is one cycle, so that nothing accumulates; without it PyTorch warns of several.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return Trace(kernels_of(events), steps, busy_seconds(events), seconds)


def kernels_of(events: Sequence[Mapping[str, Any]]) -> list[KernelTime]:
    """Add up the launches of each kernel in a Chrome trace, whose durations are microseconds."""
    found: dict[str, list[float]] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in _ON_THE_GPU:
            found.setdefault(event["name"], []).append(float(event["dur"]))
    return [KernelTime(name, sum(times), len(times)) for name, times in found.items()]


def busy_seconds(events: Sequence[Mapping[str, Any]]) -> float:
    """Return for how long at least one kernel of a Chrome trace ran."""
    spans = sorted(
        (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in _ON_THE_GPU
    )
    total, reached = 0.0, -float("inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total / 1e6


def facts(found: Trace) -> dict[str, object]:
    """Describe a trace by one of its steps."""
    steps = found.steps
    each = [
        KernelTime(one.name, one.microseconds / steps, round(one.launches / steps))
        for one in found.kernels
    ]
    return {
        "steps": steps,
        "step_milliseconds": round(1e3 * found.seconds / steps, 3),
        "busy_milliseconds": round(1e3 * found.busy_seconds / steps, 3),
        "launches": round(sum(one.launches for one in found.kernels) / steps),
        "classes": by_class(each),
    }

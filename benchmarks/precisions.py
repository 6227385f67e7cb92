"""ResNet-50 in plain PyTorch on a GPU: what precision and layout are worth, and who normalises.

    python -m benchmarks.precisions -o benchmarks/results/precisions-gpu.json

A supervised step of the plain network with a linear classifier: forward, cross-entropy, backward
and SGD, on images that lie on the device. What our own step gains is measured elsewhere; this says
what PyTorch itself gives, and whether it leaves bf16's batch norm to its own kernels, as its source
says, or to cuDNN.

Ways are measured one after the other. The median of the rounds counts; spread is largest less
smallest, over the median. Then the profiler watches two more steps: time by class of kernels, and
the names of those that normalise.
"""

import argparse
import gc
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.kernel_classes import KernelTime
from benchmarks.kernel_trace import facts, trace
from benchmarks.loops import SEED, Case, initial_weights
from benchmarks.machine import machine
from benchmarks.networks import network
from benchmarks.plain_network import plain_network
from bigsimclr.stages.run_directory import environment, source_commit
from bigsimclr.world import ALONE, use_device

CLASSES: Final = 1000
WARM_STEPS: Final = 4
TRACED_STEPS: Final = 2
SCALE: Final = 1024.0  # of the loss, so that fp16 gradients do not vanish; in all ways alike
LEARNING_RATE: Final = 1e-3
# Of the first loss, from float32's; 16 bits round each of fifty layers by 1/512 or 1/4096.
TOLERANCE: Final = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_NORM: Final = re.compile(r"batch_?norm|\bbn_(fw|bw)", re.IGNORECASE)


@dataclass(frozen=True)
class Way:
    """How the step is computed."""

    dtype: torch.dtype
    tf32: bool = False  # convolutions of float32 in 10 bits
    channels_last: bool = True
    compiled: bool = False


WAYS: Final[dict[str, Way]] = {
    "fp32": Way(torch.float32),
    "tf32": Way(torch.float32, tf32=True),
    "fp16": Way(torch.float16),
    "bf16": Way(torch.bfloat16),
    "fp16_contiguous": Way(torch.float16, channels_last=False),
    "bf16_contiguous": Way(torch.bfloat16, channels_last=False),
    "bf16_compiled": Way(torch.bfloat16, compiled=True),
}


class Step:
    """The supervised step."""

    def __init__(self, way: Way, case: Case, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(SEED)
        images = torch.rand(case.batch, 3, case.size, case.size, generator=generator)
        labels = torch.randint(CLASSES, (case.batch,), generator=generator)
        self._network = plain_network(network(case.model), initial_weights(case))
        classifier = nn.Linear(self._network.backbone.feature_width, CLASSES)
        with torch.no_grad():
            classifier.weight.normal_(std=0.01, generator=generator)
            classifier.bias.zero_()
        self._network.head = classifier  # type: ignore[assignment] # of another kind
        layout = torch.channels_last if way.channels_last else torch.contiguous_format
        self._network.to(device, memory_format=layout)  # type: ignore[call-overload]
        self._images = images.to(device, memory_format=layout)
        self._labels = labels.to(device)
        self._way = way
        self._optimizer = torch.optim.SGD(
            self._network.parameters(), LEARNING_RATE / SCALE, momentum=0.9, fused=True
        )
        self._loss = torch.compile(self._plain_loss) if way.compiled else self._plain_loss

    def _plain_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        dtype = self._way.dtype
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = self._network(images)
        return F.cross_entropy(logits.float(), labels)

    def __call__(self) -> Tensor:
        """Make one update and return its loss []."""
        loss = self._loss(self._images, self._labels)
        (loss * SCALE).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()


def normalisers(kernels: Iterable[KernelTime]) -> dict[str, object]:
    """Say whose kernels batch norm runs in, and name them, the slowest first."""
    found = sorted(
        (one for one in kernels if _NORM.search(one.name)),
        key=lambda one: one.microseconds,
        reverse=True,
    )
    makers = {
        "cudnn"
        if re.search(r"cudnn|\bbn_(fw|bw)", one.name)
        else "compiled"
        if one.name.startswith("triton")
        else "native"
        for one in found
    }
    return {"by": sorted(makers), "kernels": [one.name[:160] for one in found]}


def measure(
    way: Way, case: Case, device: torch.device, *, rounds: int, steps: int
) -> dict[str, Any]:
    """Measure one way.

    Raises:
        torch.OutOfMemoryError: the batch does not fit.
    """
    on_gpu = device.type == "cuda"
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=way.tf32):
        begin = time.perf_counter()
        step = Step(way, case, device)
        losses = [float(step()) for _ in range(WARM_STEPS)]
        ready = time.perf_counter() - begin
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        rates = [case.batch / seconds_of(step, steps, on_gpu=on_gpu) for _ in range(rounds)]
        found: dict[str, Any] = {
            "dtype": str(way.dtype).removeprefix("torch."),
            "tf32": way.tf32,
            "channels_last": way.channels_last,
            "compiled": way.compiled,
            "batch": case.batch,
            "images_per_second": round(statistics.median(rates), 2),
            "images_per_second_of_rounds": [round(rate, 2) for rate in rates],
            "spread": round((max(rates) - min(rates)) / statistics.median(rates), 3),
            "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "seconds_until_ready": round(ready, 1),
            "first_losses": losses,
        }
        if on_gpu:
            seen = trace(step, steps=TRACED_STEPS)
            found |= {"normalisers": normalisers(seen.kernels), "profile": facts(seen)}
    return found


def seconds_of(step: Step, steps: int, *, on_gpu: bool) -> float:
    """Return what one of several steps takes, until the device is done with all of them."""
    if on_gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / steps


def measure_what_fits(
    way: Way, case: Case, device: torch.device, *, rounds: int, steps: int
) -> dict[str, Any]:
    """Measure one way, with half the images as often as memory runs out."""
    batch = case.batch
    while batch:
        try:
            smaller = Case(case.model, batch, case.size)
            return measure(way, smaller, device, rounds=rounds, steps=steps)
        except torch.OutOfMemoryError:
            batch //= 2
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {"out_of_memory": True}


def check(ways: dict[str, dict[str, Any]]) -> None:
    """Refuse figures of ways that compute something else than the first one.

    Raises:
        ValueError: a first loss is another one.
    """
    right: float | None = None
    for name, found in ways.items():
        if "first_losses" not in found:
            continue
        loss = found["first_losses"][0]
        right = loss if right is None else right
        tolerance = TOLERANCE[WAYS[name].dtype]
        if not math.isclose(loss, right, rel_tol=tolerance):
            raise ValueError(f"{name} begins with a loss of {loss}, not {right}")


def line(name: str, found: dict[str, Any]) -> str:
    """Return a row of the printed table."""
    if "out_of_memory" in found:
        return f"{name:>16}  out of memory"
    by = ", ".join(found["normalisers"]["by"]) if "normalisers" in found else "-"
    return (
        f"{name:>16} {found['batch']:>5} {found['images_per_second']:>9.1f} "
        f"{found['spread']:>6.0%} {(found['peak_bytes'] or 0) / 1e9:>7.2f}  {by}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="r50-1x", help="as benchmarks.networks names it")
    parser.add_argument("--batch", type=int, default=256, help="images; halved until it fits")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps of a round")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the findings")
    options = parser.parse_args()
    where = {**environment(), **machine()}
    device = use_device(ALONE, options.device).device
    case = Case(options.model, options.batch, options.size)
    print(f"{case.model}, {case.size} px, {device.type}")
    print(f"{'way':>16} {'batch':>5} {'images/s':>9} {'spread':>6} {'peak GB':>7}  batch norm by")
    result: dict[str, Any] = {
        "command": " ".join(["python", "-m", "benchmarks.precisions", *sys.argv[1:]]),
        "commit": source_commit(),
        "device": device.type,
        "machine": where,
        "settings": {"model": case.model, "size": case.size, "rounds": options.rounds,
                     "steps": options.steps},
        "ways": {},
    }  # fmt: skip
    for name in options.ways:
        found = measure_what_fits(
            WAYS[name], case, device, rounds=options.rounds, steps=options.steps
        )
        print(line(name, found), flush=True)
        result["ways"][name] = found
        if options.output is not None:  # after each: what comes later may take too long
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    check(result["ways"])


if __name__ == "__main__":
    main()

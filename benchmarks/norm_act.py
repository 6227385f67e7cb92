"""Fused batch norm side by side with PyTorch's, eager and compiled, and with the memory's speed.

    python -m benchmarks.norm_act

Needs a GPU. For every shape of a ResNet-50's batch norms, 128 views (64 images) of 224 pixels:

* each pass of the kernels alone, in bytes read and written per second, beside a copy of as many
  bytes (half read, half written) by `Tensor.clone`;
* forward and backward pass of the kernels, of `F.batch_norm` with `add_` and `relu_`, and of the
  same under `torch.compile`; and their sum over the network's 53 batch norms.

In every round each of them runs once, in turns. Before each run a gigabyte is overwritten, which
empties the cache and gives the host time to launch what is timed. GPU events take the time; the
median of the rounds counts, and the least and most are its spread.

Before a layer is measured, the kernels' and PyTorch's values and gradients are compared with
float64. The passes of all layers come first: to compile PyTorch's for each layer takes longer. The
file is written after every layer.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import machine
from benchmarks.result_file import ResultFile
from bigsimclr.stages.run_directory import source_commit

EPSILON = 1e-5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RESULTS = Path(__file__).parent / "results" / "norm_act.json"
FLUSHED_BYTES = 1 << 30

Leaves = tuple[Tensor, Tensor, Tensor, Tensor | None]  # inputs, weight, bias, residual
Forward = Callable[[Leaves], Tensor]


@dataclass(frozen=True)
class Layer:
    """A batch norm of ResNet-50."""

    side: int  # positions along each axis
    channels: int
    is_last: bool = False  # of a block: a residual is added
    relu: bool = True
    count: int = 1  # in the network

    @property
    def name(self) -> str:
        """Say what it is."""
        after = " + residual" * self.is_last + " + ReLU" * self.relu
        return f"{self.side}x{self.side}x{self.channels}{after}"


LAYERS = (
    Layer(112, 64),
    Layer(56, 64, count=6),
    Layer(56, 256, is_last=True, count=3),
    Layer(56, 256, relu=False),
    Layer(56, 128),
    Layer(28, 128, count=7),
    Layer(28, 512, is_last=True, count=4),
    Layer(28, 512, relu=False),
    Layer(28, 256),
    Layer(14, 256, count=11),
    Layer(14, 1024, is_last=True, count=6),
    Layer(14, 1024, relu=False),
    Layer(14, 512),
    Layer(7, 512, count=5),
    Layer(7, 2048, is_last=True, count=3),
    Layer(7, 2048, relu=False),
)


def drawn(layer: Layer, views: int, dtype: torch.dtype) -> tuple[Leaves, Tensor]:
    """Return a layer's leaves, and a gradient of its outputs."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    def image() -> Tensor:
        values = draw(views, layer.channels, layer.side, layer.side)
        return values.to(dtype, memory_format=torch.channels_last)

    inputs, upstream, weight, bias = image(), image(), draw(layer.channels), draw(layer.channels)
    residual = image().requires_grad_() if layer.is_last else None
    leaves = inputs.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), residual
    return leaves, upstream


def fused(relu: bool) -> Forward:  # noqa: FBT001 - it says what the layer does
    from bigsimclr.kernels.norm_act import norm_act
    from bigsimclr.kernels.norm_statistics import batch_statistics

    def forward(leaves: Leaves) -> Tensor:
        inputs, *others = leaves
        mean, variance = batch_statistics(inputs.detach())
        return norm_act(inputs, mean, variance, *others, epsilon=EPSILON, relu=relu)

    return forward


def eager(relu: bool) -> Forward:  # noqa: FBT001
    def forward(leaves: Leaves) -> Tensor:
        inputs, weight, bias, residual = leaves
        outputs = F.batch_norm(inputs, None, None, weight, bias, training=True, eps=EPSILON)
        if residual is not None:
            outputs = outputs.add_(residual)
        return F.relu(outputs, inplace=True) if relu else outputs

    return forward


def methods(layer: Layer) -> dict[str, Forward]:
    """Return what is compared."""
    return {
        "fused": fused(layer.relu),
        "eager": eager(layer.relu),
        "compiled": torch.compile(eager(layer.relu)),
    }


def gradients(outputs: Tensor, leaves: Leaves, upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, [leaf for leaf in leaves if leaf is not None], upstream)


def errors(layer: Layer, dtype: torch.dtype) -> dict[str, float]:
    """Return the largest errors against float64, relative to the largest value.

    What PyTorch compiles is PyTorch's own, and takes long.
    """
    leaves, upstream = drawn(layer, 4, dtype)
    exact_leaves = tuple(
        None if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves
    )
    found = {}
    for name, forward in {"fused": fused(layer.relu), "eager": eager(layer.relu)}.items():
        outputs = forward(leaves)
        slopes = gradients(outputs, leaves, upstream)
        inputs, weight, bias, residual = exact_leaves
        exact = F.batch_norm(inputs, None, None, weight, bias, training=True, eps=EPSILON)
        if residual is not None:
            exact = exact + residual
        if layer.relu:  # open where the method has it open: some values round to zero
            exact = exact * (outputs > 0)
        pairs = zip(
            (outputs, *slopes),
            (exact, *gradients(exact, exact_leaves, upstream.double())),
            strict=True,
        )
        found[name] = max(
            float((one.detach() - other.detach()).abs().max() / other.detach().abs().max())
            for one, other in pairs
        )
    assert found["fused"] < 2 * torch.finfo(dtype).eps + 1e-5, f"{layer.name}: {found}"
    return found


class Clock:
    """Times what a GPU does, after emptying its cache."""

    def __init__(self) -> None:
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")

    def milliseconds(self, work: Callable[[], object]) -> float:
        """Run something once."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        begin.record()
        kept = work()  # nothing is freed before the end
        end.record()
        end.synchronize()
        del kept
        return begin.elapsed_time(end)


def passes(layer: Layer, views: int, dtype: torch.dtype) -> dict[str, tuple[int, Callable]]:
    """Return bytes and work of each pass of the kernels."""
    from bigsimclr.kernels.norm_act import norm_act
    from bigsimclr.kernels.norm_gradients import differentiate_inputs, sum_gradients
    from bigsimclr.kernels.norm_statistics import batch_statistics

    leaves, upstream = drawn(layer, views, dtype)
    inputs, weight, bias, residual = (None if leaf is None else leaf.detach() for leaf in leaves)
    assert inputs is not None
    mean, variance = batch_statistics(inputs)
    channels = mean, variance, weight, bias
    way = {"epsilon": EPSILON, "relu": layer.relu}
    outputs = norm_act(inputs, *channels, residual, **way) if layer.is_last else None
    sums, gated = sum_gradients(upstream, inputs, outputs, channels, **way)
    size = inputs.nbytes

    def differentiate() -> object:
        # Where there is a residual, the first pass has written what ReLU lets through.
        gates = layer.relu and not layer.is_last
        return differentiate_inputs(
            gated, inputs, channels, sums, ranks=1, epsilon=EPSILON, relu=gates
        )

    return {
        "statistics": (size, lambda: batch_statistics(inputs)),
        "apply": (
            (2 + layer.is_last) * size,
            lambda: norm_act(inputs, *channels, residual, **way),
        ),
        "sums": (
            (2 + 2 * layer.is_last) * size,
            lambda: sum_gradients(upstream, inputs, outputs, channels, **way),
        ),
        "gradients": (3 * size, differentiate),
    }


def spread(taken: list[float]) -> dict[str, float]:
    """Return median, least and most of milliseconds."""
    return {
        "median_ms": round(statistics.median(taken), 5),
        "min_ms": round(min(taken), 5),
        "max_ms": round(max(taken), 5),
    }


def time_passes(
    layer: Layer, clock: Clock, *, views: int, dtype: torch.dtype, rounds: int
) -> dict[str, dict[str, float]]:
    """Time each pass, and a copy of as many bytes."""
    timed: dict[str, tuple[int, Callable]] = {}
    for name, (size, work) in passes(layer, views, dtype).items():
        copied = torch.zeros(size // 2, dtype=torch.int8, device="cuda")
        timed[name] = size, work
        timed[f"copy for {name}"] = size, copied.clone
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 2):
        for name, (_, work) in timed.items():
            milliseconds = clock.milliseconds(work)
            if number >= 2:  # the first compile, and meet what is not there yet
                taken[name].append(milliseconds)
    found = {}
    for name, (size, _) in timed.items():
        if name.startswith("copy for "):
            continue
        seconds = statistics.median(taken[name]) / 1e3
        copying = statistics.median(taken[f"copy for {name}"]) / 1e3
        found[name] = {
            **spread(taken[name]),
            "bytes": size,
            "gigabytes_per_second": round(size / seconds / 1e9, 1),
            "copy_gigabytes_per_second": round(size / copying / 1e9, 1),
            "fraction_of_copy": round(copying / seconds, 3),
        }
    return found


def time_methods(
    layer: Layer, clock: Clock, *, views: int, dtype: torch.dtype, rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Time forward and backward pass of each method."""
    leaves, upstream = drawn(layer, views, dtype)
    compared = methods(layer)
    taken: dict[str, dict[str, list[float]]] = {
        name: {"forward": [], "backward": []} for name in compared
    }
    made: list[Tensor] = []
    for number in range(rounds + 2):
        for name, forward in compared.items():
            made.clear()
            ahead = clock.milliseconds(lambda forward=forward: made.append(forward(leaves)))
            back = clock.milliseconds(lambda: gradients(made[0], leaves, upstream))
            if number >= 2:
                taken[name]["forward"].append(ahead)
                taken[name]["backward"].append(back)
    return {
        name: {way: spread(found) for way, found in ways.items()} for name, ways in taken.items()
    }


def totals_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the milliseconds of all batch norms of the network, by method and direction."""
    return {
        name: {
            way: round(
                sum(row["count"] * row["methods"][name][way]["median_ms"] for row in rows), 3
            )
            for way in ("forward", "backward")
        }
        for name in rows[0]["methods"]
    }


def measure(file: ResultFile, *, views: int, dtype: torch.dtype, rounds: int) -> None:
    """Measure all layers, print what they take, and write it after each."""
    clock = Clock()
    rows: list[dict[str, Any]] = []
    way = {"views": views, "dtype": dtype, "rounds": rounds}
    for layer in LAYERS:
        row = {
            "layer": layer.name,
            "count": layer.count,
            "relative_errors_against_float64": errors(layer, dtype),
            "passes": time_passes(layer, clock, **way),
        }
        rows.append(row)
        fractions = ", ".join(f"{n} {p['fraction_of_copy']:.0%}" for n, p in row["passes"].items())
        print(f"{layer.name}: of a copy's speed {fractions}", flush=True)
        file.write({"layers": rows}, measured=0, of=len(LAYERS))
    for number, (layer, row) in enumerate(zip(LAYERS, rows, strict=True), start=1):
        torch.compiler.reset()  # else it would count shapes, and make one function for many
        row["methods"] = time_methods(layer, clock, **way)
        times = ", ".join(
            f"{name} {sum(found['median_ms'] for found in ways.values()):.3f}"
            for name, ways in row["methods"].items()
        )
        print(f"{layer.name}: ms {times}", flush=True)
        totals = {"network_milliseconds": totals_of(rows)} if number == len(LAYERS) else {}
        file.write({**totals, "layers": rows}, measured=number, of=len(LAYERS))
    print(f"all {sum(layer.count for layer in LAYERS)} of the network, ms: {totals_of(rows)}")


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.norm_act needs a GPU", file=sys.stderr)
        raise SystemExit(2)
    import triton

    facts = {
        "command": f"python -m benchmarks.norm_act --views {arguments.views} "
        f"--dtype {arguments.dtype} --rounds {arguments.rounds}",
        "commit": source_commit(),
        "machine": {
            **machine(),
            "gpu": torch.cuda.get_device_name(),
            "triton": triton.__version__,
        },
        "settings": {
            "views": arguments.views,
            "dtype": arguments.dtype,
            "rounds": arguments.rounds,
            "flushed_bytes": FLUSHED_BYTES,
        },
    }
    measure(
        ResultFile(arguments.output, facts, "layers"),
        views=arguments.views,
        dtype=DTYPES[arguments.dtype],
        rounds=arguments.rounds,
    )


if __name__ == "__main__":
    main()

"""Selective kernels between their convolutions: eager, compiled and fused, on one GPU.

    python -m benchmarks.select

What is timed is all of `SelectiveKernel` but its 3x3 convolution, under bf16 autocast: statistics,
batch norm, ReLU, pooling, the little network that chooses, and mixing. Every way is captured in a
CUDA graph, so that the GPU is measured and not the host. Every round runs every way, in turns, and
the median of the rounds counts.

GB/s count what the fused code moves, 15 times the mixed result and 7 of it forward, whichever way
is timed; the plain code moves more for the same. Beside them stands the speed of a copy of 1 GiB.
Layers that fit into the cache of the GPU (50 MB on an H100) can be faster than that.

Before anything is measured, values and gradients are compared with float64. The file is written
after every layer.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor, nn

from benchmarks.capture import captured
from benchmarks.machine import machine
from benchmarks.result_file import ResultFile
from bigsimclr.models.selective import SelectiveKernel, fuse_selective_kernels
from bigsimclr.stages.run_directory import source_commit

RESULTS = Path(__file__).parent / "results" / "select.json"
# Features of a stream and side, of each group of a network at 224 pixels.
LAYERS = {
    "R50 1x SK": [(64, 56), (128, 28), (256, 14), (512, 7)],
    "R152 3x SK": [(192, 56), (384, 28), (768, 14), (1536, 7)],
}
FORWARD_PASSES, PASSES = 7, 15  # over the mixed result, of 2 bytes a value
WAYS = ("eager", "compiled", "fused")


def build(features: int, way: str) -> nn.Module:
    """Return the module without its convolution."""
    generator = torch.Generator().manual_seed(0)
    module = SelectiveKernel(1, features, stride=1, generator=generator).train().cuda()
    module.conv = nn.Identity()
    if way == "fused":
        fuse_selective_kernels(module)
    if way != "compiled":
        return module
    torch.compiler.reset()  # so that no size of an earlier layer makes this one's dynamic
    return torch.compile(module, dynamic=False)


def drawn(images: int, features: int, side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the convolution's result [N, 2F, H, W] and a gradient [N, F, H, W]."""
    generator = torch.Generator("cuda").manual_seed(0)
    inputs, upstream = (
        torch.randn(images, channels, side, side, generator=generator, device="cuda")
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for channels in (2 * features, features)
    )
    return inputs.requires_grad_(), upstream


def errors() -> dict[str, float]:
    """Compare the fused code in float32 with the plain code in float64."""
    features = 70
    inputs, upstream = drawn(8, features, 9, torch.float32)
    exact_inputs = inputs.detach().double().requires_grad_()
    plain = build(features, "eager")
    assert isinstance(plain, SelectiveKernel)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        mixed = build(features, "fused")(inputs)
        exact = plain.double()(exact_inputs)
        (gradient,) = torch.autograd.grad(mixed, inputs, upstream)
        (exact_gradient,) = torch.autograd.grad(exact, exact_inputs, upstream.double())
    pairs = {"mixed": (mixed.detach(), exact.detach()), "gradient": (gradient, exact_gradient)}
    found = {
        name: float((one - other).abs().max() / other.abs().max())
        for name, (one, other) in pairs.items()
    }
    assert max(found.values()) < 1e-4, f"the fused code computes something else: {found}"
    return found


def seconds(work: Callable[[], object]) -> float:
    """Return what the GPU takes, a mean over ten times."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e4


def copy_speed() -> float:
    """Return bytes read and written per second by a copy of 1 GiB, at its best of ten."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / min(seconds(lambda: target.copy_(source)) for _ in range(10))


def times(
    images: int, features: int, side: int, *, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Return every way's seconds per round, forward, and forward and backward."""
    inputs, upstream = drawn(images, features, side, torch.bfloat16)

    def forward(module: nn.Module) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            mixed: Tensor = module(inputs)
        return mixed

    def both(module: nn.Module) -> None:
        torch.autograd.grad(forward(module), (inputs, *module.parameters()), upstream)

    graphs = {}
    for way in WAYS:
        module = build(features, way)
        graphs[way] = tuple(captured(partial(work, module)) for work in (forward, both))
    found: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in WAYS}
    for _ in range(rounds):
        for way, works in graphs.items():
            for work, taken in zip(works, found[way], strict=True):
                taken.append(seconds(work))
    return found


def rows_of(
    network: str, features: int, side: int, *, images: int, rounds: int, peak: float
) -> list[dict[str, object]]:
    """Measure a layer, print its lines of the table and return its rows."""
    found = times(images, features, side, rounds=rounds)
    unit = 2 * images * features * side * side
    rows: list[dict[str, object]] = []
    for way, (forward, both) in found.items():
        median_forward, median = statistics.median(forward), statistics.median(both)
        speed = PASSES * unit / median
        rows.append(
            {
                "network": network,
                "features": features,
                "side": side,
                "way": way,
                "median_forward_ms": round(median_forward * 1e3, 4),
                "median_ms": round(median * 1e3, 4),
                "min_ms": round(min(both) * 1e3, 4),
                "gigabytes_per_second": round(speed / 1e9, 1),
                "forward_share_of_copy": round(FORWARD_PASSES * unit / median_forward / peak, 3),
                "share_of_copy": round(speed / peak, 3),
                "time_over_eager": round(median / statistics.median(found["eager"][1]), 3),
            }
        )
        print(
            f"{network:>11} {features:>8} {side:>4} {way:>8} {median * 1e3:>7.3f} "
            f"{speed / 1e9:>6.0f} {speed / peak:>6.1%}",
            flush=True,
        )
    return rows


def measure(file: ResultFile, *, images: int, rounds: int, peak: float) -> None:
    """Measure every layer, print the table, and write it after each."""
    print(
        f"{'network':>11} {'features':>8} {'side':>4} {'way':>8} {'ms':>7} {'GB/s':>6} {'copy':>6}"
    )
    layers = [(network, *layer) for network, some in LAYERS.items() for layer in some]
    rows: list[dict[str, object]] = []
    for number, layer in enumerate(layers, start=1):
        rows += rows_of(*layer, images=images, rounds=rounds, peak=peak)
        file.write({"results": rows}, measured=number, of=len(layers))


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=128, help="views in a batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.select measures a GPU, and there is none here", file=sys.stderr)
        raise SystemExit(2)
    where = machine()
    wrong = errors()
    peak = copy_speed()
    facts = {
        "command": f"python -m benchmarks.select --images {arguments.images} "
        f"--rounds {arguments.rounds}",
        "commit": source_commit(),
        "machine": {
            **where,
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        },
        "settings": {
            "images": arguments.images,
            "rounds": arguments.rounds,
            "dtype": "bfloat16",
            "work": "forward and backward, without the 3x3 convolution",
            "passes_over_the_mixed_result": PASSES,
        },
        "relative_errors_against_float64": wrong,
        "copy_gigabytes_per_second": round(peak / 1e9, 1),
    }
    measure(
        ResultFile(arguments.output, facts, "layers"),
        images=arguments.images,
        rounds=arguments.rounds,
        peak=peak,
    )


if __name__ == "__main__":
    main()

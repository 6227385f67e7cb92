"""Physical limits of a training step: FLOPs and bytes of all networks of Table 1, and their floors.

    python -m benchmarks.roofline -o benchmarks/results/roofline.json
    python -m benchmarks.roofline --measured benchmarks/results/step.json

Counted, from our own networks: parameters, arithmetic and saved activations (`models.cost`), and
the kernels of a training step with their bytes in four tiers of fusion (`benchmarks.traffic`).

Assumed: the two ceilings, arguments. Their defaults are what one H100 of 80 GB reached in bf16
matrix products and in copying, both below its data sheet.

An image has two views. A floor in images per second is what the slower of two resources allows:

    1 / (2 max(FLOPs / ceiling, bytes / ceiling))

The op-roofline takes that maximum for each kernel by itself and adds, as kernels run one after the
other: it is lower, and nearer to what can be reached. Neither contains the loss, the optimizer,
the augmentation, or the launch of a kernel.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.machine import machine
from benchmarks.networks import TABLE_1, network
from benchmarks.traffic import TIERS, Kernel, Tier, kernels, layers
from bigsimclr.models.cost import VALUE_BYTES, Precision, cost
from bigsimclr.stages.run_directory import source_commit

IMAGE_SIZE: Final = 224  # paper, section 3.1
VIEWS_PER_STEP: Final = 128  # of one GPU, which share the traffic of the weights: 4096 over 64 GPUs
VIEWS_PER_IMAGE: Final = 2


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at most."""

    flops: float  # per second
    bandwidth: float  # bytes per second


ASSUMED: Final = Ceilings(flops=798e12, bandwidth=3.0e12)


def measure_ceilings(*, side: int = 8192, megabytes: int = 2048, times: int = 10) -> Ceilings:
    """Return what the GPU at hand reaches in a bf16 matrix product and in a copy, both of noise."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = partial(torch.randn, generator=generator, device="cuda", dtype=torch.bfloat16)
    left, right = draw(side, side), draw(side, side)
    source = draw(megabytes * 500_000)
    target = torch.empty_like(source)
    product = _seconds(lambda: left @ right, times)
    copy = _seconds(lambda: target.copy_(source), times)
    return Ceilings(flops=2 * side**3 / product, bandwidth=2 * source.nbytes / copy)


def _seconds(work: Callable[[], object], times: int) -> float:
    """Return the median of several times on the GPU, after some that warm it."""
    for _ in range(times):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    for mark in marks[:-1]:
        mark.record()
        work()
    marks[-1].record()
    marks[-1].synchronize()
    spans = [begin.elapsed_time(end) for begin, end in pairwise(marks)]
    return statistics.median(spans) / 1e3


@dataclass(frozen=True)
class Floor:
    """What one tier of a network allows."""

    bytes_per_view: float
    images_per_second: float
    binds: str  # the resource that allows no more
    op_images_per_second: float  # with the maximum taken kernel by kernel


def floor_of(step: list[Kernel], ceilings: Ceilings, *, views: int) -> Floor:
    """Return what a training step of these kernels allows, of so many views."""
    computing = sum(kernel.flops for kernel in step) / ceilings.flops
    moved = sum(kernel.bytes_per_view(views) for kernel in step)
    moving = moved / ceilings.bandwidth
    each = sum(
        max(kernel.flops / ceilings.flops, kernel.bytes_per_view(views) / ceilings.bandwidth)
        for kernel in step
    )
    return Floor(
        bytes_per_view=moved,
        images_per_second=1.0 / (VIEWS_PER_IMAGE * max(computing, moving)),
        binds="FLOPs" if computing >= moving else "bytes",
        op_images_per_second=1.0 / (VIEWS_PER_IMAGE * each),
    )


def floors(
    name: str, ceilings: Ceilings, *, image_size: int, views: int, precision: Precision
) -> dict[Tier, Floor]:
    """Return what each tier of a network allows."""
    found = layers(network(name), image_size)
    return {
        tier: floor_of(
            kernels(found, tier, value_bytes=VALUE_BYTES[precision]), ceilings, views=views
        )
        for tier in TIERS
    }


def training_flops(name: str, image_size: int) -> int:
    """Return the FLOPs of a training step of one view: no gradient of the image is made."""
    step = kernels(layers(network(name), image_size), "eager", value_bytes=VALUE_BYTES["bf16"])
    return sum(kernel.flops for kernel in step)


def row(name: str, ceilings: Ceilings) -> dict[str, object]:
    """Describe one network."""
    counted = cost(network(name), image_size=IMAGE_SIZE, precision="bf16")
    training = training_flops(name, IMAGE_SIZE)
    found = floors(name, ceilings, image_size=IMAGE_SIZE, views=VIEWS_PER_STEP, precision="bf16")
    backbone = counted.backbone
    return {
        "network": name,
        "backbone_parameters": backbone.parameters,
        "backbone_parameters_with_statistics": backbone.parameters + backbone.statistics,
        "head_parameters": counted.head.parameters,
        "forward_gflop_per_view": round(counted.total.flops / 1e9, 3),
        "training_gflop_per_view": round(training / 1e9, 3),
        "saved_megabytes_per_view": round(counted.total.activation_bytes / 1e6, 2),
        "flops_only_images_per_second": round(ceilings.flops / training / VIEWS_PER_IMAGE, 1),
        "tiers": {tier: _floor_facts(floor) for tier, floor in found.items()},
    }


def _floor_facts(floor: Floor) -> dict[str, object]:
    return {
        "gigabytes_per_view": round(floor.bytes_per_view / 1e9, 4),
        "floor_images_per_second": round(floor.images_per_second, 1),
        "binds": floor.binds,
        "op_roofline_images_per_second": round(floor.op_images_per_second, 1),
    }


def table(ceilings: Ceilings) -> list[dict[str, object]]:
    """Print all networks of Table 1 and return them."""
    print("per view: M parameters (with statistics), GFLOP, MB saved; images/s by tier:")
    print(f"{'':11} {'M':>6} {'fwd':>6} {'train':>6} {'MB':>5}  {' | '.join(TIERS)}")
    print(f"{'':37}  GB per view, floor (what binds), op-roofline")
    rows = []
    for name in TABLE_1:
        facts: dict[str, Any] = row(name, ceilings)
        rows.append(facts)
        tiers = " | ".join(
            f"{tier['gigabytes_per_view']:.2f} {tier['floor_images_per_second']:5.0f} "
            f"({tier['binds']}) {tier['op_roofline_images_per_second']:5.0f}"
            for tier in facts["tiers"].values()
        )
        print(
            f"{name:11} {facts['backbone_parameters_with_statistics'] / 1e6:6.1f} "
            f"{facts['forward_gflop_per_view']:6.1f} {facts['training_gflop_per_view']:6.1f} "
            f"{facts['saved_megabytes_per_view']:5.0f}  {tiers}"
        )
    return rows


def fractions(measured: dict[str, Any], ceilings: Ceilings) -> list[dict[str, object]]:
    """Print and return which fractions of the floors a result of `benchmarks.step` reached."""
    rows: list[dict[str, object]] = []
    print("\nfraction reached of floor and op-roofline, by tier: " + " | ".join(TIERS))
    for case in measured["cases"]:
        for method, found in case["methods"].items():
            rate = found.get("images_per_second")
            if rate is None:  # it ran out of memory
                continue
            allowed = floors(
                case["model"],
                ceilings,
                image_size=case["size"],
                views=VIEWS_PER_IMAGE * case["batch"],
                precision=found["precision"],
            )
            tiers: dict[str, dict[str, float]] = {
                tier: {
                    "of_floor": round(rate / floor.images_per_second, 4),
                    "of_op_roofline": round(rate / floor.op_images_per_second, 4),
                }
                for tier, floor in allowed.items()
            }
            rows.append(
                {"model": case["model"], "method": method, "images_per_second": rate, **tiers}
            )
            shares = " | ".join(
                f"{share['of_floor']:.1%} {share['of_op_roofline']:.1%}" for share in tiers.values()
            )
            print(f"{case['model']:11} {method:8} {rate:8.1f} images/s  {shares}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--flops", type=float, help=f"per second; assumed: {ASSUMED.flops:g}")
    parser.add_argument(
        "--bandwidth", type=float, help=f"bytes per second; assumed: {ASSUMED.bandwidth:g}"
    )
    parser.add_argument("--measured", type=Path, help="JSON file of benchmarks.step")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the findings")
    options = parser.parse_args()
    if (options.flops is None) != (options.bandwidth is None):
        parser.error("give both --flops and --bandwidth, or neither")
    given = options.flops is not None
    ceilings = Ceilings(options.flops, options.bandwidth) if given else ASSUMED
    measured = None if options.measured is None else json.loads(options.measured.read_text())
    if measured is not None and measured["device"] == "cpu" and not given:
        parser.error("--measured: made on a CPU; give its --flops and --bandwidth")
    source = "given" if given else "assumed, not measured here"
    print(
        f"ceilings ({source}): {ceilings.flops / 1e12:g} TFLOP/s, "
        f"{ceilings.bandwidth / 1e12:g} TB/s"
    )
    result: dict[str, object] = {
        "command": " ".join(["python", "-m", "benchmarks.roofline", *sys.argv[1:]]),
        "commit": source_commit(),
        "machine": machine(),
        "ceilings": {
            "what": source,
            "flops_per_second": ceilings.flops,
            "bytes_per_second": ceilings.bandwidth,
        },
        "settings": {
            "image_size": IMAGE_SIZE,
            "precision": "bf16",
            "views_that_share_the_weights": VIEWS_PER_STEP,
            "views_per_image": VIEWS_PER_IMAGE,
        },
        "networks": table(ceilings),
    }
    if measured is not None:
        result["measured"] = {
            "command": measured["command"],
            "commit": measured["commit"],
            "fractions": fractions(measured, ceilings),
        }
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

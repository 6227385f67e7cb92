"""How throughput grows with ranks: measured on this machine's cores, and modelled for many GPUs.

    python -m benchmarks.scaling -o benchmarks/results/scaling.json

*Measured*: real pretraining runs of the command, on digits, in processes of one thread each. Weak
scaling keeps the batch of a rank, strong scaling that of the update. Every round runs every case
once, in turns, so that a busy moment of the machine meets all of them. Efficiency is throughput
over that of as many single processes, each alone, which train plainly whatever the strategy. Ranks
beyond the cores share them, and are marked.

*Model*, no measurement: seconds of one update from counts of FLOPs, bytes and messages
(`bigsimclr.models.cost`) and from assumed speeds, all constants below. A collective costs

    start + hops x alpha + bytes on the wire / beta

Sending gradients hides behind the backward pass, two thirds of the computing, and FSDP2's gathers
before the forward pass behind the other third. Statistics of batch norm, ZeRO's exchange of
parameters and the loss's gathers hide behind nothing. Left out are memory (one GPU holds no batch
of 4096), reading of images, the optimizer, stragglers, that small kernels compute more slowly, and
that gradients and statistics wait for each other: real efficiency is lower.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from benchmarks.machine import machine
from bigsimclr.models import Architecture
from bigsimclr.models.anatomy import DEPTHS
from bigsimclr.models.cost import cost
from bigsimclr.parallel.ddp import BUCKET_BYTES
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone
from bigsimclr.report.records import read_records
from bigsimclr.stages.run_directory import environment

Strategy = Literal["ddp", "zero1", "fsdp2"]
STRATEGIES: Final[tuple[Strategy, ...]] = get_args(Strategy)

# --- what is measured ------------------------------------------------------------------------

BATCH: Final = 64  # of a rank in weak scaling, of the update in strong scaling
ROUNDS: Final = 2
RECORD_STEPS: Final = 2
# A step of 64 images takes about a third of a second on one core.
RECIPE: Final = """\
stage: pretrain
data: {{kind: digits}}
augment: {{image_size: 8, colour_strength: 0.5, blur_probability: 0.0}}
backbone: {{depth: 18, width: 0.5, stem: cifar}}
head: {{layers: 3, output_width: 64}}
loss: {{kind: nt_xent, temperature: 0.5}}
optimizer: {{kind: lars, learning_rate: 0.1}}
schedule: {{steps: {steps}}}
batch: {{global_batch: {batch}}}
parallel: {{device: cpu, cpu_threads: 1}}
probe: {{linear: false}}
checkpoint: {{every_steps: 100000}}
log: {{every_steps: {record_steps}}}
"""

# --- what is assumed -------------------------------------------------------------------------

MODEL_GPUS: Final = (1, 8, 16, 32, 64, 128, 256, 512)
GPUS_PER_NODE: Final = 8
GLOBAL_BATCH: Final = 4096  # paper, section 3.1
IMAGE_SIZE: Final = 224  # paper, section 3.1
PROJECTION_WIDTH: Final = 128  # recipes/imagenet/1_pretrain.yaml
# The smallest and the largest network of the paper's Table 1.
NETWORKS: Final = {
    "R50 1x": ResNetBackbone(depth=50),
    "R152 3x SK": ResNetBackbone(depth=152, width=3.0, selective_kernel=True),
}
# Assumed: a fifth of the 989 TFLOP/s of an H100 in bf16 (data sheet, dense). MLPerf training 3.0's
# ResNet-50 reaches 17%; wide networks reach more, so that theirs is the more hopeful efficiency.
SUSTAINED_FLOPS: Final = 200e12  # FLOP/s
# Assumed: NVLink 4 one way (data sheet: 900 GB/s both ways), and one NDR InfiniBand adapter of
# 400 Gbit/s for each GPU. NCCL's rings leave a node through all of its adapters.
NVLINK_BYTES: Final = 450e9  # per second
NETWORK_BYTES: Final = 50e9  # per second and GPU
# Assumed: the ring latencies of NCCL's own model (src/graph/tuning.cc, protocol LL128).
START_SECONDS: Final = 10e-6
NVLINK_SECONDS: Final = 1.9e-6  # per hop
NETWORK_SECONDS: Final = 4.0e-6  # per hop
BACKWARD: Final = 2 / 3  # of an update's computing
FLOAT_BYTES: Final = 4  # gradients, parameters, statistics and projections travel in float32
VIEWS: Final = 2
LABEL: Final = "a model from the assumptions above, not a measurement"


# --- the model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What one update of a network computes and sends."""

    flops: int  # of all GPUs
    parameter_bytes: int  # as many as gradients
    norm_layers: int
    statistics_bytes: int  # of all batch norms: two numbers per channel
    projection_bytes: int  # of one view of the global batch
    units: int  # that FSDP2 gathers one after the other


def load_of(backbone: ResNetBackbone) -> Load:
    """Count what an update of the paper's pretraining computes and sends."""
    head = HeadSection(output_width=PROJECTION_WIDTH)
    network = Architecture(backbone, head, classes=None, from_layer=0)
    whole = cost(network, image_size=IMAGE_SIZE).total
    plan = DEPTHS[backbone.depth]
    blocks = sum(plan.blocks)
    in_stem = 3 if backbone.selective_kernel and backbone.stem == "imagenet" else 1
    in_block = 3 + backbone.selective_kernel if plan.bottleneck else 2
    return Load(
        # A backward pass counts as two forward ones.
        flops=3 * VIEWS * GLOBAL_BATCH * whole.flops,
        parameter_bytes=FLOAT_BYTES * whole.parameters,
        # Each group's first block has one more, in its shortcut.
        norm_layers=in_stem + blocks * in_block + len(plan.blocks) + head.layers,
        statistics_bytes=FLOAT_BYTES * whole.statistics,
        projection_bytes=FLOAT_BYTES * GLOBAL_BATCH * PROJECTION_WIDTH,
        units=blocks + 2,  # the stem and the head
    )


def bandwidth(gpus: int) -> float:
    """Return the bytes per second that a GPU of a ring passes on."""
    if gpus <= GPUS_PER_NODE:
        return NVLINK_BYTES
    return min(NVLINK_BYTES, GPUS_PER_NODE * NETWORK_BYTES)


def ring_seconds(gpus: int, size: float, *, messages: int = 1) -> float:
    """Return the time of an all-gather, a reduce-scatter or a broadcast: once round the ring.

    Args:
        gpus: in the ring.
        size: bytes of the whole, gathered, of all messages together.
        messages: collectives that it is cut into.
    """
    if gpus == 1:
        return 0.0
    far = _nodes(gpus) - 1
    hops = (gpus - 1 - far) * NVLINK_SECONDS + far * NETWORK_SECONDS
    return messages * (START_SECONDS + hops) + (gpus - 1) / gpus * size / bandwidth(gpus)


def all_reduce_seconds(gpus: int, size: float, *, messages: int = 1) -> float:
    """Return the time of an all-reduce: 2 (W-1)/W of the bytes, twice round a ring or a tree."""
    if gpus == 1:
        return 0.0
    nodes = _nodes(gpus)
    near = min(gpus, GPUS_PER_NODE) - 1
    ring = (gpus - nodes) * NVLINK_SECONDS + (nodes - 1) * NETWORK_SECONDS
    tree = near * NVLINK_SECONDS + math.ceil(math.log2(nodes)) * NETWORK_SECONDS
    wire = 2 * (gpus - 1) / gpus * size / bandwidth(gpus)
    return messages * (START_SECONDS + 2 * min(ring, tree)) + wire


def _nodes(gpus: int) -> int:
    return -(-gpus // GPUS_PER_NODE)


@dataclass(frozen=True)
class Step:
    """Seconds of one update, by what they are spent on; what is hidden does not count."""

    computing: float
    batch_norm: float
    gradients: float
    parameters: float  # their exchange
    loss: float

    @property
    def seconds(self) -> float:
        """Return the time of the whole."""
        parts: dict[str, float] = asdict(self)
        return sum(parts.values())

    @property
    def binds(self) -> str:
        """Return what takes most of the time."""
        parts: dict[str, float] = asdict(self)
        return max(parts, key=lambda name: parts[name])


def step(load: Load, gpus: int, strategy: Strategy, *, norm_group: int | None = None) -> Step:
    """Predict one update.

    Args:
        load: what it computes and sends.
        gpus: that share it.
        strategy: how.
        norm_group: GPUs that share batch norm's statistics; None: all of them.
    """
    computing = load.flops / gpus / SUSTAINED_FLOPS
    group = gpus if norm_group is None else min(gpus, norm_group)
    size = load.parameter_bytes
    gradients = parameters = 0.0
    if strategy == "fsdp2":
        once = ring_seconds(gpus, size, messages=load.units)
        # Forward a gather; backward a gather again, and the reduce-scatter of the gradients.
        parameters = max(0.0, once - (1 - BACKWARD) * computing)
        gradients = max(0.0, 2 * once - BACKWARD * computing)
    else:
        buckets = math.ceil(size / BUCKET_BYTES)
        sent = all_reduce_seconds(gpus, size, messages=buckets)
        gradients = max(0.0, sent - BACKWARD * computing)
        if strategy == "zero1":
            # An owner sends at least one message; there are about three tensors per norm layer.
            messages = max(buckets, min(gpus, 3 * load.norm_layers))
            parameters = ring_seconds(gpus, size, messages=messages)
    # The statistics of every rank go to every other, in the forward and in the backward pass.
    batch_norm = 2 * ring_seconds(group, group * load.statistics_bytes, messages=load.norm_layers)
    # Both views, and the second once more for the metrics; the two views' gradients come back.
    loss = ring_seconds(gpus, 3 * load.projection_bytes, messages=3)
    loss += all_reduce_seconds(gpus, 2 * load.projection_bytes, messages=2)
    return Step(computing, batch_norm, gradients, parameters, loss)


def efficiency(
    load: Load, gpus: int, strategy: Strategy, *, norm_group: int | None = None
) -> float:
    """Return the modelled throughput over that of as many single GPUs."""
    alone = step(load, 1, strategy).seconds
    return alone / (gpus * step(load, gpus, strategy, norm_group=norm_group).seconds)


def model() -> dict[str, object]:
    """Print the model's tables and return them."""
    assumptions: dict[str, float] = {
        "sustained_flops_per_second": SUSTAINED_FLOPS,
        "nvlink_bytes_per_second": NVLINK_BYTES,
        "network_bytes_per_second_and_gpu": NETWORK_BYTES,
        "start_seconds": START_SECONDS,
        "nvlink_seconds_per_hop": NVLINK_SECONDS,
        "network_seconds_per_hop": NETWORK_SECONDS,
        "gpus_per_node": GPUS_PER_NODE,
        "global_batch": GLOBAL_BATCH,
        "image_size": IMAGE_SIZE,
        "hiding_share_of_computing": BACKWARD,
    }
    print("\nassumed: " + ", ".join(f"{name} {value:g}" for name, value in assumptions.items()))
    print(LABEL)
    print(
        f"{'network':>10} {'strategy':>8} {'norm over':>9} {'GPUs':>4} {'ms':>9} {'eff.':>5}  binds"
    )
    rows: list[dict[str, object]] = []
    for network, backbone in NETWORKS.items():
        load = load_of(backbone)
        for strategy in STRATEGIES:
            for group in (None, GPUS_PER_NODE):
                for gpus in MODEL_GPUS:
                    found = step(load, gpus, strategy, norm_group=group)
                    share = efficiency(load, gpus, strategy, norm_group=group)
                    rows.append(
                        {
                            "network": network,
                            "strategy": strategy,
                            "sync_group_size": group,
                            "gpus": gpus,
                            "step_seconds": round(found.seconds, 6),
                            "efficiency": round(share, 3),
                            "binds": found.binds,
                        }
                    )
                    print(
                        f"{network:>10} {strategy:>8} {group or 'all':>9} {gpus:>4} "
                        f"{1000 * found.seconds:>9.2f} {share:>5.0%}  {found.binds}"
                    )
    return {"what": LABEL, "assumptions": assumptions, "rows": rows}


# --- the measurement -------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One kind of run."""

    strategy: Strategy
    scaling: Literal["single", "weak", "strong"]
    ranks: int

    @property
    def global_batch(self) -> int:
        """Return the images of an update."""
        return BATCH * self.ranks if self.scaling == "weak" else BATCH


SINGLE: Final = Case("ddp", "single", 1)
"""Plain training, which every other case is compared with."""


def cases(ranks: list[int]) -> list[Case]:
    """List what is run, the single process first."""
    found = [SINGLE]
    for strategy in STRATEGIES:
        for number in ranks:
            if number > 1:
                found += [Case(strategy, "weak", number), Case(strategy, "strong", number)]
    return found


def throughput(case: Case, steps: int) -> float:
    """Run once; return the images per second, the median of all records but the first."""
    with tempfile.TemporaryDirectory() as directory:
        recipe, run = Path(directory) / "scaling.yaml", Path(directory) / "run"
        recipe.write_text(
            RECIPE.format(steps=steps, batch=case.global_batch, record_steps=RECORD_STEPS)
        )
        words = ["run", str(recipe), f"parallel.strategy={case.strategy}"]
        words += ["--ranks", str(case.ranks), "--out", str(run), "-q"]
        done = subprocess.run(  # noqa: S603 - our own command line
            [sys.executable, "-m", "bigsimclr", *words], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{case} failed ({done.returncode}): {done.stderr[-4000:]}")
        rates = [record.values.get("train/images_per_second") for record in read_records(run)]
        return statistics.median([rate for rate in rates if rate is not None][1:])


def measure(ranks: list[int], steps: int) -> list[dict[str, object]]:
    """Measure all cases and print the table."""
    rates: dict[Case, list[float]] = {case: [] for case in cases(ranks)}
    for _ in range(ROUNDS):
        for case, found in rates.items():
            found.append(throughput(case, steps))
    medians = {case: statistics.median(found) for case, found in rates.items()}
    cores = os.cpu_count() or 1
    rows: list[dict[str, object]] = []
    print(f"{'strategy':>8} {'scaling':>7} {'ranks':>5} {'img/s':>8} {'spread':>6} {'eff.':>5}")
    for case, found in rates.items():
        share = medians[case] / (case.ranks * medians[SINGLE])
        spread = (max(found) - min(found)) / medians[case]
        rows.append(
            {
                **asdict(case),
                "global_batch": case.global_batch,
                "images_per_second": round(medians[case], 1),
                "images_per_second_of_rounds": [round(rate, 1) for rate in found],
                "spread": round(spread, 3),
                "efficiency": round(share, 3),
                "oversubscribed": case.ranks > cores,
            }
        )
        print(
            f"{case.strategy:>8} {case.scaling:>7} {case.ranks:>5} {medians[case]:>8.1f} "
            f"{spread:>6.0%} {share:>5.0%}{'  oversubscribed' if case.ranks > cores else ''}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--ranks", type=int, nargs="+", help="default: 1, 2, 4, ... up to the cores"
    )
    parser.add_argument("--steps", type=int, default=12, help="updates of each run")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the findings")
    options = parser.parse_args()
    ranks = options.ranks or [2**power for power in range(cores.bit_length())]
    if any(number < 1 or BATCH % number for number in ranks):
        parser.error(f"--ranks: each must divide the batch of {BATCH}")
    if options.steps < 2 * RECORD_STEPS:
        parser.error(f"--steps: at least {2 * RECORD_STEPS}, as the first record does not count")
    started = time.monotonic()
    where = machine()
    measured = measure(ranks, options.steps)
    seconds = round(time.monotonic() - started, 1)
    result = {
        "command": " ".join(["python", "-m", "benchmarks.scaling", *sys.argv[1:]]),
        "environment": {**environment(), **where},
        "settings": {"batch": BATCH, "steps": options.steps, "rounds": ROUNDS},
        "seconds": seconds,
        "measured": measured,
        "model_not_a_measurement": model(),
    }
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

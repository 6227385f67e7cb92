"""Parts of the page of `benchmarks.render`: titles, texts, tables and what is plotted."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import tables
from benchmarks.tables import Result, Table, Times


@dataclass(frozen=True)
class Benchmark:
    """A part of the page."""

    name: str  # of the module, and what its result files begin with
    title: str
    text: str  # what the figures are, and to whom the ratios compare
    tables: Callable[[Result], list[Table]]
    # For the plot: the first of ours that a group has, compared with each of the others.
    times: Callable[[Result], Times] = lambda _: {}
    ours: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


BENCHMARKS = (
    Benchmark(
        "loss",
        "NT-Xent, forward and backward",
        "float32 inputs. dense, chunked and fused are ours; strong is PyTorch's cross-entropy, in "
        "bf16 and compiled; the others are lightly, pytorch-metric-learning and solo-learn's "
        "formula. Ratios are a row's time or memory over that of the named peer: below 1 is "
        "better than it. tile-wise is what Inf-CL published, in plain PyTorch.",
        tables.loss,
        tables.loss_times,
        ("fused-bf16", "chunked"),
        ("dense", "lightly", "solo", "strong"),
    ),
    Benchmark(
        "optimizer",
        "LARS, one update",
        "plain, fused, captured and copying are ours; loop is solo-learn's formula; sgd is "
        "PyTorch's, which has no norms to compute. Ratios are a row's time over lightly's.",
        tables.optimizer,
        tables.optimizer_times,
        ("fused", "plain"),
        ("lightly", "loop", "apex", "sgd"),
    ),
    Benchmark(
        "augment",
        "Two views of an image of 224 pixels",
        "plain and fused are ours; per image and batched are how other pipelines do it; kornia is "
        "the library. Ratios are a row's time over ours in plain PyTorch.",
        tables.augment,
        tables.augment_times,
        ("fused bf16", "fused", "plain"),
        ("per image", "batched", "kornia"),
    ),
    Benchmark(
        "step",
        "Whole training steps",
        "strong is PyTorch in channels_last, autocast and compiled; lightly and solo are those "
        "libraries' loops. The ratio is our throughput over that of the row.",
        tables.step,
        tables.step_times,
        ("ours",),
        ("strong", "lightly", "solo"),
    ),
    Benchmark(
        "scaling",
        "Several processes on this machine's cores",
        "Efficiency is throughput over that of as many single processes. The file has a model of "
        "many GPUs besides, which is no measurement.",
        tables.scaling,
    ),
    Benchmark(
        "norm_act",
        "Batch norm with ReLU and sum, of a ResNet-50",
        "fused is ours; eager and compiled are PyTorch's. Shares are of the speed of a copy.",
        tables.norm_act,
        tables.norm_act_times,
        ("fused",),
        ("eager", "compiled"),
    ),
    Benchmark(
        "select",
        "Selective kernels between their convolutions",
        "fused is ours; eager and compiled are the plain code. Ratios are a row's time over eager.",
        tables.select,
        tables.select_times,
        ("fused",),
        ("eager", "compiled"),
    ),
    Benchmark(
        "glance",
        "A first look at a GPU",
        "Ours alone, in few rounds and one process. A figure has a commit of its own.",
        tables.glance,
    ),
    Benchmark(
        "loader",
        "Reading photographs: two crops of 224 pixels of each",
        "torch + PIL is a DataLoader with the usual transforms, written from torchvision's "
        "definition; pillow, turbo and dali are ours, dali here on the CPU. The ratio of images/s "
        "is the median of the rounds', a row over torch + PIL with as many workers; CPU is of all "
        "processes. Published elsewhere, and not measured here: FFCV reads 31,278 images/s from "
        "memory with the 96 virtual cores of a p3dn.24xlarge, of JPEGs of quality 90 shrunk to 512 "
        "pixels beforehand, one crop of 224 pixels of each "
        "([its page](https://docs.ffcv.io/benchmarks.html)), which is 326 for each.",
        tables.loader,
    ),
    Benchmark(
        "agreement",
        "Decoders beside Pillow: the same crops of the same photographs",
        "Differences are of colour values, in steps of 1/255: turbo is to have none. dali here on "
        "the CPU.",
        tables.agreement,
    ),
    Benchmark(
        "digits",
        "Few labels on the bundled digits",
        "Accuracy on held-out images; supervised is the same network trained from scratch.",
        tables.digits,
    ),
)

"""The texts of docs/performance.md on each part: what was computed, and what explains the figures.

Words are fixed, figures come from the results or from `benchmarks.predictions`; a sentence is left
out where its result is not there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from benchmarks import predictions as predicted
from benchmarks.markdown import number
from benchmarks.predictions import Results
from benchmarks.tables import Row
from benchmarks.targets import Part, first, rows_of

ATTENTION: Final = "https://github.com/pytorch/benchmark/pull/2391"


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    part: Part
    title: str
    text: Callable[[Results], list[str]]  # paragraphs


def _methods(rows: list[Row], **wanted: object) -> dict[str, Row]:
    return {row["method"]: row for row in rows if wanted.items() <= row.items()}


def _threads(count: int) -> str:
    return f"{count} thread" + "s" * (count > 1)


def _loss(results: Results) -> list[str]:
    floor = 1e6 * predicted.loss_floor(results, 8192)
    slow, fast = (number(rate / 1e12) for rate in predicted.ATTENTION_FLOPS)
    few, many = predicted.SWEEPS_OF_AUTOGRAD
    computed = (
        "For M views of D values ours multiplies in 5 M²D FLOPs: one triangle of logits forward, "
        "all of them and their product backward. For 8,192 views that takes at least "
        f"{number(floor)} us. Predicted is the rate of a Triton kernel for attention, which does "
        f"much the same, at {slow} to {fast} TFLOP/s beside FlashAttention-3, so on a Hopper "
        f"GPU ([published]({ATTENTION})). Autograd needs 6 M²D FLOPs and, as we read lightly's "
        f"code, {few} to {many} sweeps over logits of 268 MB."
    )
    taken = []
    for threads in (1, 2):
        rows = _methods(rows_of(results, "loss"), pairs=4096, threads=threads)
        if {"chunked", "lightly"} <= rows.keys():
            ours, theirs = (rows[name]["median_seconds"] for name in ("chunked", "lightly"))
            taken.append(
                f"{number(ours)} s on {_threads(threads)} where lightly takes {number(theirs)} "
                f"({number(theirs / ours)}x)"
            )
    if not taken:
        return [computed]
    cpu = (
        f"On a CPU 4,096 pairs take {' and '.join(taken)}: tiles of 1,024 x 1,024 logits are made "
        "in 4 MB and dropped, and each serves its rows and its columns."
    )
    return [computed, cpu]


def _optimizer(results: Results) -> list[str]:
    count = predicted.parameters(results, "r50-1x")
    computed = (
        f"An update moves {predicted.LARS_BYTES} bytes of each of {count / 1e6:.1f} million "
        "parameters (8 for norms, 20 for the update) and hardly computes. The prediction for a GPU "
        "is their time at the speed of memory; three launches are not in it."
    )
    moved = []
    for found in rows_of(results, "optimizer"):
        rows = _methods(found["methods"])
        if {"plain", "lightly"} <= rows.keys():
            ours, theirs = (rows[name]["gigabytes_per_second"] for name in ("plain", "lightly"))
            moved.append(
                f"{ours} GB/s on {_threads(found['threads'])} ({number(ours / theirs)} times "
                f"lightly's {theirs}, a copy {found['copied_gigabytes_per_second']})"
            )
    if not moved:
        return [computed]
    cpu = f"On a CPU ours moves them at {' and '.join(moved)}."
    return [computed, cpu]


def _norm_act(_: Results) -> list[str]:
    return [
        "Nothing is predicted: the kernels only move activations, so a copy of as many bytes, "
        "timed beside each pass, is the measure."
    ]


def _augment(results: Results) -> list[str]:
    crop, dense = (
        number(1e6 * seconds)
        for seconds in (predicted.crop_seconds(results), predicted.dense_crop_seconds())
    )
    computed = (
        "The prediction adds up the launches of our path, each at its FLOPs or its bytes. The crop "
        f"reads four pixels each way for one of a view, and moves its bytes in {crop} us. The "
        "plain one multiplies by dense matrices in float32 and without tensor cores, which takes "
        f"{dense} us at a data sheet's {predicted.FLOAT32_FLOPS / 1e12:g} TFLOP/s."
    )
    rows = _methods(rows_of(results, "augment"))
    if not {"plain", "per image", "batched", "kornia", "crop"} <= rows.keys():
        return [computed]
    over = {name: number(row["time_over_plain"]) for name, row in rows.items()}
    cpu = (
        f"On a CPU one image after the other takes {over['per image']} times as long as ours, a "
        f"whole batch in one order {over['batched']}, kornia {over['kornia']}; the crop is "
        f"{over['crop']} of ours."
    )
    return [computed, cpu]


def _step(results: Results) -> list[str]:
    fits, does_not = (
        predicted.step_gigabytes(results, "r152-3x-sk", images) for images in (64, 128)
    )
    computed = (
        "Predicted images/s are the op-roofline with fused elementwise work, a limit. Over the "
        "strong baseline we can win what a compiler leaves unfused: from nothing to eager over "
        "fused. That of R152-3x SK is compiled block by block, as a whole takes minutes. Memory is "
        f"what the backward pass needs, and {predicted.STATE_BYTES} bytes a parameter: "
        f"{number(fits)} GB for 64 images of R152-3x SK; 128 would need {number(does_not)}, so "
        "they must recompute. Loss, views, LARS and launches are in no floor."
    )
    case = first(list(results.get("step", {}).get("cases", ())), model="r18-cifar")
    if case is None:
        return [computed]
    rates = {name: row.get("images_per_second") for name, row in case["methods"].items()}
    spread = max(row.get("spread", 0.0) for row in case["methods"].values())
    others = ", ".join(
        f"{name} {rate:.2f}" for name, rate in rates.items() if rate and name != "ours"
    )
    cpu = (
        f"On a CPU, where no kernel of ours runs, a ResNet-18 trains on {rates['ours']:.2f} "
        f"images/s ({others}): all of them use PyTorch's convolutions. The rounds of one method "
        f"differ by up to {spread:.0%}."
    )
    return [computed, cpu]


def _loader(results: Results) -> list[str]:
    rows = [row for row in rows_of(results, "loader") if row["source"] == "folder"]
    found = {row["decoder"]: row for row in rows if row["workers"] == 2}
    computed = "Nothing is predicted: what decoding costs depends on the photographs."
    if not {"torch + PIL", "pillow", "turbo"} <= found.keys():
        return [computed]
    cost = {name: number(row["cpu_milliseconds_per_image"]) for name, row in found.items()}
    cpu = (
        f"With two workers an image takes {cost['turbo']} ms of a CPU, {cost['pillow']} with "
        f"Pillow, and {cost['torch + PIL']} in a DataLoader with Pillow. The target's figure is "
        "of the extra `turbo`; Pillow alone reaches "
        f"{number(found['pillow']['over_torch_and_pil'])}x. Training on one core waits for "
        f"{results['loader']['training']['waited']:.1%} of its time; its slowest round ran at "
        f"{number(results['loader']['training']['least'])} of the speed without a loader."
    )
    return [computed, cpu]


SECTIONS: Final = (
    Section("loss", "NT-Xent", _loss),
    Section("optimizer", "LARS", _optimizer),
    Section("norm_act", "Batch norm, ReLU and sum", _norm_act),
    Section("augment", "Views", _augment),
    Section("step", "Training step", _step),
    Section("loader", "Loader", _loader),
)

"""What can be computed about a figure before it is measured: formulas on counted work.

Each takes the result files, of which `roofline.json` has counted FLOPs, bytes and parameters, and
what one GPU reaches at most. A limit is what no program can beat; other predictions say in their
docstring what they assume. Where nothing can be computed there is no function, and no prediction.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from benchmarks.tables import Result, Row

Results = Mapping[str, Result]  # by the names of the files without .json
Tier = Literal["eager", "fused_elementwise", "epilogue", "ideal"]

WIDTH: Final = 128  # values of a projection
# Of a Triton attention kernel at this width, which does what ours does: pytorch/benchmark#2391.
ATTENTION_FLOPS: Final = (389e12, 477e12)
# Read in lightly's code and PyTorch's gradients of it: masks, copies and a softmax.
SWEEPS_OF_AUTOGRAD: Final = (15, 25)
FLOAT32_FLOPS: Final = 67e12  # of an H100 SXM without tensor cores; its data sheet
LARS_BYTES: Final = 28  # a parameter: 8 for norms, 20 for the update
# A parameter of a bf16 run: its copy 2; weight, gradient and momentum 4 each.
STATE_BYTES: Final = 14


@dataclass(frozen=True)
class Prediction:
    """A number or a range, in the unit of the target."""

    low: float
    high: float
    is_limit: bool = False


Predict = Callable[[Results], Prediction | None]


def nothing(_: Results) -> None:
    """Predict nothing."""


def _limit(value: float) -> Prediction:
    return Prediction(value, value, is_limit=True)


def _ceilings(results: Results) -> tuple[float, float]:
    found = results["roofline"]["ceilings"]
    return found["flops_per_second"], found["bytes_per_second"]


def _network(results: Results, name: str) -> Row:
    return next(row for row in results["roofline"]["networks"] if row["network"] == name)


def parameters(results: Results, name: str) -> int:
    """Return the trained parameters of a network with its head."""
    row = _network(results, name)
    return int(row["backbone_parameters"] + row["head_parameters"])


def allowed(results: Results, name: str, tier: Tier) -> float:
    """Return the images per second of a network's op-roofline."""
    rate: float = _network(results, name)["tiers"][tier]["op_roofline_images_per_second"]
    return rate


# --- loss ------------------------------------------------------------------------------------


def _loss_seconds(views: int) -> tuple[float, float]:
    # A triangle of tiles forward; backward whole rows, logits and gradient: M^2 D and 4 M^2 D.
    work = 5 * views**2 * WIDTH
    return work / ATTENTION_FLOPS[1], work / ATTENTION_FLOPS[0]


def loss_floor(results: Results, views: int) -> float:
    """Return the least seconds of the loss: its products at the highest rate in bf16."""
    return 5 * views**2 * WIDTH / _ceilings(results)[0]


def loss_time(views: int, *, unit: float) -> Predict:
    """At the rate of attention in Triton, which multiplies, exponentiates and multiplies, too."""

    def predict(_: Results) -> Prediction:
        low, high = _loss_seconds(views)
        return Prediction(low / unit, high / unit)

    return predict


def loss_over_autograd(views: int) -> Predict:
    """Autograd multiplies 6 M^2 D and sweeps over M^2 float32 logits at the speed of memory."""

    def predict(results: Results) -> Prediction:
        flops, bandwidth = _ceilings(results)
        product = 6 * views**2 * WIDTH / flops
        few, many = (product + sweeps * 4 * views**2 / bandwidth for sweeps in SWEEPS_OF_AUTOGRAD)
        low, high = _loss_seconds(views)
        return Prediction(few / high, many / low)

    return predict


def loss_memory(views: int) -> Predict:
    """Unit rows in 16 bits, the gradient in float32, and five numbers of each view."""

    def predict(_: Results) -> Prediction:
        size = views * (WIDTH * (2 + 4) + 5 * 4) / 1e6
        return Prediction(size, size)

    return predict


# --- LARS ------------------------------------------------------------------------------------


def lars_time(name: str) -> Predict:
    """Limit: every byte once at the speed of memory; milliseconds."""

    def predict(results: Results) -> Prediction:
        moved = LARS_BYTES * parameters(results, name)
        return _limit(1e3 * moved / _ceilings(results)[1])

    return predict


# --- views -----------------------------------------------------------------------------------


SIDE: Final = 224
VALUES: Final = 3 * SIDE**2  # of a view


def dense_crop_seconds() -> float:
    """Return the time of the plain crop's two products, a matrix for each axis, in float32."""
    return 2 * 2 * SIDE * VALUES / FLOAT32_FLOPS


def crop_seconds(results: Results) -> float:
    """Return the time of the crop's bytes; it multiplies with four weights each way.

    Both views of an image read its pixels, of 224 x 224, once at most; each writes float32.
    """
    moved = VALUES * (1 / 2 + 4)
    multiplied = VALUES * 2 * (4 + 4)
    return max(moved / _ceilings(results)[1], multiplied / FLOAT32_FLOPS)


def views_time(results: Results) -> Prediction:
    """The launches of our views one after the other, each at its FLOPs or its bytes.

    After the crop colours read it once, twice for the 80% that are jittered, and write it; half of
    all views are blurred, which reads twice and writes twice.
    """
    distorted = VALUES * (4 * 1.8 + (4 + 2) / 2 + (4 + 4 + 4 + 2) / 2)
    taken = 1e6 * (crop_seconds(results) + distorted / _ceilings(results)[1])
    return Prediction(taken, taken)


# --- step ------------------------------------------------------------------------------------


def step_rate(name: str) -> Predict:
    """Limit: every kernel at its FLOPs or bytes, with batch norm, ReLU and sums fused."""
    return lambda results: _limit(allowed(results, name, "fused_elementwise"))


def step_over_strong(name: str) -> Predict:
    """The floors' ratio: eager over fused; a compiler may fuse all of it or nothing."""

    def predict(results: Results) -> Prediction:
        ratio = allowed(results, name, "fused_elementwise") / allowed(results, name, "eager")
        return Prediction(1.0, ratio)

    return predict


def step_gigabytes(results: Results, name: str, images: int) -> float:
    """Return what a step holds that saves all activations, without gradients of activations."""
    saved = 2 * images * _network(results, name)["saved_megabytes_per_view"] * 1e6
    return float(saved + STATE_BYTES * parameters(results, name)) / 1e9


def step_memory(name: str, images: int) -> Predict:
    """What is saved for the backward pass, and the weights' state; no workspaces."""

    def predict(results: Results) -> Prediction:
        size = step_gigabytes(results, name, images)
        return Prediction(size, size)

    return predict


def counted(results: Results) -> list[dict[str, Any]]:
    """Return the counted networks, in the order of Table 1."""
    return list(results["roofline"]["networks"])

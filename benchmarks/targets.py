"""The targets of docs/performance.md: one entry each, and where its figure is in the results.

A finder takes all results and returns the figure, or None while no file has it. To add a target,
add an entry; a finder for a new kind of file is a few lines.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from benchmarks import predictions as predicted
from benchmarks.misses import lars_is_bound, step_is_spent
from benchmarks.predictions import Predict, Results
from benchmarks.tables import Row

Part = Literal["loss", "optimizer", "norm_act", "augment", "step", "loader"]
Verdict = Literal["reached", "missed", "not measured"]


@dataclass(frozen=True)
class Figure:
    """A measured figure."""

    value: float  # 0 or infinite where it ran out of memory
    files: tuple[str, ...]  # results without .json
    spread: float = 0.0  # of its rounds, as a share; the larger one of a ratio's two sides


GLANCE: Final = "glance-gpu"

Find = Callable[[Results], Figure | None]
Why = Callable[[Results], str]


@dataclass(frozen=True)
class Goal:
    """What is wanted of a figure."""

    sign: Literal["at least", "at most"]
    value: float
    unit: str = ""

    def share(self, value: float) -> float:
        """Return how far a figure is: 1 is the goal, more is better."""
        return value / self.value if self.sign == "at least" else self.value / value


def at_least(value: float, unit: str = "") -> Goal:
    return Goal("at least", value, unit)


def at_most(value: float, unit: str = "") -> Goal:
    return Goal("at most", value, unit)


@dataclass(frozen=True)
class Target:
    """A line of the table."""

    part: Part
    what: str
    goal: Goal
    find: Find
    predict: Predict = predicted.nothing
    why: Why = lambda _: ""  # of a miss, in a sentence, where we know

    def figure(self, results: Results) -> Figure | None:
        """Return what was measured: by the part's own benchmark, or else at a first glance."""
        return self.find(results) or glanced(results, self.what)


def glanced(results: Results, what: str) -> Figure | None:
    """Find a figure of the first look at a GPU."""
    row = first(list(results.get(GLANCE, {}).get("figures", ())), what=what)
    if row is None:
        return None
    return Figure(row["median"], (GLANCE,), abs(row["most"] - row["least"]) / row["median"])


def verdict(target: Target, figure: Figure | None) -> Verdict:
    """Compare a figure with its goal; equal is reached."""
    if figure is None:
        return "not measured"
    return "reached" if target.goal.share(figure.value) >= 1 else "missed"


def is_close(target: Target, figure: Figure) -> bool:
    """Tell whether the rounds of a figure differ by more than it differs from its goal."""
    return abs(target.goal.share(figure.value) - 1) < figure.spread


# --- where the figures are -------------------------------------------------------------------


def first(rows: list[Row], **wanted: object) -> Row | None:
    """Return the first row that has what is wanted."""
    matching = (row for row in rows if all(row.get(key) == wanted[key] for key in wanted))
    return next(matching, None)


def rows_of(results: Results, name: str) -> list[Row]:
    """Return the rows of a result, none where there is no file."""
    return list(results.get(name, {}).get("results", ()))


def loss(name: str, pairs: int, method: str, key: str, *, unit: float) -> Find:
    """Find a time or size of the loss, of one thread on a CPU."""

    def find(results: Results) -> Figure | None:
        row = _of_loss(results, name, pairs, method)
        if row is None or key not in row:
            return None
        return Figure(row[key] * unit, (name,), row["spread"] if "seconds" in key else 0.0)

    return find


def loss_ratio(name: str, pairs: int, key: str, *, ours: str, theirs: str) -> Find:
    """Find how many times larger theirs is, of one thread on a CPU."""

    def find(results: Results) -> Figure | None:
        mine, other = (_of_loss(results, name, pairs, method) for method in (ours, theirs))
        if mine is None or other is None or key not in mine or key not in other:
            return None
        spread = max(mine["spread"], other["spread"]) if "seconds" in key else 0.0
        return Figure(other[key] / mine[key], (name,), spread)

    return find


def _of_loss(results: Results, name: str, pairs: int, method: str) -> Row | None:
    rows = rows_of(results, name)
    threads = min((row["threads"] for row in rows if "threads" in row), default=None)
    return first(rows, pairs=pairs, method=method, **({"threads": threads} if threads else {}))


def lars(name: str, method: str, *, theirs: str = "") -> Find:
    """Find the milliseconds of an update, or theirs over them; of one thread on a CPU."""

    def find(results: Results) -> Figure | None:
        rows = next(iter(rows_of(results, name)), {}).get("methods", [])
        mine, other = first(rows, method=method), first(rows, method=theirs or method)
        if mine is None or other is None:
            return None
        taken = mine["median_milliseconds"]
        value = other["median_milliseconds"] / taken if theirs else taken
        return Figure(value, (name,), max(_quartiles(mine), _quartiles(other)))

    return find


def _quartiles(row: Row) -> float:
    low, high = row["quartiles_milliseconds"]
    return float((high - low) / row["median_milliseconds"])


def share_of_copy(name: str) -> Find:
    """Find the speed of all passes over a network's batch norms, over that of copies as large."""

    def find(results: Results) -> Figure | None:
        copying = taken = 0.0
        result = results.get(name, {})
        layers = result.get("layers", ())
        if "cut" in result and len(layers) < result["cut"]["of"]:
            return None
        for layer in layers:
            for row in layer["passes"].values():
                taken += layer["count"] * row["median_ms"]
                copying += layer["count"] * row["bytes"] / row["copy_gigabytes_per_second"] / 1e6
        return Figure(100 * copying / taken, (name,)) if taken else None

    return find


def views(name: str, method: str) -> Find:
    """Find the microseconds of a view."""

    def find(results: Results) -> Figure | None:
        row = first(rows_of(results, name), method=method)
        if row is None:
            return None
        return Figure(row["median_microseconds_per_view"], (name,), row["spread"])

    return find


def _case(results: Results, name: str, model: str, batch: int) -> Row | None:
    return first(list(results.get(name, {}).get("cases", ())), model=model, batch=batch)


def step(name: str, model: str, batch: int, key: str, *, unit: float = 1.0) -> Find:
    """Find the images per second of our step, or its peak bytes."""

    def find(results: Results) -> Figure | None:
        ours = (_case(results, name, model, batch) or {}).get("methods", {}).get("ours", {})
        if ours.get("out_of_memory"):
            return Figure(math.inf if key == "peak_bytes" else 0.0, (name,))
        if ours.get(key) is None:
            return None
        return Figure(ours[key] * unit, (name,), ours["spread"] if "second" in key else 0.0)

    return find


def step_ratio(name: str, model: str, batch: int, theirs: str) -> Find:
    """Find the speed of our step over theirs, both of one run."""

    def find(results: Results) -> Figure | None:
        case = _case(results, name, model, batch)
        ratio = (case or {}).get("ratios", {}).get(f"ours_over_{theirs}")
        if case is None or ratio is None:
            return None
        spread = max(case["methods"][method]["spread"] for method in ("ours", theirs))
        return Figure(ratio, (name,), spread)

    return find


def quotient(above: Find, below: Find, *, unit: float = 1.0) -> Find:
    """Find one figure over another, of two runs on machines of the same kind."""

    def find(results: Results) -> Figure | None:
        first, second = above(results), below(results)
        if first is None or second is None:
            return None
        spread = max(first.spread, second.spread)
        return Figure(unit * first.value / second.value, first.files + second.files, spread)

    return find


def loader(decoder: str, workers: int) -> Find:
    """Find the images per second over those of a DataLoader, both reading a folder."""

    def find(results: Results) -> Figure | None:
        rows = [row for row in rows_of(results, "loader") if row["workers"] == workers]
        ours = first(rows, decoder=decoder, source="folder")
        theirs = first(rows, decoder="torch + PIL", source="folder")
        if ours is None or theirs is None:
            return None
        spread = max(ours["spread"], theirs["spread"])
        return Figure(ours["over_torch_and_pil"], ("loader",), spread)

    return find


def fed(results: Results) -> Figure | None:
    """Find the speed of training with the loader over that without."""
    row = results.get("loader", {}).get("training")
    if row is None:
        return None
    value = row["speed_with_over_without"]
    return Figure(value, ("loader",), 1 - row["least"] / value)


# --- the targets -----------------------------------------------------------------------------


_R50: Final = ("step-r50-1x-gpu", "r50-1x", 256)
_R152: Final = ("step-r152-3x-sk-gpu", "r152-3x-sk", 64)
_SELECTIVE: Final = ("step-selective-gpu", "r152-3x-sk", 128)
_RATE: Final = "images_per_second"

CPU: Final = (
    Target(
        "loss", "NT-Xent of 4,096 pairs: lightly's time over ours", at_least(4, "x"),
        loss_ratio("loss", 4096, "median_seconds", ours="chunked", theirs="lightly"),
    ),
    Target(
        "loss", "NT-Xent of 4,096 pairs: lightly's memory over ours", at_least(20, "x"),
        loss_ratio("loss", 4096, "peak_megabytes", ours="chunked", theirs="lightly"),
    ),
    Target(
        "optimizer", "LARS of R50-1x: lightly's time over ours", at_least(2, "x"),
        lars("optimizer", "plain", theirs="lightly"),
        why=lars_is_bound,
    ),
    Target(
        "step", "Training step: speed over the strong baseline's", at_least(1, "x"),
        step_ratio("step", "r18-cifar", 32, "strong"),
    ),
    Target(
        "loader", "Loader, 2 cores: speed over DataLoader + PIL", at_least(1.5, "x"),
        loader("turbo", 2),
    ),
    Target("loader", "Training: speed with the loader over without", at_least(0.95, "x"), fed),
)  # fmt: skip

GPU: Final = (
    Target(
        "loss", "NT-Xent of 8,192 views", at_most(120, " us"),
        loss("loss-gpu", 4096, "fused-bf16", "median_seconds", unit=1e6),
        predicted.loss_time(8192, unit=1e-6),
    ),
    Target(
        "loss", "NT-Xent of 8,192 views: lightly's time over ours", at_least(15, "x"),
        loss_ratio("loss-gpu", 4096, "median_seconds", ours="fused-bf16", theirs="lightly"),
        predicted.loss_over_autograd(8192),
    ),
    Target(
        "loss", "NT-Xent of 65,536 views", at_most(6.5, " ms"),
        loss("loss-gpu", 32768, "fused-bf16", "median_seconds", unit=1e3),
        predicted.loss_time(65536, unit=1e-3),
    ),
    Target(
        "loss", "NT-Xent of 65,536 views: memory", at_most(80, " MB"),
        loss("loss-gpu", 32768, "fused-bf16", "peak_megabytes", unit=1.0),
        predicted.loss_memory(65536),
    ),
    Target(
        "norm_act", "Batch norm + ReLU (+ sum): speed over a copy's", at_least(80, "%"),
        share_of_copy("norm_act-gpu"),
    ),
    Target(
        "optimizer", "LARS of R50-1x", at_most(0.6, " ms"),
        lars("optimizer-gpu", "fused"), predicted.lars_time("r50-1x"),
    ),
    Target(
        "augment", "A view of 224 px", at_most(1.5, " us"),
        views("augment-gpu", "fused bf16"), predicted.views_time,
    ),
    Target(
        "step", "R50-1x, 256 images: speed over lightly's loop", at_least(2, "x"),
        step_ratio(*_R50, "lightly"), why=step_is_spent(*_R50, "lightly"),
    ),
    Target(
        "step", "R50-1x, 256 images: speed over the strong baseline's", at_least(1.25, "x"),
        step_ratio(*_R50, "strong"), predicted.step_over_strong("r50-1x"),
        step_is_spent(*_R50, "strong"),
    ),
    Target(
        "step", "R50-1x, 256 images", at_least(3000, " images/s"),
        step(*_R50, _RATE), predicted.step_rate("r50-1x"), step_is_spent(*_R50),
    ),
    Target(
        "step", "R152-3x SK, 64 images: speed over the strong baseline's", at_least(1.25, "x"),
        step_ratio(*_R152, "strong"), predicted.step_over_strong("r152-3x-sk"),
    ),
    Target(
        "step", "R152-3x SK, 64 images", at_least(200, " images/s"),
        step(*_R152, _RATE), predicted.step_rate("r152-3x-sk"),
    ),
    Target(
        "step", "R152-3x SK, 64 images, nothing recomputed: memory", at_most(80, " GB"),
        step(*_R152, "peak_bytes", unit=1e-9), predicted.step_memory("r152-3x-sk", 64),
    ),
    Target(
        "step", "R152-3x SK, 128 images, selective recompute: memory", at_most(80, " GB"),
        step(*_SELECTIVE, "peak_bytes", unit=1e-9),
    ),
    Target(
        "step", "R152-3x SK: time of an image with selective recompute over without",
        at_most(1.08, "x"), quotient(step(*_R152, _RATE), step(*_SELECTIVE, _RATE)),
    ),
)  # fmt: skip

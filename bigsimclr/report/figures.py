"""Which plots a run set calls for, each with title, explanation and text alternative."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bigsimclr.report.facts import Run, RunSet, Step, mapping, number
from bigsimclr.report.plots import Curve, Series, Tone, in_dark, label_efficiency_svg, series_svg
from bigsimclr.report.summary import METHOD_NAMES, METHOD_OF_STAGE, Method, Point, labels_of

_AMOUNT_TONES: tuple[Tone, ...] = ("baseline", "second", "ours", "reference")
_METHOD_LOOK: Mapping[Method, tuple[Tone, str]] = {
    "supervised": ("baseline", "s"),
    "finetuned": ("second", "o"),
    "distilled": ("ours", "D"),
}


@dataclass(frozen=True)
class Picture:
    """A plot for a light and for a dark page."""

    title: str
    caption: str
    alternative: str  # what the plot says, for those who do not see it
    light: str  # data: address of an SVG
    dark: str
    narrow_light: str = ""  # for small screens; "" where the plot fits as it is
    narrow_dark: str = ""


@dataclass(frozen=True)
class Panel:
    """What a small plot shows: recorded names with their legends."""

    title: str
    caption: str
    lines: tuple[tuple[str, str, Tone], ...]  # recorded name, legend, tone
    scale: Literal["plain", "percent"] = "plain"
    from_zero: bool = False  # where the size of a change would mislead


_CLASSIFIER_PANELS = (
    Panel("Loss", "Mean loss of each recorded update, in nats.", (("train/loss", "", "second"),)),
    Panel(
        "Accuracy on the training images",
        "Share of the labelled training images of an update that are classified right.",
        (("train/accuracy", "", "second"),),
        "percent",
    ),
    Panel(
        "Accuracy on the held-out images",
        "Measured while training; it chooses nothing, the last state is the result.",
        (("held_out/accuracy", "", "second"),),
        "percent",
    ),
)


def curve_picture(points: Sequence[Point]) -> Picture | None:
    """Draw the label-efficiency curve; None where no classifier has finished.

    Args:
        points: its points, of every method.
    """
    by_class = [point for point in points if point.labels.per_class is not None]
    shown = by_class or list(points)
    if not shown:
        return None
    lines: dict[tuple[Method, str], list[Point]] = {}
    for point in shown:
        lines.setdefault((point.method, point.step), []).append(point)
    methods = [method for method, _ in lines]
    curves = [
        Curve(
            name=METHOD_NAMES[method] + (f" ({step})" if methods.count(method) > 1 else ""),
            tone=_METHOD_LOOK[method][0],
            marker=_METHOD_LOOK[method][1],
            amounts=[_amount(point) for point in line],
            means=[100 * point.spread.mean for point in line],
            deviations=[100 * (point.spread.std or 0.0) for point in line],
            values=[[100 * value for value in point.spread.values] for point in line],
        )
        for (method, step), line in lines.items()
    ]
    axis = "labels per class" if by_class else "labels, % of the training images"
    narrow = label_efficiency_svg(curves, axis=axis, narrow=True)
    picture = _picture(
        label_efficiency_svg(curves, axis=axis),
        title="Accuracy by number of labels",
        caption=(
            "Mean over the label draws; bars show one sample standard deviation, dots the single "
            "draws. The horizontal axis is logarithmic."
        ),
        alternative="; ".join(
            f"{curve.name}: "
            + ", ".join(
                f"{mean:.1f}% at {amount:g}"
                for amount, mean in zip(curve.amounts, curve.means, strict=True)
            )
            for curve in curves
        )
        + f" ({axis})",
    )
    return replace(
        picture,
        narrow_light=_address(narrow),
        narrow_dark=_address(in_dark(narrow)),
    )


def _amount(point: Point) -> float:
    amount = point.labels.per_class
    return amount if amount is not None else (point.labels.percent or 1.0)


def pretraining_pictures(run: Run) -> tuple[Picture, ...]:
    """Draw what a pretraining run recorded; panels with less than two records are left out."""
    panels = (
        Panel(
            "Contrastive loss against chance",
            f"Sum of the two directions, in nats. {_chance_text(run)}",
            (("train/loss", "loss", "second"), ("train/chance_loss", "chance", "reference")),
        ),
        Panel(
            "Pairs found",
            "Share of views whose own partner is the most similar of all views in the batch.",
            (("train/contrastive_accuracy", "", "ours"),),
            "percent",
            from_zero=True,
        ),
        Panel(
            "What the features are worth",
            "Held-out images classified by nearest neighbours or by a linear probe, which learns "
            "along behind a stop-gradient and changes no feature.",
            (
                ("knn/accuracy", "nearest neighbours", "ours"),
                ("probe/held_out_accuracy", "linear probe", "second"),
                ("probe/accuracy", "linear probe, training views", "reference"),
            ),
            "percent",
        ),
        Panel(
            "Contrastive entropy",
            "Entropy of the softmax over the candidates, in nats; low means sure of the partner.",
            (("train/contrastive_entropy", "", "second"),),
        ),
        Panel(
            "Learning rate",
            "After scaling by the batch: linear warm-up, then cosine to zero.",
            (("train/learning_rate", "", "second"),),
        ),
        Panel(
            "Gradient norm",
            "Euclidean norm of the whole gradient before the update.",
            (("train/gradient_norm", "", "second"),),
        ),
        Panel(
            "Images per second",
            "Source images, both views together, over all ranks.",
            (("train/images_per_second", "", "second"),),
            from_zero=True,
        ),
        Panel(
            "Waiting for data",
            "Share of the time in which training waited for its input.",
            (("train/data_wait", "", "baseline"),),
            "percent",
            from_zero=True,
        ),
    )
    found = (_panel_picture(panel, [run], [""]) for panel in panels)
    return tuple(picture for picture in found if picture is not None)


def classifier_pictures(run_set: RunSet, runs: Sequence[Run]) -> tuple[Picture, ...]:
    """Draw what the runs of one classifier step recorded, one thin line for each run."""
    amounts = [""] if len(runs) == 1 else [labels_of(run_set, run).amount for run in runs]
    found = (_panel_picture(panel, runs, amounts) for panel in _CLASSIFIER_PANELS)
    return tuple(picture for picture in found if picture is not None)


def _panel_picture(panel: Panel, runs: Sequence[Run], groups: Sequence[str]) -> Picture | None:
    in_epochs = all(_epoch_examples(run) for run in runs)
    series: list[Series] = []
    seen: list[str] = []
    for run, group in zip(runs, groups, strict=True):
        for name, legend, tone in panel.lines:
            records = [record for record in run.records if name in record.values]
            if not any(math.isfinite(record.values[name]) for record in records):
                continue
            unit = (_epoch_examples(run) or 1.0) if in_epochs else 1.0
            fresh = bool(group) and group not in seen
            seen += [group] if fresh else []
            series.append(
                Series(
                    name=(group if fresh else "") if group else legend,
                    tone=_AMOUNT_TONES[seen.index(group) % len(_AMOUNT_TONES)] if group else tone,
                    x=[record.examples / unit for record in records],
                    y=[record.values[name] for record in records],
                    dashed=tone == "reference",
                    thin=bool(group),
                )
            )
    if not any(len(line.x) > 1 for line in series):
        return None  # a single point is a result, not a course
    label = "epochs" if in_epochs else "examples seen"
    return _picture(
        series_svg(series, scale=panel.scale, x_label=label, from_zero=panel.from_zero),
        title=panel.title,
        caption=panel.caption,
        alternative=_describe(panel, series, label),
    )


def _describe(panel: Panel, series: Sequence[Series], label: str) -> str:
    factor, unit = (100.0, "%") if panel.scale == "percent" else (1.0, "")
    parts = []
    for line in series[:8]:
        finite = [value for value in line.y if math.isfinite(value)]
        name = f"{line.name} " if line.name else ""
        first, last = factor * finite[0], factor * finite[-1]
        parts.append(f"{name}from {first:.4g}{unit} to {last:.4g}{unit}")
    more = f" and {len(series) - 8} more lines" if len(series) > 8 else ""
    return f"{panel.title} over {label}: {'; '.join(parts)}{more}"


def _epoch_examples(run: Run) -> float | None:
    examples = number(run.plan.get("examples"))
    return examples if examples and examples > 0 else None


def _chance_text(run: Run) -> str:
    batch = number(run.plan.get("global_batch"))
    chance = number(run.plan.get("chance_loss"))
    start = "Chance is the loss of features that tell no two images apart"
    if batch is None or chance is None:
        return f"{start}, on the same scale."
    queue = number(mapping(mapping(run.recipe.get("loss")).get("queue")).get("length")) or 0.0
    if not math.isclose(chance, 2 * math.log(max(1.0, 2 * batch - 1 + queue)), abs_tol=1e-3):
        return f"{start}: {chance:.2f}, on the same scale."
    formula = f"2 ln(2N \N{MINUS SIGN} 1{' + Q' if queue else ''})"
    sizes = f"N = {batch:,.0f}" + (f", Q = {queue:,.0f}" if queue else "")
    return f"{start}: {formula} = {chance:.2f} for {sizes}, on the same scale."


def _picture(svg: str, *, title: str, caption: str, alternative: str) -> Picture:
    return Picture(
        title=title,
        caption=caption,
        alternative=alternative,
        light=_address(svg),
        dark=_address(in_dark(svg)),
    )


def _address(svg: str) -> str:
    # In an <img> an SVG can neither run scripts nor load anything.
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")


def classifier_steps(run_set: RunSet) -> tuple[Step, ...]:
    """Return the steps that train a classifier, in order."""
    stages = {*METHOD_OF_STAGE, "linear"}
    return tuple(step for step in run_set.steps if step.stage in stages)

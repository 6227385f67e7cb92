"""Make docs/performance.md: targets, floors, and why figures differ from predictions.

`benchmarks.render` writes it. Nothing but the result files goes in; roofline.json must be there.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.drawing import svg
from benchmarks.markdown import commit_of, filled, gpu_of, machine_of, number, table
from benchmarks.misses import glance_is_spent
from benchmarks.predictions import Prediction, Results, Tier, allowed, counted
from benchmarks.reasons import SECTIONS, Section
from benchmarks.tables import Row
from benchmarks.targets import CPU, GPU, Figure, Goal, Target, is_close, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
TARGETS: Final = (*CPU, *GPU)
TIERS: Final[dict[Tier, str]] = {
    "eager": "eager",
    "fused_elementwise": "fused",
    "epilogue": "+ epilogue",
    "ideal": "ideal",
}
COLOURS: Final = {"reached": "#0b7a5f", "missed": "#b54708"}


def results_in(folder: Path) -> Results:
    """Read all results of a folder."""
    files = sorted(folder.glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def page(folder: Path) -> str:
    """Return the page on the results in a folder."""
    results = results_in(folder)
    parts = [_head(results)]
    for heading, targets in (("On a CPU", CPU), ("On a GPU", GPU)):
        rows = [_row(target, results) for target in targets]
        parts += [f"### {heading}\n", table(rows, {key: key for key in rows[0]})]
        parts += _misses(targets, results)
    parts += [_floors(results), "## What was predicted, what came out, and why they differ\n"]
    for section in SECTIONS:
        parts.append(f"### {section.title}\n")
        parts += [f"{filled(paragraph)}\n" for paragraph in section.text(results)]
        parts.append("\n".join(_outcome(section, results)) + "\n")
    return "\n".join([*parts, _sources(results)])


def _head(results: Results) -> str:
    verdicts = [verdict(target, target.figure(results)) for target in TARGETS]
    ceilings = results["roofline"]["ceilings"]
    count = (
        f"Of {len(TARGETS)} targets {verdicts.count('reached')} are reached, "
        f"{verdicts.count('missed')} missed, and {verdicts.count('not measured')} not measured yet."
    )
    terms = (
        "*Predicted* is computed from counted work, never measured; where it has a sign, it is the "
        "limit of what fuses as ours does, on one H100 that reaches "
        f"{number(ceilings['flops_per_second'] / 1e12)} TFLOP/s in bf16 and "
        f"{number(ceilings['bytes_per_second'] / 1e12)} TB/s ({ceilings['what']}). *Close* is a "
        "figure that differs less from its target than its rounds differ among themselves."
    )
    made = (
        "Made by `make bench-docs` from the files in benchmarks/results; do not edit. Every table "
        "as it was measured is in [benchmarks.md](benchmarks.md)."
    )
    texts = "\n\n".join(filled(text) for text in (made, count, terms))
    plotted = "![Measured and predicted, as a share of each target](performance.svg)"
    title = "# How fast it is, how fast it could be, and who says so"
    return f"{title}\n\n{texts}\n\n{plotted}\n\n## Targets\n"


# --- targets ---------------------------------------------------------------------------------


def _row(target: Target, results: Results) -> Row:
    figure, prediction = target.figure(results), target.predict(results)
    return {
        "what": target.what,
        "target": f"{_sign(target.goal)} {number(target.goal.value)}{target.goal.unit}",
        "predicted": _predicted(prediction, target.goal),
        "measured": _measured(figure, target.goal),
        "verdict": _verdict(target, figure, prediction),
        "measured by": "" if figure is None else ", ".join(map(_link, figure.files)),
    }


def _sign(goal: Goal) -> str:
    return "≥" if goal.sign == "at least" else "≤"


def _predicted(prediction: Prediction | None, goal: Goal) -> str:
    if prediction is None:
        return ""
    if prediction.is_limit:
        return f"{'≤' if goal.sign == 'at least' else '≥'} {number(prediction.low)}{goal.unit}"
    low, high = number(prediction.low), number(prediction.high)
    return f"{low}{goal.unit}" if low == high else f"{low} to {high}{goal.unit}"


def _measured(figure: Figure | None, goal: Goal) -> str:
    if figure is None:
        return ""
    ran_out = figure.value in {0.0, math.inf}
    return "out of memory" if ran_out else f"{number(figure.value)}{goal.unit}"


def _verdict(target: Target, figure: Figure | None, prediction: Prediction | None) -> str:
    said: str = verdict(target, figure)
    if figure is None:
        fails = prediction is not None and _best(target.goal, prediction) < 1
        return f"{said}; predicted to miss" if fails else said
    if said == "missed" and _measured(figure, target.goal) != "out of memory":
        said = f"missed by {abs(figure.value / target.goal.value - 1):.0%}"
    return f"{said}, close" if is_close(target, figure) else said


def _best(goal: Goal, prediction: Prediction) -> float:
    return max(goal.share(prediction.low), goal.share(prediction.high))


def _misses(targets: tuple[Target, ...], results: Results) -> list[str]:
    """Return why targets were missed, where we know."""
    missed = [target for target in targets if verdict(target, target.figure(results)) == "missed"]
    return [filled(f"*{target.what}:* {_why(target, results)}") + "\n" for target in missed]


def _why(target: Target, results: Results) -> str:
    said = target.why(results) or glance_is_spent(results, target.what)
    return said or "why is not known yet."


def _link(name: str) -> str:
    # As GitHub makes an anchor of the heading.
    return f"[{name}.json](benchmarks.md#{name}json)"


# --- floors ----------------------------------------------------------------------------------


def _floors(results: Results) -> str:
    """Return the table of Table 1: work, limits, and what was reached of them."""
    settings = results["roofline"]["settings"]
    reached = _reached(results)
    rows = []
    for network in counted(results):
        name, tiers = network["network"], network["tiers"]
        rate, file = reached.get(name, (None, ""))
        share = None if rate is None else rate / allowed(results, name, "fused_elementwise")
        rows.append(
            {
                "network": name,
                "GFLOP": round(network["training_gflop_per_view"], 1),
                "GB, eager": round(tiers["eager"]["gigabytes_per_view"], 2),
                "GB, fused": round(tiers["fused_elementwise"]["gigabytes_per_view"], 2),
                "MB saved": round(network["saved_megabytes_per_view"]),
                **{
                    heading: round(tiers[tier]["op_roofline_images_per_second"])
                    for tier, heading in TIERS.items()
                },
                "ideal is bound by": tiers["ideal"]["binds"],
                "measured": None if rate is None else round(rate),
                "of fused": None if share is None else f"{share:.0%} ({_link(file)})",
            }
        )
    text = (
        "Counted from our networks, all 13 rows of the paper's Table 1, in training at "
        f"{settings['image_size']} px in {settings['precision']}. GFLOP, GB moved and MB saved are "
        f"of a view, of {settings['views_that_share_the_weights']} that share the weights. The "
        "columns after them are images (two views) per second that one GPU allows, every kernel at "
        "the larger of its times for FLOPs and for bytes. *eager* fuses nothing; *fused* batch "
        "norm, ReLU and sums, as our kernels do; *+ epilogue* also the statistics into the "
        "convolution before; *ideal* the rest into the one after."
    )
    if not reached:
        text += " No network has been measured on an H100 yet, so none has a share reached."
    return f"## Floors\n\n{filled(text)}\n\n{table(rows, {key: key for key in rows[0]})}"


def _reached(results: Results) -> dict[str, tuple[float, str]]:
    """Return our highest images per second of each network on an H100, and where it is from."""
    best: dict[str, tuple[float, str]] = {}
    for name, result in results.items():
        if not name.startswith("step-") or "H100" not in (gpu_of(result) or ""):
            continue
        for case in result.get("cases", ()):
            rate = case["methods"].get("ours", {}).get("images_per_second", 0.0)
            if case["size"] == 224 and rate > best.get(case["model"], (0.0, ""))[0]:
                best[case["model"]] = rate, name
    return best


# --- outcomes and sources --------------------------------------------------------------------


def _outcome(section: Section, results: Results) -> list[str]:
    """Return a line for each figure that had a prediction, and one on what is not measured."""
    targets = [target for target in TARGETS if target.part == section.part]
    found = [(target, target.figure(results), target.predict(results)) for target in targets]
    lines = [
        f"* {target.what}: predicted {_predicted(prediction, target.goal)}, measured "
        f"{_measured(figure, target.goal)}, {_compared(figure, prediction)}."
        for target, figure, prediction in found
        if figure is not None and prediction is not None
    ]
    missing = sum(figure is None for _, figure, _ in found)
    if missing == len(targets):
        return ["* Not measured yet."]
    if missing:
        lines.append(f"* Not measured yet: {missing} of {len(targets)} targets.")
    return lines or ["* All of its targets are measured; none had a prediction."]


def _compared(figure: Figure, prediction: Prediction) -> str:
    if figure.value in {0.0, math.inf}:
        return "which settles it"
    if prediction.is_limit:
        share = figure.value / prediction.low
        return f"{min(share, 1 / share):.0%} of the limit"
    if prediction.low <= figure.value <= prediction.high:
        return "as predicted"
    end = prediction.low if figure.value < prediction.low else prediction.high
    side = "below" if figure.value < end else "above"
    return f"{abs(figure.value / end - 1):.0%} {side}"


def _sources(results: Results) -> str:
    """Return machine, commit and command of every file that the page has figures of."""
    figures = [figure for target in TARGETS if (figure := target.figure(results)) is not None]
    names = {name for figure in figures for name in figure.files}
    names |= {file for _, file in _reached(results).values()} | {"augment"} & results.keys()
    rows = []
    for name in ("roofline", *sorted(names)):
        result = results[name]
        machine = machine_of(result)
        cores = machine.get("cores")
        parts = [gpu_of(result), machine.get("cpu"), None if cores is None else f"{cores} cores"]
        rows.append(
            {
                "file": name + ".json" if name == "roofline" else _link(name),
                "machine": ", ".join(part for part in parts if part),
                "torch": machine.get("torch"),
                "commit": commit_of(result),
                "command": f"`{result['command']}`",
            }
        )
    text = "Versions, load and settings are beside each table. roofline.json is counted, on no GPU."
    return f"## Who says so\n\n{filled(text)}\n\n{table(rows, {key: key for key in rows[0]})}"


# --- plot ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A line of the plot, in shares of its target."""

    label: str
    measured: float | None
    predicted: tuple[float, float] | None
    is_limit: bool


def shares(folder: Path) -> list[Bar]:
    """Return what the plot shows: all targets that are measured or predicted."""
    results = results_in(folder)
    drawn = []
    for device, targets in (("CPU", CPU), ("GPU", GPU)):
        for target in targets:
            figure, prediction = target.figure(results), target.predict(results)
            measured = None if figure is None else target.goal.share(figure.value)
            computed = None
            if prediction is not None:
                low, high = map(target.goal.share, (prediction.low, prediction.high))
                computed = min(low, high), max(low, high)
            if measured or computed:
                limit = prediction is not None and prediction.is_limit
                drawn.append(Bar(f"{target.what}, {device}", measured or None, computed, limit))
    return drawn


def plot(folder: Path) -> str:
    """Return the plot as SVG text; needs matplotlib."""
    drawn = shares(folder)

    def draw(axes: "Axes") -> None:
        for place, bar in enumerate(drawn):
            if bar.measured is not None:
                ahead = bar.measured >= 1
                colour = COLOURS["reached" if ahead else "missed"]
                axes.barh(place, bar.measured - 1, left=1, color=colour, height=0.6)
                beside, side = (1.04, "left") if ahead else (0.96, "right")
                words = f"{bar.measured:.2f}"
                axes.text(bar.measured * beside, place, words, va="center", ha=side, fontsize=8)
            if bar.predicted is not None:
                marker = "<" if bar.is_limit else "|"
                axes.plot(bar.predicted, (place, place), color="#101828", marker=marker)
        axes.axvline(1, color="#667085", linewidth=1)
        axes.set_yticks(range(len(drawn)), [bar.label for bar in drawn], fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(x=0.1, y=0.03)
        axes.set_xlabel(
            "share of the target: bars measured, lines predicted, triangles limits", fontsize=8
        )

    return svg(0.9 + 0.28 * len(drawn), draw)

"""The tables of the page, ready to print: every number as text."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bigsimclr.report.document import Summary, seconds_of, state_of
from bigsimclr.report.facts import Json, Run, RunSet, Step, number, text
from bigsimclr.report.goodput import goodput_of
from bigsimclr.report.summary import (
    METHOD_NAMES,
    METHOD_OF_STAGE,
    Labels,
    Method,
    Row,
    Spread,
    labels_of,
)
from bigsimclr.report.verdict import percent, with_spread

_NOTHING = "\N{EN DASH}"
_PROTOCOL_COLUMNS = frozenset(
    {"encoder", "head_layer", "epochs", "augmentation", "checkpoint", "n"}
)
_PROTOCOL_LABELS = frozenset({"labels_per_class", "labels_percent", "draw", "seed"})
_MEASURES = {
    "accuracy": "",
    "knn_accuracy": "nearest neighbours at the end",
    "probe_accuracy": "linear probe trained along",
}


@dataclass(frozen=True)
class Tile:
    """A number to see first."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class ResultLine:
    """A row of the results table, ready to print."""

    stage: str
    detail: str
    accuracy: str  # mean in percent; "" when not run yet
    deviation: str
    cells: tuple[str, ...]
    progress: str  # how far the planned runs are; "" when all have finished


def tiles(summary: Summary) -> list[Tile]:
    """Choose the numbers to see first."""
    chosen: list[Tile] = []
    if summary.points:
        fewest = summary.points[0].labels
        order: tuple[Method, ...] = ("distilled", "finetuned", "supervised")
        for method in order:
            for point in summary.points:
                if point.method == method and point.labels.order == fewest.order:
                    note = _spread_note(point.spread) + fewest.amount
                    chosen.append(Tile(METHOD_NAMES[method], percent(point.spread.mean), note))
                    break
    ways = {"knn": "nearest neighbours", "linear": "linear classifier"}
    for row in summary.rows:
        if row.step.stage in ways and row.spread is not None:
            note = f"{_spread_note(row.spread)}frozen features, {row.labels.amount}"
            chosen.append(Tile(ways[row.step.stage], percent(row.spread.mean), note))
    if not chosen:
        chosen += [
            Tile(row.measure.replace("_", " "), percent(row.spread.mean), _MEASURES[row.measure])
            for row in summary.rows
            if row.spread is not None and row.measure in _MEASURES
        ]
    seconds = [found for found in map(seconds_of, summary.run_set.runs) if found is not None]
    if seconds:
        note = "wall time" if len(seconds) == 1 else f"{len(seconds)} runs, one after the other"
        chosen.append(Tile("time", _duration(sum(seconds)), note))
    return chosen


def curve_table(summary: Summary) -> dict[str, object]:
    """Return the columns and lines of the table below the label-efficiency curve."""
    columns = list(dict.fromkeys((point.method, point.step) for point in summary.points))
    columns.sort(key=lambda column: list(METHOD_NAMES).index(column[0]))
    amounts = {point.labels.order: point.labels.short for point in summary.points}
    draws = {point.draws for point in summary.points}
    alike = draws.pop() if len(draws) == 1 else None
    lines = []
    for order, amount in sorted(amounts.items()):
        here = {(p.method, p.step): p for p in summary.points if p.labels.order == order}
        cells = [
            _numbers(here[column].spread) + ("" if alike else f" ({here[column].draws})")
            if column in here
            else ""
            for column in columns
        ]
        scratch = [p.spread.mean for (method, _), p in here.items() if method == "supervised"]
        ours = [p.spread.mean for (method, _), p in here.items() if method == "distilled"]
        gain = f"{100 * (ours[-1] - scratch[0]):+.1f}" if scratch and ours else ""
        lines.append((amount, tuple(cell or _NOTHING for cell in cells), gain or _NOTHING))
    methods = [method for method, _ in columns]
    names = [
        METHOD_NAMES[method] + (f" ({step})" if methods.count(method) > 1 else "")
        for method, step in columns
    ]
    if alike is None:
        spread = "mean ± sample standard deviation (label draws)"
    elif alike == 1:
        spread = "of a single label draw"
    else:
        spread = f"mean ± sample standard deviation over {alike} label draws"
    return {"columns": names, "lines": lines, "spread": spread}


def _spread_note(spread: Spread) -> str:
    return "" if spread.std is None else f"± {100 * spread.std:.1f}, "


def _numbers(spread: Spread) -> str:
    return with_spread(spread).replace("%", "")


def result_line(row: Row) -> ResultLine:
    """Return a line of the results table."""
    detail = [part for part in (_MEASURES.get(row.measure, row.measure), row.setting) if part]
    shown = _PROTOCOL_COLUMNS | _PROTOCOL_LABELS
    others = {key: value for key, value in row.protocol.items() if key not in shown}
    detail += [f"{key}: {cell_text(value)}" for key, value in sorted(others.items())]
    spread = row.spread
    return ResultLine(
        stage=row.step.name,
        detail=", ".join(detail),
        accuracy="" if spread is None else f"{100 * spread.mean:.1f}",
        deviation="" if spread is None or spread.std is None else f"± {100 * spread.std:.1f}",
        cells=(
            cell_text(row.protocol.get("encoder")),
            row.labels.short,
            _joined(row.draws),
            _joined(row.seeds),
            cell_text(row.protocol.get("head_layer")),
            cell_text(row.protocol.get("epochs")),
            cell_text(row.protocol.get("augmentation")),
            cell_text(row.protocol.get("checkpoint")),
            cell_text(row.protocol.get("n")),
        ),
        progress=_progress(row),
    )


def missing_curve(run_set: RunSet) -> str:
    """Say why there is no curve over the labels; "" where none is to be expected."""
    runs = [run for run in run_set.runs if run.stage in METHOD_OF_STAGE]
    classifiers = [step for step in run_set.steps if step.stage in METHOD_OF_STAGE]
    if not classifiers:
        return ""
    if any(run.accuracy is not None for run in runs):
        return "No curve: nothing says how many labels the finished classifiers saw."
    if any(run.result is not None for run in runs):
        return "No curve: of the finished classifiers none measured an accuracy."
    if any(run.started for run in runs):
        return "Not finished yet: no classifier has come to its end."
    return "Not run yet: no classifier has been trained."


def missing_training(run_set: RunSet) -> str:
    """Say why there is no plot of the training."""
    runs = [run for run in run_set.runs if run.stage != "knn"]
    if run_set.runs and not runs:
        return "Nothing is trained here: nearest neighbours only look features up."
    if any(run.result is not None for run in runs):
        most = max(len(run.records) for run in runs)
        count = {0: "no record", 1: "one record"}.get(most, "few records")
        return f"Finished, but with {count}: too few points for a plot."
    if any(run.started for run in runs):
        return "Not finished yet: too few records for a plot so far."
    return "Not run yet: no course of training has been recorded."


def goodput_lines(run_set: RunSet) -> list[tuple[str, str]]:
    """Say for each run that took more than one attempt what became of its steps and time."""
    found = ((run, goodput_of(run.attempts, run.records)) for run in run_set.runs)
    return [
        (run_set.name if run.path == "." else run.path, goodput.words)
        for run, goodput in found
        if goodput is not None and goodput.restarts
    ]


def _progress(row: Row) -> str:
    if row.spread is None:
        unmeasured = {"finished": "none measured", "begun": "not finished yet"}
        return unmeasured.get(row.state, "not run yet")
    return "" if len(row.runs) == row.expected else f"{len(row.runs)} of {row.expected} runs"


def descent(run_set: RunSet) -> list[tuple[str, ...]]:
    """Return the steps as a tree, each line indented below its parent."""
    children: dict[str | None, list[Step]] = {}
    for step in run_set.steps:
        children.setdefault(_parent_step(run_set, step), []).append(step)
    lines: list[tuple[str, ...]] = []
    waiting = [(step, 0) for step in reversed(children.get(None, []))]
    while waiting:
        step, depth = waiting.pop()
        lines.append((_indent(depth) + step.name, *_step_cells(run_set, step)))
        waiting += [(child, depth + 1) for child in reversed(children.get(step.name, []))]
    return lines


def _parent_step(run_set: RunSet, step: Step) -> str | None:
    # Only an earlier step counts, so that a damaged file cannot close a circle.
    earlier = run_set.steps[: run_set.steps.index(step)]
    for run in run_set.of_step(step):
        parent = run_set.by_path.get(run.parent or "")
        if parent is not None and any(other.name == parent.step for other in earlier):
            return parent.step
    return None


def _indent(depth: int) -> str:
    if depth == 0:
        return ""
    return "\N{NO-BREAK SPACE}" * (4 * depth - 3) + "\N{BOX DRAWINGS LIGHT UP AND RIGHT} "


def _step_cells(run_set: RunSet, step: Step) -> tuple[str, ...]:
    runs = run_set.of_step(step)
    finished = sum(run.result is not None for run in runs)
    seconds = [found for found in map(seconds_of, runs) if found is not None]
    return (
        step.stage or _NOTHING,
        _amounts([labels_of(run_set, run) for run in runs]),
        _duration(sum(seconds)) if seconds else _NOTHING,
        f"{finished} of {len(runs)}",
        _state(runs),
    )


def _amounts(labels: Sequence[Labels]) -> str:
    """Name each amount once, such as "1, 2, 5 / class"."""
    unit = " / class"
    short = list(dict.fromkeys(amount.short for amount in labels))
    if len(short) > 1 and all(amount.endswith(unit) for amount in short):
        return ", ".join(amount.removesuffix(unit) for amount in short) + unit
    return ", ".join(short) or _NOTHING


def _state(runs: Sequence[Run]) -> str:
    if runs and all(run.result is not None for run in runs):
        return "finished"
    return "not finished yet" if any(run.started for run in runs) else "not run yet"


def lineage_cells(run_set: RunSet, run: Run) -> tuple[str, ...]:
    """Return the cells of a run in the table of all runs."""
    labels = labels_of(run_set, run)
    seconds = seconds_of(run)
    result = run.result or {}
    accuracy = run.accuracy
    return (
        run_set.name if run.path == "." else run.path,
        run.stage or _NOTHING,
        run.parent or _NOTHING,
        labels.short,
        _NOTHING if accuracy is None else percent(accuracy),
        cell_text(result.get("examples")),
        _NOTHING if seconds is None else _duration(seconds),
        state_of(run),
    )


def cell_text(value: Json) -> str:
    """Write any JSON value for a person."""
    if value is None:
        return _NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    found = number(value)
    if found is not None:
        return f"{found:,.0f}" if found.is_integer() else f"{found:,.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {cell_text(inner)}" for key, inner in value.items()) or _NOTHING
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(cell_text, value)) or _NOTHING
    return text(value) or json.dumps(value, default=str)


def _joined(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}{_NOTHING}{numbers[-1]}"
    return ", ".join(map(str, numbers)) or _NOTHING


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"

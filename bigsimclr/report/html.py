"""The report of a run: one HTML page without scripts or addresses, and the same numbers as JSON."""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from bigsimclr.report.document import (
    Summary,
    commands,
    report_json,
    seconds_of,
    state_of,
    summarise,
)
from bigsimclr.report.facts import Json, Run, RunSet, Step, number, read_run_set, text
from bigsimclr.report.figures import (
    Picture,
    classifier_pictures,
    classifier_steps,
    curve_picture,
    pretraining_pictures,
)
from bigsimclr.report.publish import publish
from bigsimclr.report.summary import METHOD_NAMES, Method, Row, Spread, labels_of
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
_SECRETS = ("token", "secret", "password", "passwd", "credential", "api_key", "apikey")


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


@dataclass(frozen=True)
class Curves:
    """The training plots of one step."""

    title: str
    is_open: bool
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Recipe:
    """The resolved recipe of a step, with its plan."""

    title: str
    varies: str  # what differs between the runs of the step
    text: str
    plan: tuple[tuple[str, str], ...]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` and `report.json` into a run directory and return the page's path.

    The directory is a pipeline's or a single run's, finished or not: what has not been run yet is
    shown as such. Both files are replaced whole, so a reader never sees half a report, and
    depend on nothing but the directory's files: the same run gives the same bytes.

    Args:
        run_dir: a directory that `bigsimclr run` made.

    Raises:
        StorageError: the directory is missing or cannot be written.
    """
    run_set = read_run_set(run_dir)
    summary = summarise(run_set)
    publish(run_dir / "report.json", report_json(summary))
    return publish(run_dir / "report.html", render_page(summary))


def render_page(summary: Summary) -> str:
    """Return the HTML page; every text from the run directory is escaped."""
    run_set = summary.run_set
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    source = files("bigsimclr.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        name=run_set.name,
        verdict=summary.verdict,
        progress=f"{summary.finished} of {len(run_set.runs)} runs finished",
        notes=run_set.notes,
        tiles=_tiles(summary),
        curve=curve_picture(summary.points),
        curve_table=_curve_table(summary),
        results=[_result_line(row) for row in summary.rows],
        resolution=_resolution(run_set),
        training=_training(run_set),
        descent=_descent(run_set) if run_set.is_pipeline else [],
        lineage=[_lineage_cells(run_set, run) for run in (*run_set.ancestors, *run_set.runs)],
        recipes=_recipes(run_set),
        pipeline_text=run_set.pipeline_text,
        environment=_environment(run_set.runs),
        commands=commands(run_set),
        noted=run_set.command is not None,
    )


def _printable(value: object) -> object:
    """Replace control characters: HTML cannot hold some, and others reorder what is read."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value  # Markup: what a macro returns, whose own parts came here before
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c)[0] == "C" and c not in "\n\t" else c
        for c in value
    )


def _tiles(summary: Summary) -> list[Tile]:
    tiles: list[Tile] = []
    if summary.points:
        fewest = summary.points[0].labels
        order: tuple[Method, ...] = ("distilled", "finetuned", "supervised")
        for method in order:
            for point in summary.points:
                if point.method == method and point.labels.order == fewest.order:
                    tiles.append(
                        Tile(METHOD_NAMES[method], percent(point.spread.mean), fewest.amount)
                    )
                    break
    ways = {"knn": "nearest neighbours", "linear": "linear classifier"}
    for row in summary.rows:
        if row.step.stage in ways and row.spread is not None:
            note = f"frozen features, {row.labels.amount}"
            tiles.append(Tile(ways[row.step.stage], percent(row.spread.mean), note))
    seconds = [found for found in map(seconds_of, summary.run_set.runs) if found is not None]
    if seconds:
        runs = f"{len(seconds)} run{'' if len(seconds) == 1 else 's'}"
        tiles.append(Tile("time", _duration(sum(seconds)), f"{runs}, one after the other"))
    return tiles


def _curve_table(summary: Summary) -> dict[str, object]:
    columns = list(dict.fromkeys((point.method, point.step) for point in summary.points))
    columns.sort(key=lambda column: list(METHOD_NAMES).index(column[0]))
    amounts = {point.labels.order: point.labels.amount for point in summary.points}
    lines = []
    for order, amount in sorted(amounts.items()):
        here = {(p.method, p.step): p for p in summary.points if p.labels.order == order}
        cells = [
            f"{_numbers(here[column].spread)} ({here[column].draws})" if column in here else ""
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
    return {"columns": names, "lines": lines}


def _numbers(spread: Spread) -> str:
    return with_spread(spread).replace("%", "")


def _result_line(row: Row) -> ResultLine:
    detail = [part for part in (_MEASURES.get(row.measure, row.measure), row.setting) if part]
    shown = _PROTOCOL_COLUMNS | _PROTOCOL_LABELS
    others = {key: value for key, value in row.protocol.items() if key not in shown}
    detail += [f"{key}: {_cell(value)}" for key, value in sorted(others.items())]
    spread = row.spread
    return ResultLine(
        stage=row.step.name,
        detail=", ".join(detail),
        accuracy="" if spread is None else f"{100 * spread.mean:.1f}",
        deviation="" if spread is None or spread.std is None else f"± {100 * spread.std:.1f}",
        cells=(
            _cell(row.protocol.get("encoder")),
            row.labels.short,
            _joined(row.draws),
            _joined(row.seeds),
            _cell(row.protocol.get("head_layer")),
            _cell(row.protocol.get("epochs")),
            _cell(row.protocol.get("augmentation")),
            _cell(row.protocol.get("checkpoint")),
            _cell(row.protocol.get("n")),
        ),
        progress=_progress(row),
    )


def _progress(row: Row) -> str:
    if row.spread is None:
        return "not finished yet" if row.begun else "not run yet"
    return "" if len(row.runs) == row.expected else f"{len(row.runs)} of {row.expected} runs"


def _resolution(run_set: RunSet) -> str:
    counts = {number(run.protocol.get("n")) for run in run_set.runs if run.result is not None}
    count = counts.pop() if len(counts) == 1 else None
    if not count or count <= 0:
        return ""
    return f"One of the {count:,.0f} held-out images is {100 / count:.2g} points."


def _training(run_set: RunSet) -> list[Curves]:
    sections = [
        Curves(
            title=run.step if run.path in (".", run.step) else f"{run.step}: {run.path}",
            is_open=True,
            pictures=p,
        )
        for run in run_set.runs
        if run.stage == "pretrain" and (p := pretraining_pictures(run))
    ]
    for step in run_set.steps:
        runs = [run for run in run_set.of_step(step) if run.records]
        pictures = classifier_pictures(run_set, runs)
        if step.name in classifier_steps(run_set) and pictures:
            count = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
            sections.append(
                Curves(
                    title=f"{step.name} ({count})",
                    is_open=not run_set.is_pipeline,
                    pictures=pictures,
                )
            )
    return sections


def _descent(run_set: RunSet) -> list[tuple[str, ...]]:
    """Return the steps as a tree, each line indented below its parent."""
    parents = {step.name: _parent_step(run_set, step) for step in run_set.steps}
    lines: list[tuple[str, ...]] = []

    def grow(parent: str | None, depth: int) -> None:
        for step in run_set.steps:
            if parents[step.name] == parent:
                lines.append((_indent(depth) + step.name, *_step_cells(run_set, step)))
                grow(step.name, depth + 1)

    grow(None, 0)
    return lines


def _parent_step(run_set: RunSet, step: Step) -> str | None:
    # Only an earlier step counts, so that a damaged file cannot close a circle.
    earlier = run_set.steps[: run_set.steps.index(step)]
    names = {run.path: run.step for run in run_set.runs}
    for run in run_set.of_step(step):
        parent = names.get(run.parent or "")
        if parent is not None and any(other.name == parent for other in earlier):
            return parent
    return None


def _indent(depth: int) -> str:
    return (
        ""
        if depth == 0
        else "\N{NO-BREAK SPACE}" * (4 * depth - 3) + "\N{BOX DRAWINGS LIGHT UP AND RIGHT} "
    )


def _step_cells(run_set: RunSet, step: Step) -> tuple[str, ...]:
    runs = run_set.of_step(step)
    finished = sum(run.result is not None for run in runs)
    amounts = dict.fromkeys(labels_of(run_set, run).short for run in runs)
    seconds = [found for found in map(seconds_of, runs) if found is not None]
    return (
        step.stage or _NOTHING,
        ", ".join(amounts) or _NOTHING,
        _duration(sum(seconds)) if seconds else _NOTHING,
        f"{finished} of {len(runs)}",
        "finished"
        if runs and finished == len(runs)
        else "not finished"
        if finished
        else "not run yet",
    )


def _lineage_cells(run_set: RunSet, run: Run) -> tuple[str, ...]:
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
        _cell(result.get("examples")),
        _NOTHING if seconds is None else _duration(seconds),
        state_of(run),
    )


def _recipes(run_set: RunSet) -> list[Recipe]:
    shown: list[Recipe] = []
    for step in run_set.steps:
        runs = [run for run in run_set.of_step(step) if run.recipe_text]
        if not runs:
            continue
        plan = tuple((key, _cell(value)) for key, value in sorted(runs[0].plan.items()))
        title = step.name if len(runs) == 1 else f"{step.name}: {runs[0].path}"
        shown.append(Recipe(title, _variation(runs), runs[0].recipe_text, plan))
    return shown


def _variation(runs: Sequence[Run]) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.grid)
    parts = []
    for key in keys:
        values = dict.fromkeys(_cell(run.grid.get(key)) for run in runs)
        parts.append(f"{key} = {', '.join(values)}")
    return "; ".join(parts)


def _environment(runs: Sequence[Run]) -> list[tuple[str, str]]:
    seen: dict[str, dict[str, None]] = {}
    for run in runs:
        for key, value in run.environment.items():
            hidden = any(word in key.lower() for word in _SECRETS)
            seen.setdefault(key, {})["(not shown)" if hidden else _cell(value)] = None
    return [(key, " or ".join(values)) for key, values in seen.items()]


def _cell(value: Json) -> str:
    if value is None:
        return _NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    found = number(value)
    if found is not None:
        return f"{found:,.0f}" if found.is_integer() else f"{found:,.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_cell(inner)}" for key, inner in value.items()) or _NOTHING
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_cell, value)) or _NOTHING
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

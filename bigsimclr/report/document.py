"""`report.json`: the numbers of the page for programs."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from bigsimclr.report.facts import Json, Run, RunSet, mapping, number, text
from bigsimclr.report.goodput import goodput_of
from bigsimclr.report.summary import (
    Point,
    Row,
    label_efficiency,
    labels_of,
    result_rows,
)
from bigsimclr.report.verdict import final_value, verdict

VERSION = 1  # of the layout of report.json

UNITS: Mapping[str, Json] = {
    "accuracy": "share of the held-out images, 0 to 1",
    "mean, std": "same; std is the sample standard deviation of values, null for a single one",
    "goodput": "steps kept of those computed, 0 to 1; seconds lost between attempts",
    "loss": "nats; the contrastive loss is the sum of its two directions, as chance_loss",
}


@dataclass(frozen=True)
class Summary:
    """Everything the page shows that is computed rather than copied."""

    run_set: RunSet
    verdict: str
    points: tuple[Point, ...]
    rows: tuple[Row, ...]

    @property
    def finished(self) -> int:
        """Number of finished runs."""
        return sum(run.result is not None for run in self.run_set.runs)


def summarise(run_set: RunSet) -> Summary:
    """Compute the curve, the table and the verdict of a run set."""
    points, rows = label_efficiency(run_set), result_rows(run_set)
    return Summary(run_set, verdict(run_set, points, rows), tuple(points), tuple(rows))


def report_json(summary: Summary) -> str:
    """Return the text of `report.json`; the same run gives the same bytes."""
    run_set = summary.run_set
    tree: dict[str, Json] = {
        "version": VERSION,
        "name": run_set.name,
        "verdict": summary.verdict,
        "units": UNITS,
        "runs": {"finished": summary.finished, "total": len(run_set.runs)},
        "label_efficiency": [_point(point, summary) for point in summary.points],
        "results": [_row(row) for row in summary.rows if row.spread is not None],
        "training": [_training(run) for run in run_set.runs if run.records],
        "lineage": [_relative(run_set, run) for run in (*run_set.ancestors, *run_set.runs)],
        "commands": list(commands(run_set)),
        "notes": list(run_set.notes),
    }
    return json.dumps(_finite(tree), indent=2, allow_nan=False) + "\n"


def commands(run_set: RunSet) -> tuple[str, ...]:
    """Return the commands that repeat the run."""
    if run_set.command is not None:
        return (run_set.command,)
    if not run_set.is_pipeline:
        return (f"bigsimclr run recipe.yaml --out {shlex.quote(f'../{run_set.name}-again')}",)
    firsts = [runs[0].path for runs in map(run_set.of_step, run_set.steps) if runs]
    again = f"../{run_set.name}-again"
    return tuple(
        f"bigsimclr run {shlex.quote(f'{path}/recipe.yaml')} --out {shlex.quote(f'{again}/{path}')}"
        for path in firsts
    )


def seconds_of(run: Run) -> float | None:
    """Return the wall time of a finished run."""
    return number(mapping(run.result).get("seconds"))


def _point(point: Point, summary: Summary) -> Json:
    per_class = point.labels.per_class
    entry: dict[str, Json] = {
        "labels_per_class": None if per_class is None else _whole(per_class),
        "method": point.method,
        "mean": point.spread.mean,
        "std": point.spread.std,
        "draws": point.draws,
        "values": list(point.spread.values),
    }
    if point.labels.percent is not None:
        entry["labels_percent"] = point.labels.percent
    if len({other.step for other in summary.points if other.method == point.method}) > 1:
        entry["step"] = point.step
    return entry


def _row(row: Row) -> Json:
    if row.spread is None:
        return None
    protocol = {key: value for key, value in row.protocol.items() if key not in ("draw", "seed")}
    return {
        "step": row.step.name,
        "stage": row.step.stage,
        "setting": row.setting or None,
        "measure": row.measure,
        "accuracy": row.spread.mean,
        "std": row.spread.std,
        "values": list(row.spread.values),
        "runs": [run.path for run in row.runs],
        "runs_planned": row.expected,
        "protocol": {**protocol, "draws": list(row.draws), "seeds": list(row.seeds)},
    }


def _training(run: Run) -> Json:
    names = sorted({name for record in run.records for name in record.values})
    return {
        "run": run.path,
        "stage": run.stage,
        "examples": run.records[-1].examples,
        "steps": run.records[-1].step,
        "final": {name: final_value(run, name) for name in names},
    }


def _relative(run_set: RunSet, run: Run) -> Json:
    result = mapping(run.result)
    data = mapping(result.get("data"))
    labels = labels_of(run_set, run)
    return {
        "run": run.path,
        "step": run.step,
        "stage": run.stage,
        "parent": run.parent,
        "grid": dict(run.grid),
        "state": state_of(run),
        "labels": labels.amount if labels.known else None,
        "examples": number(result.get("examples")),
        "seconds": seconds_of(run),
        "goodput": _goodput(run),
        "checkpoint": text(result.get("checkpoint")),
        "data_fingerprint": text(data.get("fingerprint")),
        "labels_hash": text(data.get("labels_hash")),
    }


def _goodput(run: Run) -> Json:
    found = goodput_of(run.attempts, run.records)
    if found is None:
        return None
    return {
        "share": found.share,
        "steps_kept": found.kept,
        "steps_computed": found.computed,
        "restarts": found.restarts,
        "seconds_lost": round(found.seconds_lost, 3),
    }


def state_of(run: Run) -> str:
    """Say how far a run is."""
    if run.result is not None:
        return "finished"
    return "not finished yet" if run.started else "not run yet"


def _whole(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _finite(value: Json) -> Json:
    """Replace what JSON cannot carry by null."""
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int | float):
        return value if number(value) is not None else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value]

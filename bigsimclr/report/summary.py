"""Accuracies over label draws, each with its whole protocol."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bigsimclr.report.facts import Json, Run, RunSet, Step, mapping, number, text

Method = Literal["supervised", "finetuned", "distilled"]

METHOD_OF_STAGE: Mapping[str, Method] = {
    "supervised": "supervised",
    "finetune": "finetuned",
    "distill": "distilled",
}
METHOD_NAMES: Mapping[Method, str] = {
    "supervised": "from scratch",
    "finetuned": "fine-tuned",
    "distilled": "distilled",
}
_METHODS: tuple[Method, ...] = ("supervised", "finetuned", "distilled")
_VARYING = ("draw", "seed")  # protocol keys over which accuracies are averaged
_LABEL_KEYS = ("labels.per_class", "labels.percent", "labels.draw", "seed")


@dataclass(frozen=True)
class Labels:
    """How many labels a classifier saw."""

    per_class: float | None
    percent: float | None
    draw: int | None

    @property
    def known(self) -> bool:
        """Whether anything says the amount."""
        return self.per_class is not None or self.percent is not None

    @property
    def amount(self) -> str:
        """Say the amount in words, such as "1 label per class"."""
        if self.per_class is not None:
            return f"{self.per_class:g} label{'' if self.per_class == 1 else 's'} per class"
        if self.percent is not None:
            return "all labels" if self.percent == 100 else f"{self.percent:g}% of the labels"
        return "labels not stated"

    @property
    def short(self) -> str:
        """Say the amount for a narrow column, such as "1 / class"."""
        if self.per_class is not None:
            return f"{self.per_class:g} / class"
        if self.percent is None:
            return "\N{EN DASH}"
        return "all" if self.percent == 100 else f"{self.percent:g}%"

    @property
    def order(self) -> tuple[float, float]:
        """Sort key: labels per class before percentages, few before many."""
        return (
            math.inf if self.per_class is None else self.per_class,
            math.inf if self.percent is None else self.percent,
        )


_NO_LABELS = Labels(None, None, None)


@dataclass(frozen=True)
class Spread:
    """Accuracies of like runs, as fractions of the held-out images."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Point:
    """One point of the label-efficiency curve."""

    labels: Labels
    method: Method
    step: str
    spread: Spread
    draws: int  # distinct label draws behind the values
    runs: tuple[Run, ...]  # in the order of the values


@dataclass(frozen=True)
class Row:
    """One line of the results table: like runs under one protocol."""

    step: Step
    measure: str  # name of the metric
    setting: str  # grid keys other than labels, draw and seed; "" for none
    labels: Labels
    runs: tuple[Run, ...]  # finished ones, in the order of the values
    expected: int  # runs that were planned
    state: str  # "finished", "begun" or "waiting", of the runs together
    spread: Spread | None  # None: nothing measured
    protocol: Mapping[str, Json]  # of one run; equal in all but draw and seed
    draws: tuple[int, ...]
    seeds: tuple[int, ...]


def labels_of(run_set: RunSet, run: Run) -> Labels:
    """Find how many labels stand behind a run: its own, or else its teacher's."""
    for relative in run_set.lineage(run):
        own = mapping(relative.recipe.get("labels"))
        per_class = _first(
            relative.protocol.get("labels_per_class"),
            relative.grid.get("labels.per_class"),
            own.get("per_class"),
        )
        percent = _first(
            relative.protocol.get("labels_percent"),
            relative.grid.get("labels.percent"),
            own.get("percent"),
        )
        if per_class is None and percent is None:
            continue
        draw = _first(
            relative.protocol.get("draw"), relative.grid.get("labels.draw"), own.get("draw")
        )
        if per_class is not None:
            percent = None
        return Labels(per_class, percent, None if draw is None else int(draw))
    return Labels(None, None, None)


def seed_of(run: Run) -> int | None:
    """Return the seed of a run's weights, order and augmentation."""
    seed = _first(run.protocol.get("seed"), run.grid.get("seed"), run.recipe.get("seed"))
    return None if seed is None else int(seed)


def label_efficiency(run_set: RunSet) -> list[Point]:
    """Average the accuracies of each method at each amount of labels over the label draws."""
    groups: dict[tuple[str, Method, tuple[float, float], str], list[Run]] = {}
    for run in run_set.runs:
        method = METHOD_OF_STAGE.get(run.stage)
        if method is None or run.accuracy is None:
            continue
        labels = labels_of(run_set, run)
        if labels.known:
            key = (run.step, method, labels.order, _setting(run))
            groups.setdefault(key, []).append(run)
    points = [
        _point(run_set, runs, step=step, setting=setting, method=method)
        for (step, method, _, setting), runs in groups.items()
    ]
    return sorted(points, key=lambda point: (point.labels.order, _METHODS.index(point.method)))


def _point(run_set: RunSet, runs: list[Run], *, step: str, setting: str, method: Method) -> Point:
    ordered = _in_order(run_set, runs)
    draws = {labels_of(run_set, run).draw for run in ordered}
    return Point(
        labels=labels_of(run_set, ordered[0]),
        method=method,
        step=f"{step} ({setting})" if setting else step,
        spread=Spread(tuple(_accuracies(ordered))),
        draws=len(draws),
        runs=tuple(ordered),
    )


def result_rows(run_set: RunSet) -> list[Row]:
    """List every measured accuracy, like runs joined; what has not been run stays visible."""
    rows: list[Row] = []
    for step in run_set.steps:
        groups: dict[tuple[tuple[float, float], str], list[Run]] = {}
        for run in run_set.of_step(step):
            key = (labels_of(run_set, run).order, _setting(run))
            groups.setdefault(key, []).append(run)
        if not groups:
            rows.append(_unmeasured(step, "", _NO_LABELS, ()))
        for (_, setting), runs in sorted(groups.items(), key=lambda group: group[0]):
            rows.extend(_rows_of(run_set, step, setting, runs))
    return rows


def _rows_of(run_set: RunSet, step: Step, setting: str, runs: list[Run]) -> list[Row]:
    ordered = _in_order(run_set, runs)
    labels = labels_of(run_set, ordered[0])
    found: dict[tuple[str, str], list[tuple[Run, float]]] = {}
    for run in ordered:
        for measure, value in _measures(run).items():
            # Figures of unlike protocols are never averaged.
            found.setdefault((measure, _protocol_key(run)), []).append((run, value))
    if not found:
        return [_unmeasured(step, setting, labels, runs)]
    return [
        Row(
            step=step,
            measure=measure,
            setting=setting,
            labels=labels,
            runs=tuple(run for run, _ in pairs),
            expected=len(runs),
            state="finished",
            spread=Spread(tuple(value for _, value in pairs)),
            protocol=pairs[0][0].protocol,
            draws=_distinct(labels_of(run_set, run).draw for run, _ in pairs),
            seeds=_distinct(seed_of(run) for run, _ in pairs),
        )
        for (measure, _), pairs in found.items()
    ]


def _state(runs: Sequence[Run]) -> str:
    if runs and all(run.result is not None for run in runs):
        return "finished"
    return "begun" if any(run.started for run in runs) else "waiting"


def _unmeasured(step: Step, setting: str, labels: Labels, runs: Sequence[Run]) -> Row:
    return Row(
        step=step,
        measure="accuracy",
        setting=setting,
        labels=labels,
        runs=(),
        expected=len(runs),
        state=_state(runs),
        spread=None,
        protocol={},
        draws=(),
        seeds=(),
    )


def _measures(run: Run) -> dict[str, float]:
    if run.accuracy is not None:
        return {"accuracy": run.accuracy}
    found = {name: number(value) for name, value in run.metrics.items()}
    return {
        name: value
        for name, value in sorted(found.items())
        if value is not None and name.endswith("accuracy") and "contrastive" not in name
    }


def _in_order(run_set: RunSet, runs: Sequence[Run]) -> list[Run]:
    def key(run: Run) -> tuple[int, int, str]:
        draw, seed = labels_of(run_set, run).draw, seed_of(run)
        return (-1 if draw is None else draw, -1 if seed is None else seed, run.path)

    return sorted(runs, key=key)


def _setting(run: Run) -> str:
    chosen = sorted(key for key in run.grid if key not in _LABEL_KEYS)
    return ", ".join(f"{key}={_short(run.grid[key])}" for key in chosen)


def _short(value: Json) -> str:
    as_text = text(value)
    return json.dumps(value, default=str) if as_text is None else as_text


def _protocol_key(run: Run) -> str:
    kept = {key: value for key, value in run.protocol.items() if key not in _VARYING}
    return json.dumps(kept, sort_keys=True, default=str)


def _accuracies(runs: Sequence[Run]) -> list[float]:
    return [run.accuracy for run in runs if run.accuracy is not None]


def _distinct(values: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(sorted({value for value in values if value is not None}))


def _first(*values: Json) -> float | None:
    return next((found for found in map(number, values) if found is not None), None)

"""One sentence that says what came out, computed from the numbers whichever way they fall."""

from collections.abc import Mapping, Sequence

from bigsimclr.report.facts import Json, Run, RunSet, mapping, number
from bigsimclr.report.summary import METHOD_OF_STAGE, Labels, Method, Point, Row, Spread

_SUBJECTS: Mapping[Method, str] = {
    "distilled": "the distilled student",
    "finetuned": "the fine-tuned network",
    "supervised": "the network trained from scratch",
}
_DEFAULT_BACKBONE: Mapping[str, Json] = {
    "kind": "resnet",
    "width": 1.0,
    "selective_kernel": False,
    "stem": "imagenet",
}


def verdict(run_set: RunSet, points: Sequence[Point], rows: Sequence[Row]) -> str:
    """Say the main result, or how far the run is.

    Args:
        run_set: the runs.
        points: the label-efficiency curve, few labels first.
        rows: the results table.
    """
    finished = sum(run.result is not None for run in run_set.runs)
    if finished == 0:
        begun = any(run.started for run in run_set.runs)
        return "Not finished yet: no result so far." if begun else "Not run yet."
    sentence = _of_points(run_set, points) or _of_rows(rows) or _of_pretraining(run_set)
    total = len(run_set.runs)
    if finished < total:
        sentence += f" So far {finished} of {total} runs have finished."
    return sentence


def percent(fraction: float) -> str:
    """Write a fraction as a percentage with one decimal."""
    return f"{100 * fraction:.1f}%"


def with_spread(spread: Spread) -> str:
    """Write a mean in percent with its sample standard deviation, such as "86.2% ± 2.1"."""
    deviation = "" if spread.std is None else f" ± {100 * spread.std:.1f}"
    return percent(spread.mean) + deviation


def held_out_images(runs: Sequence[Run]) -> str:
    """Name the images that the runs were measured on."""
    counts = {number(run.protocol.get("n")) for run in runs}
    count = counts.pop() if len(counts) == 1 else None
    return "the held-out images" if count is None else f"{int(count):,} held-out images"


def _of_points(run_set: RunSet, points: Sequence[Point]) -> str | None:
    if not points:
        return None
    # The claim worth making is at the fewest labels where there is something to compare.
    for ours in _by_interest(points):
        baseline = _baseline(points, ours)
        if baseline is not None:
            return _comparison(run_set, ours, baseline)
    ours = _by_interest(points)[0] if _by_interest(points) else points[0]
    return (
        f"With {ours.labels.amount} {_SUBJECTS[ours.method]} reaches {with_spread(ours.spread)} "
        f"on {held_out_images(ours.runs)} ({_draws(ours)})."
    )


def _by_interest(points: Sequence[Point]) -> list[Point]:
    order: tuple[Method, ...] = ("distilled", "finetuned")
    found = [point for point in points if point.method in order]
    return sorted(found, key=lambda point: (point.labels.order, order.index(point.method)))


def _baseline(points: Sequence[Point], ours: Point) -> Point | None:
    like = (p for p in points if p.method == "supervised" and p.labels.order == ours.labels.order)
    return next(like, None)


def _comparison(run_set: RunSet, ours: Point, baseline: Point) -> str:
    gap = 100 * (ours.spread.mean - baseline.spread.mean)
    if abs(gap) < 0.05:
        relation = "level with"
    else:
        unit = "point" if f"{abs(gap):.1f}" == "1.0" else "points"
        relation = f"{abs(gap):.1f} {unit} {'above' if gap > 0 else 'below'}"
    network = "the same network" if _same_network(run_set, ours, baseline) else "a network"
    draws = _draws(ours)
    if ours.draws == baseline.draws:
        draws += "" if ours.draws == 1 else " each"
    else:
        draws += f" against {baseline.draws}"
    return (
        f"With {ours.labels.amount} {_SUBJECTS[ours.method]} reaches {with_spread(ours.spread)} on "
        f"{held_out_images(ours.runs)}, {relation} {network} trained from scratch "
        f"({with_spread(baseline.spread)}; {draws})."
    )


def _draws(point: Point) -> str:
    return f"{point.draws} label draw{'' if point.draws == 1 else 's'}"


def _same_network(run_set: RunSet, ours: Point, baseline: Point) -> bool:
    networks = {_backbone(run_set, run) for run in (*ours.runs, *baseline.runs)}
    return len(networks) == 1 and None not in networks


def _backbone(run_set: RunSet, run: Run) -> tuple[tuple[str, str], ...] | None:
    for relative in run_set.lineage(run):
        section = mapping(relative.recipe.get("backbone"))
        if section:
            resolved = {**_DEFAULT_BACKBONE, **section}
            return tuple(sorted((key, _canonical(value)) for key, value in resolved.items()))
    return None


def _canonical(value: Json) -> str:
    as_number = number(value)
    return repr(value if as_number is None else as_number)


def _of_rows(rows: Sequence[Row]) -> str | None:
    measured = [row for row in rows if row.spread is not None and row.measure == "accuracy"]
    ways = {"linear": "A linear classifier on", "knn": "A nearest-neighbour vote over"}
    for stage, subject in ways.items():
        for row in measured:
            if row.step.stage == stage and row.spread is not None:
                return (
                    f"{subject} the frozen features reaches {with_spread(row.spread)} on "
                    f"{held_out_images(row.runs)}{_labels(row.labels)}."
                )
    for row in measured:
        if row.step.stage in METHOD_OF_STAGE and row.spread is not None:
            subject = _SUBJECTS[METHOD_OF_STAGE[row.step.stage]].capitalize()
            accuracy = with_spread(row.spread)
            return f"{subject} reaches {accuracy} on {held_out_images(row.runs)}."
    return None


def _labels(labels: Labels) -> str:
    return f" with {labels.amount}" if labels.known else ""


def _of_pretraining(run_set: RunSet) -> str:
    for run in run_set.runs:
        if run.stage != "pretrain" or run.result is None:
            continue
        loss, chance = final_value(run, "train/loss"), final_value(run, "train/chance_loss")
        sentence = "Pretraining has finished"
        if loss is not None:
            sentence += f" at a contrastive loss of {loss:.2f}"
            sentence += f" (chance {chance:.2f})" if chance is not None else ""
        neighbours = number(run.metrics.get("knn_accuracy"))
        if neighbours is not None:
            sentence += f"; nearest neighbours classify {percent(neighbours)} of "
            sentence += f"{held_out_images((run,))} right"
        return f"{sentence}."
    return "Finished, without an accuracy to report."


def final_value(run: Run, name: str) -> float | None:
    """Return the last finite value a run recorded under a name, or that its result holds."""
    for record in reversed(run.records):
        found = number(record.values.get(name))
        if found is not None:
            return found
    return number(run.metrics.get(name))

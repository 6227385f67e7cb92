"""A pipeline expanded into its runs: one per step, or one per point of a step's grid."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bigsimclr.errors import RecipeError
from bigsimclr.recipe.loader import load_recipe
from bigsimclr.recipe.names import find_recipe
from bigsimclr.recipe.schema import AnyStage, PipelineRecipe, PipelineStep

GridPoint = Mapping[str, int | float | str]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a pipeline, checked but not begun."""

    step: str
    path: str  # relative to the pipeline's directory
    grid: GridPoint
    parent: str | None  # path of the parent run, relative to the pipeline's directory
    recipe: AnyStage


def plan_pipeline(
    recipe: PipelineRecipe,
    *,
    source: Path,
    overrides: Mapping[str, object],
    directory: Path,
) -> list[PlannedRun]:
    """Expand a pipeline into its runs, in order, every recipe checked.

    Args:
        recipe: the pipeline.
        source: the pipeline's file; recipes beside it are found by file name.
        overrides: keys for one step as `step.key`, or for every step as `key`.
        directory: where the runs will lie.

    Raises:
        RecipeError: a step, a parent, a grid or an override does not fit.
    """
    names = [step.name for step in recipe.steps]
    runs: list[PlannedRun] = []
    for step in recipe.steps:
        own = _overrides_of(step.name, names, overrides)
        file = find_recipe(step.recipe, beside=source.parent)
        for point in _points(step, own, source):
            parent = _parent_path(step, point, runs, source)
            keys = {**own, **point}
            if parent is not None:
                keys["parent"] = directory / parent
            stage = load_recipe(file, keys)
            if isinstance(stage, PipelineRecipe):
                raise RecipeError(f"{source}: steps: {step.name} names a pipeline, not a stage")
            path = f"{step.name}/{_label(point)}" if point else step.name
            runs.append(PlannedRun(step.name, path, point, parent, stage))
    return runs


def _overrides_of(
    step: str, names: list[str], overrides: Mapping[str, object]
) -> dict[str, object]:
    own: dict[str, object] = {}
    for key, value in overrides.items():
        first, _, rest = key.partition(".")
        if first not in names:
            own[key] = value
        elif first == step:
            own[rest] = value
    return own


def _points(step: PipelineStep, own: Mapping[str, object], source: Path) -> list[GridPoint]:
    taken = [key for key in step.grid if key in own]
    if taken:
        raise RecipeError(
            f"override {taken[0]}: the grid of step '{step.name}' in {source} sets this key"
        )
    keys = list(step.grid)
    return [
        dict(zip(keys, values, strict=True)) for values in itertools.product(*step.grid.values())
    ]


def _label(point: GridPoint) -> str:
    return ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items())


def _parent_path(
    step: PipelineStep, point: GridPoint, runs: list[PlannedRun], source: Path
) -> str | None:
    if step.parent is None:
        return None
    candidates = [run for run in runs if run.step == step.parent]
    matching = [run for run in candidates if not run.grid or dict(run.grid) == dict(point)]
    if len(matching) != 1:
        raise RecipeError(
            f"{source}: steps: {step.name} needs one parent run and {step.parent!r} has "
            f"{len(matching)} for {_label(point) or 'no grid'}; give both the same grid"
        )
    return matching[0].path

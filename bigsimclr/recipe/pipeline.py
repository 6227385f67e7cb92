"""A pipeline expanded into its runs: one per step, or one per point of a step's grid."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bigsimclr.errors import RecipeError
from bigsimclr.recipe.keys import STAGES, dotted_keys, nearest
from bigsimclr.recipe.loader import load_recipe, stage_of
from bigsimclr.recipe.names import find_recipe
from bigsimclr.recipe.schema import AnyStage, PipelineRecipe, PipelineStep
from bigsimclr.recipe.yaml_tree import show

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
        overrides: keys for one step as `step.key`, or as `key` for every step that has it.
        directory: where the runs will lie.

    Raises:
        RecipeError: a step, a parent, a grid or an override does not fit.
    """
    files = {step.name: find_recipe(step.recipe, beside=source.parent) for step in recipe.steps}
    keys_of = {name: _keys_of(file) for name, file in files.items()}
    _refuse_unknown(overrides, keys_of)
    runs: list[PlannedRun] = []
    for step in recipe.steps:
        file = files[step.name]
        own = _overrides_of(step.name, keys_of, overrides)
        for point, parent in _points(step, own, runs, source):
            # An inherited point only names the run: its keys were the parent's.
            keys = {**own, **(point if step.grid else {})}
            if parent is not None:
                keys["parent"] = directory / parent
            stage = load_recipe(file, keys)
            if isinstance(stage, PipelineRecipe):
                raise RecipeError(f"{source}: steps: {step.name} names a pipeline, not a stage")
            path = f"{step.name}/{_label(point)}" if point else step.name
            runs.append(PlannedRun(step.name, path, point, parent, stage))
    return runs


def _keys_of(file: Path) -> set[str]:
    stage = STAGES.get(stage_of(file) or "")
    return set() if stage is None else set(dotted_keys(stage))


def _without_positions(key: str) -> str:
    """Drop positions in lists, which the schema does not name."""
    return ".".join(part for part in key.split(".") if not part.isdecimal())


def _refuse_unknown(overrides: Mapping[str, object], keys_of: Mapping[str, set[str]]) -> None:
    known = set().union(*keys_of.values())
    lines = [
        f"override {show(key)}: no step has this key; {near}"
        for key in overrides
        if key.partition(".")[0] not in keys_of and _without_positions(key) not in known
        if (near := _near(key, known | keys_of.keys()))
    ]
    if lines:
        raise RecipeError("\n".join(lines))


def _near(key: str, known: set[str]) -> str:
    near = nearest(key, sorted(known))
    return f"did you mean '{near}'?" if near else "all keys: bigsimclr explain --all"


def _overrides_of(
    step: str, keys_of: Mapping[str, set[str]], overrides: Mapping[str, object]
) -> dict[str, object]:
    own: dict[str, object] = {}
    for key, value in overrides.items():
        first, _, rest = key.partition(".")
        if first in keys_of:
            if first == step:
                own[rest] = value
        elif _without_positions(key) in keys_of[step]:
            own[key] = value
    return own


def _points(
    step: PipelineStep, own: Mapping[str, object], runs: list[PlannedRun], source: Path
) -> list[tuple[GridPoint, str | None]]:
    taken = [key for key in step.grid if key in own]
    if taken:
        raise RecipeError(
            f"override {taken[0]}: the grid of step '{step.name}' in {source} sets this key"
        )
    parents = [run for run in runs if run.step == step.parent]
    if not step.grid:
        return [(run.grid, run.path) for run in parents] or [({}, None)]
    points = [
        dict(zip(step.grid, values, strict=True))
        for values in itertools.product(*step.grid.values())
    ]
    return [(point, _parent_path(point, parents)) for point in points]


def _label(point: GridPoint) -> str:
    return ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items())


def _parent_path(point: GridPoint, parents: list[PlannedRun]) -> str | None:
    matching = (run.path for run in parents if not run.grid or dict(run.grid) == dict(point))
    return next(matching, None)

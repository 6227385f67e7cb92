"""Stages run in order, each knowing its parent; a step with a grid is run once per point."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bigsimclr.errors import RecipeError
from bigsimclr.recipe import find_recipe, load_recipe
from bigsimclr.recipe.schema import AnyStage, PipelineRecipe, PipelineStep
from bigsimclr.report.progress import Progress
from bigsimclr.stages.run_directory import write_json
from bigsimclr.stages.single import run_stage

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
    if len(set(names)) != len(names):
        raise RecipeError(f"{source}: steps: two steps have the same name")
    runs: list[PlannedRun] = []
    for step in recipe.steps:
        own = _overrides_of(step.name, names, overrides)
        for point in _points(step):
            parent = _parent_path(step, point, runs, source)
            keys = {**own, **point}
            if parent is not None:
                keys["parent"] = str(directory / parent)
            stage = load_recipe(_file_of(step, source), keys)
            if isinstance(stage, PipelineRecipe):
                raise RecipeError(f"{source}: steps: {step.name} names a pipeline, not a stage")
            path = f"{step.name}/{_label(point)}" if point else step.name
            runs.append(PlannedRun(step.name, path, point, parent, stage))
    return runs


def run_pipeline(
    recipe: PipelineRecipe, runs: list[PlannedRun], directory: Path, *, progress: Progress
) -> None:
    """Run a pipeline to its end; finished runs are skipped.

    Raises:
        Stopped: a signal asked for it; the run in progress is saved.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "pipeline.yaml", json.loads(recipe.model_dump_json()))
    write_json(
        directory / "pipeline.json",
        {
            "name": directory.name,
            "steps": [
                {
                    "name": step.name,
                    "stage": next(run.recipe.stage for run in runs if run.step == step.name),
                    "runs": [
                        {"path": run.path, "grid": dict(run.grid), "parent": run.parent}
                        for run in runs
                        if run.step == step.name
                    ],
                }
                for step in recipe.steps
            ],
        },
    )
    for number, run in enumerate(runs, start=1):
        progress.note(f"[{number}/{len(runs)}] {run.path}")
        run_stage(run.recipe, directory / run.path, progress=progress)


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


def _points(step: PipelineStep) -> list[GridPoint]:
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
    if not candidates:
        raise RecipeError(
            f"{source}: steps: the parent {step.parent!r} of {step.name} is no earlier step"
        )
    matching = [run for run in candidates if not run.grid or dict(run.grid) == dict(point)]
    if len(matching) != 1:
        raise RecipeError(
            f"{source}: steps: {step.name} needs one parent run and {step.parent!r} has "
            f"{len(matching)} for {_label(point) or 'no grid'}; give both the same grid"
        )
    return matching[0].path


def _file_of(step: PipelineStep, source: Path) -> Path:
    beside = source.parent / f"{step.recipe}.yaml"
    return beside if beside.exists() else find_recipe(step.recipe)

"""Stages run in order; what is finished is skipped."""

import json
from pathlib import Path

from bigsimclr.engine.stop import StopRequest
from bigsimclr.errors import DataError, RecipeError, Stopped, StorageError
from bigsimclr.recipe.keys import did_you_mean
from bigsimclr.recipe.pipeline import PlannedRun, missing_inputs
from bigsimclr.recipe.schema import PipelineRecipe
from bigsimclr.report.progress import Progress
from bigsimclr.stages.run_directory import LAUNCHER_FOLDER, refuse_strangers, write_json
from bigsimclr.stages.single import finished_result, run_stage
from bigsimclr.world import World


def run_pipeline(
    recipe: PipelineRecipe,
    runs: list[PlannedRun],
    directory: Path,
    *,
    command: str | None,
    world: World,
    progress: Progress,
    stop: StopRequest,
    only: str | None = None,
) -> None:
    """Run a pipeline to its end; finished runs are skipped.

    Args:
        recipe: the pipeline.
        runs: its runs, in order.
        directory: where they lie.
        command: the command line that repeats them.
        world: the ranks that run it together, on the host.
        progress: where progress is shown.
        stop: set by a signal.
        only: the one step to run; None: all of them.

    Raises:
        Stopped: a signal asked for it; the run in progress is saved.
        RecipeError: a finished run was another recipe, the directory holds something else, or
            there is no such step.
        DataError: a list of labels or a parent that a later run reads is not there.
    """
    with world.together():
        wanted = _wanted(recipe, runs, only)
        finished = _finished(recipe, runs, wanted, directory)
        if world.rank == 0:
            _describe(recipe, runs, directory, command)
    # What the first rank sees counts, should the others' view of the disk be an older one.
    done = world.texts("\n".join(run.path for run in finished))[0].splitlines()
    if done:
        progress.note(f"{len(done)} of {len(runs)} runs finished before")
    for number, run in enumerate(runs, start=1):
        if run.path in done or run not in wanted:
            continue
        progress.note(f"[{number}/{len(runs)}] {run.path}")
        run_stage(run.recipe, directory / run.path, world=world, progress=progress, stop=stop)
        if stop.agree(world) is not None:
            raise Stopped(f"by {stop.received} after {run.path}; the same command continues")


def _wanted(recipe: PipelineRecipe, runs: list[PlannedRun], only: str | None) -> list[PlannedRun]:
    """Return the runs of the one step that is asked for, or all."""
    names = [step.name for step in recipe.steps]
    if only is not None and only not in names:
        raise RecipeError(f"--only {only}: no such step; {did_you_mean(only, names)}")
    return [run for run in runs if only in (None, run.step)]


def _finished(
    recipe: PipelineRecipe, runs: list[PlannedRun], wanted: list[PlannedRun], directory: Path
) -> list[PlannedRun]:
    """Return the runs that need not be run again, after checking that those wanted can be."""
    described = directory / "pipeline.json"
    try:
        if not described.exists():
            refuse_strangers(directory, [LAUNCHER_FOLDER, *(step.name for step in recipe.steps)])
    except RecipeError:
        # Another rank, or the job of another step, may describe the pipeline at this moment.
        if not described.exists():
            raise
    finished = [run for run in runs if (directory / run.path / "result.json").exists()]
    for run in finished:
        finished_result(run.recipe, directory / run.path)
    # What is missing is said now, not when the steps before it have run for weeks.
    missing = dict.fromkeys(
        line for run in wanted if run not in finished for line in missing_inputs(run)
    )
    if missing:
        raise DataError("\n".join(missing))
    return finished


def _describe(
    recipe: PipelineRecipe, runs: list[PlannedRun], directory: Path, command: str | None
) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{directory} cannot be written: {error.strerror}") from error
    # First what says whose directory it is.
    write_json(
        directory / "pipeline.json",
        {
            "name": directory.name,
            "command": command,
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
    write_json(directory / "pipeline.yaml", json.loads(recipe.model_dump_json()))

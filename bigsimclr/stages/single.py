"""One stage in one run directory: from a recipe to its result."""

import time
from collections.abc import Mapping
from pathlib import Path

from bigsimclr.data import build_data
from bigsimclr.engine.lock import hold_run
from bigsimclr.engine.loop import Trained
from bigsimclr.engine.stop import Interrupted, StopRequest
from bigsimclr.errors import CheckpointError, Stopped
from bigsimclr.recipe import load_recipe
from bigsimclr.recipe.schema import (
    AnyStage,
    AnyTraining,
    DistillRecipe,
    FinetuneRecipe,
    KnnRecipe,
    LinearRecipe,
    PipelineRecipe,
    PretrainRecipe,
    SupervisedRecipe,
)
from bigsimclr.report.progress import Progress
from bigsimclr.stages.distill import distill
from bigsimclr.stages.evaluate import labelled_held_out
from bigsimclr.stages.finetune import train_with_labels
from bigsimclr.stages.knn import evaluate_neighbours
from bigsimclr.stages.load import digest_of_parent
from bigsimclr.stages.pretrain import pretrain
from bigsimclr.stages.result import Result, summary, write_result
from bigsimclr.stages.run_directory import (
    RunDirectory,
    check_same_origins,
    check_same_recipe,
    read_result,
    recipe_facts,
    with_absolute_paths,
)
from bigsimclr.stages.training import Task
from bigsimclr.world import World, join_world

METRICS = {
    "held_out/accuracy": "accuracy",
    "knn/accuracy": "knn_accuracy",
    "probe/held_out_accuracy": "probe_accuracy",
}


def run_stage(
    recipe: AnyStage, directory: Path, *, progress: Progress, stop: StopRequest
) -> Result:
    """Run a stage to its end; a finished one is read, an interrupted one continued.

    Args:
        recipe: the stage.
        directory: the run directory; made if it is missing.
        progress: where progress is shown.
        stop: set by a signal.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        RecipeError: the directory holds a run of another recipe, or something else.
        StorageError: the directory cannot be written, or another process is writing it.
    """
    recipe = with_absolute_paths(recipe)
    run = RunDirectory(directory)
    run.check_free()
    with hold_run(directory):
        if run.result.exists():
            progress.note(f"{recipe.stage}: finished before, {run.path}")
            return finished_result(recipe, directory)
        world = join_world(
            recipe.parallel.device,
            cpu_threads=recipe.parallel.cpu_threads,
            deterministic=recipe.parallel.deterministic,
        )
        if isinstance(recipe, KnnRecipe):
            return _neighbours(recipe, world, run, progress, stop)
        trained, task = _train(recipe, world, run, progress, stop)
        metrics = {METRICS[name]: value for name, value in trained.values.items()}
        metrics["loss"] = trained.losses["train/loss"]
        progress.end(summary(recipe, metrics, len(labelled_held_out(task.inputs))))
        return write_result(
            recipe,
            run,
            task.inputs,
            metrics=metrics,
            examples=trained.examples,
            checkpoint=trained.checkpoint,
            parent_digest=None if task.parent is None else task.parent.digest,
            seconds=trained.seconds,
        )


def finished_result(recipe: AnyStage, directory: Path) -> Result:
    """Read the result of a finished run of the same recipe.

    Raises:
        RecipeError: it was another recipe.
        CheckpointError: the result is damaged.
    """
    stored = load_recipe(directory / "recipe.yaml")
    if isinstance(stored, PipelineRecipe):
        raise CheckpointError(f"{directory / 'recipe.yaml'} is a pipeline beside a stage's result")
    recipe = with_absolute_paths(recipe)
    check_same_recipe(recipe, recipe_facts(stored), directory)
    found = read_result(directory)
    _check_finished_origins(recipe, stored, found, directory)
    checkpoint, metrics = found.get("checkpoint"), found["metrics"]
    return Result(
        directory,
        directory / checkpoint if isinstance(checkpoint, str) else None,
        {str(k): float(v) for k, v in metrics.items()} if isinstance(metrics, dict) else {},
    )


def _check_finished_origins(
    recipe: AnyStage, stored: AnyStage, found: Mapping[str, object], directory: Path
) -> None:
    now: dict[str, str | None] = {}
    before = {"parent": found.get("parent_digest")}
    if not isinstance(recipe, PretrainRecipe | SupervisedRecipe) and recipe.parent is not None:
        now["parent"] = digest_of_parent(recipe.parent)
    if recipe.data != stored.data:
        data = found.get("data")
        before["images"] = data.get("fingerprint") if isinstance(data, dict) else None
        now["images"] = build_data(recipe.data).train.fingerprint
    check_same_origins(now, before, directory)


def _train(
    recipe: AnyTraining,
    world: World,
    run: RunDirectory,
    progress: Progress,
    stop: StopRequest,
) -> tuple[Trained, Task]:
    match recipe:
        case PretrainRecipe():
            return pretrain(recipe, world=world, run=run, progress=progress, stop=stop)
        case DistillRecipe():
            return distill(recipe, world=world, run=run, progress=progress, stop=stop)
        case LinearRecipe() | FinetuneRecipe() | SupervisedRecipe():
            return train_with_labels(recipe, world=world, run=run, progress=progress, stop=stop)


def _neighbours(
    recipe: KnnRecipe, world: World, run: RunDirectory, progress: Progress, stop: StopRequest
) -> Result:
    started = time.monotonic()
    try:
        measured = evaluate_neighbours(recipe, world=world, run=run, stop=stop)
    except Interrupted:
        raise Stopped(f"by {stop.received}; the same command begins knn again") from None
    metrics = {"accuracy": measured.accuracy}
    progress.note(summary(recipe, metrics, len(labelled_held_out(measured.inputs))))
    return write_result(
        recipe,
        run,
        measured.inputs,
        metrics=metrics,
        examples=0,
        checkpoint=None,
        parent_digest=measured.parent.digest,
        seconds=time.monotonic() - started,
    )

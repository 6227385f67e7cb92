"""One stage in one run directory: from a recipe to its result."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

import bigsimclr
from bigsimclr.data import build_data
from bigsimclr.engine.liveness import Pulse
from bigsimclr.engine.lock import hold_run
from bigsimclr.engine.loop import Trained
from bigsimclr.engine.stop import Interrupted, StopRequest
from bigsimclr.errors import CheckpointError, Stopped
from bigsimclr.recipe import load_recipe
from bigsimclr.recipe.plan import share_batch
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
    ActiveRun,
    RunDirectory,
    check_same_origins,
    check_same_recipe,
    read_result,
    recipe_facts,
    with_absolute_paths,
)
from bigsimclr.stages.training import Task
from bigsimclr.world import World, own_job, use_device

METRICS = {
    "held_out/accuracy": "accuracy",
    "knn/accuracy": "knn_accuracy",
    "probe/held_out_accuracy": "probe_accuracy",
}


def run_stage(
    recipe: AnyStage, directory: Path, *, world: World, progress: Progress, stop: StopRequest
) -> Result:
    """Run a stage to its end; a finished one is read, an interrupted one continued.

    Args:
        recipe: the stage.
        directory: the run directory; made if it is missing.
        world: the ranks that run it together, on the host.
        progress: where progress is shown.
        stop: set by a signal.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        RecipeError: the directory holds a run of another recipe, or something else.
        StorageError: the directory cannot be written, or another process is writing it.
        DistributedError: the ranks were started with different recipes or versions.
    """
    recipe = with_absolute_paths(recipe)
    run = RunDirectory(directory)
    world.check_same("version", f"bigsimclr {bigsimclr.__version__}, torch {torch.__version__}")
    world.check_same("recipe", f"{_digest(recipe)} in {directory.absolute()}")
    with world.together():
        if world.rank == 0:
            run.check_free()
        if not isinstance(recipe, KnnRecipe):
            share_batch(recipe, world_size=world.size)
    with _held(directory, world) as fence:
        if world.numbers(int(run.result.exists()))[0]:
            progress.note(f"{recipe.stage}: finished before, {run.path}")
            with world.together():
                return finished_result(recipe, directory)
        parallel = recipe.parallel
        with world.together():
            here = use_device(
                world,
                parallel.device,
                cpu_threads=parallel.cpu_threads,
                deterministic=parallel.deterministic,
            )
        with Pulse(
            world.store,
            world.rank,
            world.size,
            hang_seconds=parallel.hang_seconds,
            stacks=directory / "stacks",
        ) as pulse:
            active = ActiveRun(run, fence, pulse)
            if isinstance(recipe, KnnRecipe):
                return _neighbours(recipe, here, active, progress, stop)
            trained, task = _train(recipe, here, active, progress, stop)
            metrics = {METRICS[name]: value for name, value in trained.values.items()}
            metrics["loss"] = trained.losses["train/loss"]
            progress.end(summary(recipe, metrics, len(labelled_held_out(task.inputs))))
            return write_result(
                recipe,
                active,
                task.inputs,
                metrics=metrics,
                examples=trained.examples,
                checkpoint=trained.checkpoint,
                parent_digest=None if task.parent is None else task.parent.digest,
                seconds=trained.seconds,
            )


def _digest(recipe: AnyStage) -> str:
    content = json.dumps(recipe_facts(recipe), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


@contextmanager
def _held(directory: Path, world: World) -> Iterator[Callable[[], None]]:
    """Hold a run directory; the first rank does it for all of them."""
    fence: Callable[[], None] = _no_fence
    with ExitStack() as stack:
        with world.together():
            if world.rank == 0:
                fence = stack.enter_context(hold_run(directory, job=own_job()))
        yield fence


def _no_fence() -> None:
    """Do nothing: only the first rank publishes."""


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
    run: ActiveRun,
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
    recipe: KnnRecipe, world: World, run: ActiveRun, progress: Progress, stop: StopRequest
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

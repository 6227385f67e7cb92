"""One stage in one run directory: from a recipe to `result.json`."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from bigsimclr.engine.lock import hold_run
from bigsimclr.engine.loop import Trained
from bigsimclr.engine.stop import StopRequest
from bigsimclr.errors import RecipeError
from bigsimclr.recipe import load_recipe
from bigsimclr.recipe.schema import (
    AnyStage,
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
from bigsimclr.stages.finetune import train_with_labels
from bigsimclr.stages.inputs import Inputs
from bigsimclr.stages.knn import evaluate_neighbours
from bigsimclr.stages.pretrain import pretrain
from bigsimclr.stages.run_directory import (
    RunDirectory,
    check_same_recipe,
    recipe_facts,
    write_json,
)
from bigsimclr.stages.training import Result, Task
from bigsimclr.world import World, join_world

ENCODER = {
    "pretrain": "frozen",
    "linear": "frozen",
    "knn": "frozen",
    "finetune": "fine-tuned",
    "supervised": "from scratch",
    "distill": "distilled",
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
        RecipeError: the directory holds a run of another recipe.
        StorageError: the directory cannot be written, or another process is writing it.
    """
    with hold_run(directory):
        run = RunDirectory(directory)
        if run.result.exists():
            return _finished(recipe, run, progress)
        world = join_world(
            recipe.parallel.device,
            cpu_threads=recipe.parallel.cpu_threads,
            deterministic=recipe.parallel.deterministic,
        )
        if isinstance(recipe, KnnRecipe):
            return _neighbours(recipe, world, run, progress)
        trained, task = _train(recipe, world, run, progress, stop)
        return _conclude(recipe, run, trained, task, progress)


def _train(
    recipe: PretrainRecipe | LinearRecipe | FinetuneRecipe | SupervisedRecipe | DistillRecipe,
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


def _neighbours(recipe: KnnRecipe, world: World, run: RunDirectory, progress: Progress) -> Result:
    started = time.monotonic()
    values, inputs = evaluate_neighbours(recipe, world=world, run=run)
    metrics = {"accuracy": values["knn/accuracy"]}
    _write_result(
        recipe,
        run,
        metrics,
        inputs,
        examples=0,
        checkpoint=None,
        seconds=time.monotonic() - started,
    )
    progress.note(_summary(recipe, metrics, len(inputs.held_out or ())))
    return Result(run.path, None, metrics)


def _conclude(
    recipe: PretrainRecipe | LinearRecipe | FinetuneRecipe | SupervisedRecipe | DistillRecipe,
    run: RunDirectory,
    trained: Trained,
    task: Task,
    progress: Progress,
) -> Result:
    names = {
        "held_out/accuracy": "accuracy",
        "knn/accuracy": "knn_accuracy",
        "probe/held_out_accuracy": "probe_accuracy",
    }
    metrics = {names[name]: value for name, value in trained.values.items()}
    metrics["loss"] = trained.losses["train/loss"]
    checkpoint = trained.checkpoint.relative_to(run.path)
    _write_result(
        recipe,
        run,
        metrics,
        task.inputs,
        examples=trained.examples,
        checkpoint=checkpoint,
        seconds=trained.seconds,
    )
    held_out = task.inputs.held_out
    progress.end(_summary(recipe, metrics, 0 if held_out is None else len(held_out)))
    return Result(run.path, trained.checkpoint, metrics)


def _write_result(
    recipe: AnyStage,
    run: RunDirectory,
    metrics: Mapping[str, float],
    inputs: Inputs,
    *,
    examples: int,
    checkpoint: Path | None,
    seconds: float,
) -> None:
    parent = None if isinstance(recipe, PretrainRecipe | SupervisedRecipe) else recipe.parent
    write_json(
        run.result,
        {
            "stage": recipe.stage,
            "examples": examples,
            "metrics": dict(metrics),
            "protocol": _protocol(recipe, inputs, examples),
            "parent": None if parent is None else os.path.relpath(parent, run.path),
            "checkpoint": None if checkpoint is None else checkpoint.as_posix(),
            "seconds": round(seconds, 3),
            "data": inputs.facts(),
        },
    )


def _protocol(recipe: AnyStage, inputs: Inputs, examples: int) -> dict[str, object]:
    return {
        "encoder": ENCODER[recipe.stage],
        "head_layer": 0 if isinstance(recipe, PretrainRecipe) else recipe.from_layer,
        "epochs": round(examples / len(inputs.indices), 2),
        "augmentation": _augmentation(recipe),
        "seed": recipe.seed,
        "n": 0 if inputs.held_out is None else len(inputs.held_out),
        **_labels_used(recipe),
        "checkpoint": "last",
    }


def _labels_used(recipe: AnyStage) -> dict[str, object]:
    labels = None if isinstance(recipe, PretrainRecipe) else recipe.labels
    if labels is not None:
        return {
            "labels_per_class": labels.per_class,
            "labels_percent": labels.percent,
            "draw": labels.draw,
        }
    names = ("labels_per_class", "labels_percent", "draw")
    if isinstance(recipe, DistillRecipe) and recipe.parent is not None:
        # A student has seen the labels its teacher saw.
        text = (recipe.parent / "result.json").read_text(encoding="utf-8")
        teacher = json.loads(text)["protocol"]
        return {name: teacher[name] for name in names}
    return dict.fromkeys(names)


def _augmentation(recipe: AnyStage) -> str:
    if isinstance(recipe, KnnRecipe):
        return "none"
    parts = ["crop"]
    if recipe.augment.flip_probability > 0:
        parts.append("flip")
    if isinstance(recipe, PretrainRecipe):
        augment = recipe.augment
        if augment.colour_strength > 0 and augment.colour_probability > 0:
            parts.append("colour")
        if augment.grey_probability > 0:
            parts.append("grey")
        if augment.blur_probability > 0:
            parts.append("blur")
    return " + ".join(parts)


def _summary(recipe: AnyStage, metrics: Mapping[str, float], held_out: int) -> str:
    shown = [
        f"{name.replace('_', ' ')} {100 * value:.1f}%"
        for name, value in metrics.items()
        if name.endswith("accuracy")
    ]
    where = f" on {held_out:,} held-out images" if shown else ""
    return f"{recipe.stage}: {', '.join(shown) or 'done'}{where}"


def _finished(recipe: AnyStage, run: RunDirectory, progress: Progress) -> Result:
    stored = load_recipe(run.path / "recipe.yaml")
    if isinstance(stored, PipelineRecipe):
        raise RecipeError(f"{run.path} holds a pipeline; choose another --out")
    check_same_recipe(recipe, recipe_facts(stored), run.path)
    found = json.loads(run.result.read_text(encoding="utf-8"))
    progress.note(f"{recipe.stage}: finished before, {run.path}")
    checkpoint = found["checkpoint"]
    return Result(run.path, None if checkpoint is None else run.path / checkpoint, found["metrics"])

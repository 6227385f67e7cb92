"""`result.json`: what a finished stage reached, under which protocol, from which parent."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bigsimclr.recipe.schema import (
    AnyStage,
    DistillRecipe,
    KnnRecipe,
    PretrainRecipe,
    SupervisedRecipe,
)
from bigsimclr.stages.evaluate import labelled_held_out
from bigsimclr.stages.inputs import Inputs
from bigsimclr.stages.run_directory import ActiveRun, read_result, write_json

ENCODER = {
    "pretrain": "frozen",
    "linear": "frozen",
    "knn": "frozen",
    "finetune": "fine-tuned",
    "supervised": "from scratch",
    "distill": "distilled",
}


@dataclass(frozen=True)
class Result:
    """How a stage ended."""

    directory: Path
    checkpoint: Path | None  # None for a stage that trains nothing
    metrics: Mapping[str, float]


def write_result(
    recipe: AnyStage,
    run: ActiveRun,
    inputs: Inputs,
    *,
    metrics: Mapping[str, float],
    examples: int,
    checkpoint: Path | None,
    parent_digest: str | None,
    seconds: float,
) -> Result:
    """Write the result of a run, which says that it is finished; the first rank does it.

    Raises:
        StorageError: it cannot be written, or the directory was taken over.
    """
    directory = run.directory
    parent = None if isinstance(recipe, PretrainRecipe | SupervisedRecipe) else recipe.parent
    inside = None if checkpoint is None else checkpoint.relative_to(directory.path).as_posix()
    with inputs.world.together():
        if inputs.world.rank == 0:
            run.fence()
            write_json(
                directory.result,
                {
                    "stage": recipe.stage,
                    "examples": examples,
                    "metrics": dict(metrics),
                    "protocol": _protocol(recipe, inputs, examples),
                    "parent": None if parent is None else os.path.relpath(parent, directory.path),
                    "parent_digest": parent_digest,
                    "checkpoint": inside,
                    "seconds": round(seconds, 3),
                    "data": {**inputs.facts(), "unreadable": len(directory.unreadable())},
                },
            )
    return Result(directory.path, checkpoint, metrics)


def summary(recipe: AnyStage, metrics: Mapping[str, float], held_out: int) -> str:
    """Say in one line how a stage ended."""
    shown = [
        f"{name.replace('_', ' ')} {100 * value:.1f}%"
        for name, value in metrics.items()
        if name.endswith("accuracy")
    ]
    if shown:
        return f"{recipe.stage}: {', '.join(shown)} on {held_out:,} held-out images"
    if held_out or isinstance(recipe, PretrainRecipe):
        return f"{recipe.stage}: done"
    return f"{recipe.stage}: done; nothing measured without data.held_out or held_out_fraction"


def _protocol(recipe: AnyStage, inputs: Inputs, examples: int) -> dict[str, object]:
    return {
        "encoder": ENCODER[recipe.stage],
        "head_layer": 0 if isinstance(recipe, PretrainRecipe) else recipe.from_layer,
        "epochs": round(examples / len(inputs.indices), 2),
        "augmentation": _augmentation(recipe),
        "seed": recipe.seed,
        "n": len(labelled_held_out(inputs)),
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
    if isinstance(recipe, DistillRecipe) and recipe.parent is not None and recipe.parent.is_dir():
        # A student has seen the labels its teacher saw.
        teacher = read_result(recipe.parent).get("protocol")
        return {name: teacher.get(name) for name in names} if isinstance(teacher, dict) else {}
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

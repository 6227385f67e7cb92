"""A finished or running run, read back as a model."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from bigsimclr.engine.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from bigsimclr.errors import CheckpointError, RecipeError
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.simclr import SimCLR
from bigsimclr.recipe.schema import DistillRecipe, FinetuneRecipe, KnnRecipe, LinearRecipe
from bigsimclr.recipe.sections import DataSection
from bigsimclr.recipe.steps import PARENTS
from bigsimclr.stages.run_directory import read_result


@dataclass(frozen=True)
class Loaded:
    """A model with what its run knows about it."""

    model: SimCLR  # in evaluation mode, on the CPU
    architecture: Architecture
    classes: tuple[str, ...]  # names of the classifier's outputs; empty without a classifier
    facts: dict[str, object]  # of the checkpoint
    checkpoint: Path
    digest: str  # sha256 (hex) of the checkpoint's manifest, which names all its contents


def load_model(path: Path | str) -> SimCLR:
    """Load the model of a run directory or of one checkpoint, in evaluation mode.

    Raises:
        CheckpointError: there is no intact checkpoint.
    """
    return load_run(Path(path)).model


def load_run(path: Path) -> Loaded:
    """Load the model of a run directory or of one checkpoint with its facts.

    Raises:
        CheckpointError: there is no intact checkpoint.
    """
    checkpoint = _find(path)
    architecture = _architecture(checkpoint)
    model = build_model(architecture, seed=0)
    model.load_state_dict(checkpoint.tensors["model"])
    classes = checkpoint.facts.get("classes")
    return Loaded(
        model=model.eval(),
        architecture=architecture,
        classes=tuple(str(name) for name in classes) if isinstance(classes, list) else (),
        facts=checkpoint.facts,
        checkpoint=checkpoint.path,
        digest=digest_of(checkpoint.path),
    )


def load_parent(recipe: LinearRecipe | KnnRecipe | FinetuneRecipe | DistillRecipe) -> Loaded:
    """Load the run a stage builds on.

    Raises:
        RecipeError: no parent is named, it is a run of another stage, or it trained on images that
            the stage that asks holds out.
        CheckpointError: the parent has no intact checkpoint, or is not finished.
    """
    parent, stages = recipe.parent, PARENTS[recipe.stage]
    wanted = " or ".join(stages)
    if parent is None:
        raise RecipeError(
            f"parent: this stage needs the run directory of a {wanted} run; give parent=DIR"
        )
    if not parent.is_dir():
        raise CheckpointError(f"parent: {parent} is not a run directory")
    if not (parent / "result.json").exists():
        raise CheckpointError(f"parent: {parent} is not finished; run it to its end first")
    loaded = load_run(parent)
    before = loaded.facts.get("recipe")
    stage = before.get("stage") if isinstance(before, dict) else None
    if stage not in stages:
        raise RecipeError(f"parent: {parent} is a {stage} run; this stage needs a {wanted} run")
    _refuse_leak(parent, before.get("data") if isinstance(before, dict) else None, recipe.data)
    return loaded


def _refuse_leak(parent: Path, before: object, data: DataSection) -> None:
    """Refuse a share held out of images of which the parent held out another share."""
    now = json.loads(data.model_dump_json())
    if not isinstance(before, dict) or before.get("kind") != now["kind"]:
        return
    if now.get("held_out") is not None or not now["held_out_fraction"]:
        return
    if before.get("root") != now.get("root") or before.get("train") != now.get("train"):
        return
    keys = ("held_out", "held_out_fraction", "split_seed", "labelled")
    other = [f"data.{key}={before.get(key)}" for key in keys if before.get(key) != now.get(key)]
    if other:
        raise RecipeError(
            f"data: {parent} was trained with {', '.join(other)} on the same images, so some held "
            "out here were trained on there; give both runs the same keys, or hold images out in "
            "a folder of their own (data.held_out)"
        )


def digest_of(checkpoint: Path) -> str:
    """Identify a checkpoint by its contents.

    Raises:
        CheckpointError: it is not there.
    """
    try:
        manifest = (checkpoint / "manifest.json").read_bytes()
    except OSError as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {error.strerror}") from error
    return hashlib.sha256(manifest).hexdigest()


def final_checkpoint(run: Path) -> Path:
    """Return the checkpoint that the result of a finished run is about.

    Raises:
        CheckpointError: the result is damaged, or nothing was trained.
    """
    name = read_result(run).get("checkpoint")
    if not isinstance(name, str):
        raise CheckpointError(f"{run} trained nothing and holds no network")
    return run / name


def check_layer(from_layer: int, parent: Loaded) -> None:
    """Refuse a head layer that a network does not have.

    Raises:
        RecipeError: it has fewer layers.
    """
    head, kept = parent.architecture.head, parent.architecture.keep_head_layers
    layers = 0 if head is None else head.layers if kept is None else kept
    if from_layer > layers:
        raise RecipeError(
            f"from_layer: {from_layer} is beyond the {layers} head layers of "
            f"{parent.checkpoint}; use from_layer=0 for the backbone's features"
        )


def _find(path: Path) -> Checkpoint:
    if (path / "manifest.json").exists():
        return read_checkpoint(path)
    if (path / "result.json").exists():
        # An older checkpoint would be another network than the one that was measured.
        return read_checkpoint(final_checkpoint(path))
    checkpoint = newest_checkpoint(path / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{path} holds no checkpoint")
    return checkpoint


def _architecture(checkpoint: Checkpoint) -> Architecture:
    try:
        return Architecture.from_json(str(checkpoint.facts.get("architecture")))
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path} does not describe its network: {error}"
        ) from error

"""A finished or running run, read back as a model."""

from dataclasses import dataclass
from pathlib import Path

from bigsimclr.engine.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from bigsimclr.errors import CheckpointError, RecipeError
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.simclr import SimCLR


@dataclass(frozen=True)
class Loaded:
    """A model with what its run knows about it."""

    model: SimCLR  # in evaluation mode, on the CPU
    architecture: Architecture
    classes: tuple[str, ...]  # names of the classifier's outputs; empty without a classifier
    facts: dict[str, object]  # of the checkpoint
    checkpoint: Path


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
    )


def load_parent(parent: Path | None, *, stages: tuple[str, ...]) -> Loaded:
    """Load the run a stage builds on.

    Args:
        parent: its run directory.
        stages: the stages it may be a run of.

    Raises:
        RecipeError: no parent is named, or it is a run of another stage.
        CheckpointError: the parent has no intact checkpoint, or is not finished.
    """
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
    recipe = loaded.facts.get("recipe")
    stage = recipe.get("stage") if isinstance(recipe, dict) else None
    if stage not in stages:
        raise RecipeError(f"parent: {parent} is a {stage} run; this stage needs a {wanted} run")
    return loaded


def _find(path: Path) -> Checkpoint:
    if (path / "manifest.json").exists():
        return read_checkpoint(path)
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

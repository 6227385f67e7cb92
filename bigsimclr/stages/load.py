"""A run, one of its checkpoints, or a model file, read back as a model."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from bigsimclr.engine.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from bigsimclr.errors import CheckpointError, RecipeError
from bigsimclr.interop import PortableModel, Preprocessing
from bigsimclr.interop.model_file import read_model_file
from bigsimclr.models import Architecture, restore_model
from bigsimclr.models.simclr import SimCLR
from bigsimclr.recipe.schema import DistillRecipe, FinetuneRecipe, KnnRecipe, LinearRecipe
from bigsimclr.recipe.sources import DataSection
from bigsimclr.recipe.steps import PARENTS
from bigsimclr.stages.run_directory import read_result


@dataclass(frozen=True)
class Loaded:
    """A network with where it comes from."""

    portable: PortableModel
    recipe: Mapping[str, object]  # of the run; empty for a model file
    path: Path  # the checkpoint or the file
    digest: str  # sha256 (hex) of the file, or of the checkpoint's manifest, which names all of it

    @property
    def model(self) -> SimCLR:
        """Return the network, in evaluation mode, on the CPU."""
        return self.portable.model

    @property
    def architecture(self) -> Architecture:
        """Return the network's description."""
        return self.portable.architecture

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classifier's outputs; empty without a classifier."""
        return self.portable.classes


def load_model(path: Path | str) -> SimCLR:
    """Load the network of a run directory, of one checkpoint, or of a model file.

    Args:
        path: the run directory, the checkpoint's directory, or a `.safetensors` file that
            `import-tf` or `export` wrote.

    Returns:
        The network in evaluation mode, on the CPU. It maps images [N,3,H,W], float32 in [0,1], to
        `features` [N,F], `projections` (the output of each layer of the head) and `logits` [N,K],
        which is None without a classifier.

    Raises:
        CheckpointError: there is no intact checkpoint, or the file is damaged.
    """
    return load_network(Path(path)).model


def load_network(path: Path) -> Loaded:
    """Load the network of a run directory, of one checkpoint, or of a model file, with its origin.

    Raises:
        CheckpointError: there is no intact checkpoint, or the file is damaged.
    """
    if path.is_file():
        return Loaded(read_model_file(path), {}, path, digest_of(path))
    checkpoint = _find(path)
    recipe = checkpoint.facts.get("recipe")
    if not isinstance(recipe, dict):
        raise CheckpointError(f"{checkpoint.path} does not say what trained it")
    architecture = _architecture(checkpoint)
    classes = checkpoint.facts.get("classes")
    portable = PortableModel(
        model=restore_model(architecture, checkpoint.tensors["model"]),
        architecture=architecture,
        classes=tuple(str(name) for name in classes) if isinstance(classes, list) else (),
        preprocessing=_preprocessing(checkpoint.path, recipe.get("augment")),
        origin=f"{recipe.get('stage')} run, {checkpoint.examples:,} examples seen",
    )
    return Loaded(portable, recipe, checkpoint.path, digest_of(checkpoint.path))


def load_parent(recipe: LinearRecipe | KnnRecipe | FinetuneRecipe | DistillRecipe) -> Loaded:
    """Load the run or the model file a stage builds on.

    Raises:
        RecipeError: no parent is named, it is a run of another stage, or it trained on images that
            the stage that asks holds out.
        CheckpointError: the parent has no intact checkpoint, or is not finished.
    """
    parent, stages = recipe.parent, PARENTS[recipe.stage]
    wanted = " or ".join(stages)
    if parent is None:
        raise RecipeError(
            f"parent: this stage needs the run directory of a {wanted} run, or a model file; "
            "give parent=DIR or parent=FILE"
        )
    if parent.is_file():
        return load_network(parent)
    if not (parent / "recipe.yaml").exists():
        raise CheckpointError(f"parent: {parent} is not a run directory, nor a model file")
    if not (parent / "result.json").exists():
        raise CheckpointError(f"parent: {parent} is not finished; run it to its end first")
    loaded = load_network(parent)
    stage = loaded.recipe.get("stage")
    if stage not in stages:
        raise RecipeError(f"parent: {parent} is a {stage} run; this stage needs a {wanted} run")
    _refuse_leaks(parent, loaded.recipe.get("data"), recipe.data)
    return loaded


def _refuse_leaks(parent: Path, before: object, data: DataSection) -> None:
    for now in _single_sources(json.loads(data.model_dump_json())):
        for earlier in _single_sources(before):
            _refuse_leak(parent, earlier, now)


def _single_sources(data: object) -> list[dict[str, object]]:
    """List the sources of a mixture, or the one there is, as the recipe's plain values."""
    if not isinstance(data, dict):
        return []
    sources = data.get("sources")
    return [source["data"] for source in sources] if isinstance(sources, list) else [data]


def _refuse_leak(parent: Path, before: dict[str, object], now: dict[str, object]) -> None:
    """Refuse a share held out of images of which the parent held out another share."""
    if before.get("kind") != now["kind"]:
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


def digest_of(path: Path) -> str:
    """Identify a checkpoint's directory or a model file by its contents.

    Raises:
        CheckpointError: it is not there.
    """
    try:
        with (path if path.is_file() else path / "manifest.json").open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def digest_of_parent(parent: Path) -> str:
    """Identify what a stage builds on: a finished run's network, or a model file.

    Raises:
        CheckpointError: it is not there, or not finished.
    """
    return digest_of(parent if parent.is_file() else final_checkpoint(parent))


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
            f"{parent.path}; use from_layer=0 for the backbone's features"
        )


def _find(path: Path) -> Checkpoint:
    if (path / "manifest.json").exists():
        return read_checkpoint(path)
    if (path / "result.json").exists():
        # An older checkpoint would be another network than the one that was measured.
        return read_checkpoint(final_checkpoint(path))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a run directory or a model file")
    checkpoint = newest_checkpoint(path / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{path} holds no checkpoint, and is no model file")
    return checkpoint


def _architecture(checkpoint: Checkpoint) -> Architecture:
    try:
        return Architecture.from_json(str(checkpoint.facts.get("architecture")))
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path} does not describe its network: {error}"
        ) from error


def _preprocessing(checkpoint: Path, augment: object) -> Preprocessing:
    known = augment if isinstance(augment, dict) else {}
    try:
        return TypeAdapter(Preprocessing).validate_python(
            {entry.name: known.get(entry.name) for entry in fields(Preprocessing)}
        )
    except ValidationError as error:
        raise CheckpointError(f"{checkpoint} does not say how its images were prepared") from error

"""Which network a stage trains, as far as that can be known without running anything."""

import json
import os
from pathlib import Path
from typing import assert_never

from bigsimclr.data.places import expanded
from bigsimclr.errors import DataError, RecipeError
from bigsimclr.models import Architecture
from bigsimclr.recipe.schema import (
    AnyStage,
    DistillRecipe,
    FinetuneRecipe,
    KnnRecipe,
    LinearRecipe,
    PretrainRecipe,
    SupervisedRecipe,
)
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone
from bigsimclr.recipe.sources import DataSection, DigitsData, FolderData

_HEADER_LIMIT = 1 << 24  # bytes; that of the largest network's file has less than 1 MB


def stage_network(
    recipe: AnyStage,
    *,
    parent: Architecture | None,  # of the run it builds on; None where that is not at hand
    classes: int | None,  # of the images; None where they are not counted
) -> Architecture | None:
    """Describe the network that a stage trains; None where it is not known or nothing is trained.

    A classifier of unknown size is left out.

    Raises:
        RecipeError: the stage reads a head layer that its parent does not have.
    """
    match recipe:
        case KnnRecipe():
            return None
        case PretrainRecipe():
            probed = classes if recipe.probe.linear else None
            return Architecture(recipe.backbone, recipe.head, probed or None, from_layer=0)
        case SupervisedRecipe():
            return _cut(recipe.backbone, recipe.head, classes, recipe.from_layer)
        case DistillRecipe():
            backbone = recipe.backbone or (None if parent is None else parent.backbone)
            learnt = classes if parent is None else parent.classes
            head, layer = recipe.head, recipe.from_layer
            return None if backbone is None else _cut(backbone, head, learnt, layer)
        case LinearRecipe() | FinetuneRecipe():
            if parent is None:
                return None
            _check_layer(recipe.from_layer, parent)
            return _cut(parent.backbone, parent.head, classes, recipe.from_layer)
        case _:
            assert_never(recipe)


def _cut(
    backbone: ResNetBackbone, head: HeadSection | None, classes: int | None, from_layer: int
) -> Architecture:
    """Describe a network that ends with a classifier, at a layer of its head."""
    return Architecture(backbone, head, classes or None, from_layer, keep_head_layers=from_layer)


def _check_layer(from_layer: int, parent: Architecture) -> None:
    head, kept = parent.head, parent.keep_head_layers
    layers = 0 if head is None else head.layers if kept is None else kept
    if from_layer > layers:
        raise RecipeError(
            f"from_layer: {from_layer} is beyond the {layers} head layers of the parent; "
            "use from_layer=0 for the backbone's features"
        )


def stored_network(path: Path) -> Architecture | None:
    """Read the description of a finished run's network, or of a model file's; None without one."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, _HEADER_LIMIT)))
            return Architecture.from_json(header["__metadata__"]["architecture"])
        result = json.loads((path / "result.json").read_bytes())
        facts = json.loads((path / result["checkpoint"] / "facts.json").read_bytes())
        return Architecture.from_json(facts["architecture"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def count_classes(data: DataSection) -> int | None:
    """Count the classes of a recipe's images by the names of folders; None where that cannot be.

    0 stands for images without labels. Parquet files and arrays would have to be read.
    """
    match data:
        case DigitsData():
            return 10
        case FolderData(labelled=False):
            return 0
        case FolderData():
            try:
                folder = expanded(data.root, "data.root") / data.train
                with os.scandir(folder) as entries:
                    return sum(entry.is_dir() and entry.name[0] != "." for entry in entries)
            except (DataError, OSError):
                return None
        case _:
            return None

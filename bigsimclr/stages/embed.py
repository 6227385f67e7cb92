"""Embeddings and predictions: for tensors in memory, and for folders of images to files."""

import csv
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bigsimclr.augment import ViewSettings
from bigsimclr.augment.device import make_views
from bigsimclr.data.folder import single_image, training_folder
from bigsimclr.data.loader import evaluation_batches
from bigsimclr.errors import CheckpointError, DataError, RecipeError
from bigsimclr.interop import PortableModel
from bigsimclr.models.simclr import SimCLR
from bigsimclr.stages.evaluate import hidden, inference
from bigsimclr.stages.load import load_network
from bigsimclr.storage import whole_file
from bigsimclr.world import ALONE, use_device


def embed(
    model: SimCLR,
    images: Tensor,  # [N,3,H,W]: uint8, or float in [0,1]
    *,
    from_layer: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """Return the features [N,F] float32 of images, on the CPU.

    Args:
        model: the network; its mode is restored afterwards.
        images: all of one size, which the network sees as it is.
        from_layer: 0 for the backbone's features, k for the output of the head's layer k.
        batch_size: images per forward pass.

    Raises:
        ValueError: the images are not a tensor [N,3,H,W], neither uint8 nor floats, or floats
            outside [0,1]; or the head has fewer layers.
    """
    _check_images(images)
    layers = 0 if model.head is None else len(model.head.layers)
    if not 0 <= from_layer <= layers:
        raise ValueError(f"from_layer {from_layer}: the head has {layers} layers")
    device = next(model.parameters()).device
    parts = []
    with inference(model):
        for piece in images.split(batch_size):
            pixels = piece.to(device)
            scaled = pixels.float() / 255 if not pixels.is_floating_point() else pixels.float()
            outputs = model(scaled.contiguous(memory_format=torch.channels_last))
            parts.append(hidden(outputs, from_layer).float().cpu())
    return torch.cat(parts)  # also without images, which come as one empty piece


def _check_images(
    images: Tensor,  # [N,3,H,W]
) -> None:
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images must be a tensor [N,3,H,W], not a {type(images).__name__}; the command "
            "`bigsimclr embed` reads folders"
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [N,3,H,W], not {list(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8, or floats in [0,1], not {images.dtype}")
    if images.is_floating_point() and images.numel():
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):  # nor where they are not numbers
            raise ValueError(
                f"float images must lie in [0,1] and these reach from {low:.3g} to {high:.3g}; "
                "no mean or standard deviation is subtracted"
            )


@dataclass(frozen=True)
class Written:
    """What went into a file of embeddings or predictions."""

    images: int
    unreadable: tuple[str, ...]  # names of images left out


@dataclass(frozen=True)
class _Row:
    """What a network says of one image file."""

    name: str
    features: Tensor  # [F] of the backbone
    logits: Tensor | None  # [K]


def embed_to_file(run: Path, images: Path, out: Path) -> Written:
    """Write the backbone's features of a folder of images, or of one image, to an .npz file.

    The file holds `names` [N] (text) and `features` [N,F] (float32), in the order of the names.
    Images that cannot be read are left out.

    Raises:
        DataError: the folder holds no image that can be read.
        RecipeError: `out` does not end in .npz.
        StorageError: `out` cannot be written.
    """
    with _named(out, ".npz") as temporary:
        unreadable: dict[str, str] = {}
        rows = list(_rows(load_network(run).portable, images, unreadable))
        if not rows:
            raise DataError(f"{images}: no image could be read")
        names = np.array([row.name for row in rows])
        features = torch.stack([row.features for row in rows]).numpy()
        with temporary.open("wb") as file:
            np.savez(file, names=names, features=features)
    return Written(len(rows), tuple(unreadable))


def predict_to_file(run: Path, images: Path, out: Path) -> Written:
    """Write the class of every image in a folder, or of one, to a CSV file.

    Its columns are name, class and probability.

    Images that cannot be read are left out.

    Raises:
        CheckpointError: the network has no classifier.
        DataError: the folder holds no image that can be read.
        RecipeError: `out` does not end in .csv.
        StorageError: `out` cannot be written.
    """
    with _named(out, ".csv") as temporary:
        portable = load_network(run).portable
        if portable.architecture.classes is None:
            raise CheckpointError(f"{run} has no classifier; fine-tune it first, or use embed")
        unreadable: dict[str, str] = {}
        written = 0
        with temporary.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["name", "class", "probability"])
            for row in _rows(portable, images, unreadable):
                if row.logits is None:
                    raise AssertionError("a classifier has logits")
                probability, number = row.logits.softmax(0).max(0)
                table.writerow([row.name, portable.classes[int(number)], f"{probability:.6f}"])
                written += 1
        if not written:
            raise DataError(f"{images}: no image could be read")
    return Written(written, tuple(unreadable))


def _rows(portable: PortableModel, images: Path, unreadable: dict[str, str]) -> Iterator[_Row]:
    source = (
        single_image(images)
        if images.is_file()
        else training_folder(images, ".", labelled=False, root_key="")
    )
    settings = ViewSettings(**asdict(portable.preprocessing))
    world = use_device(ALONE)
    model = portable.model.to(world.device)
    with inference(model):
        for batch in evaluation_batches(
            source,
            indices=np.arange(len(source), dtype=np.int64),
            settings=settings,
            batch_size=64,
            unreadable_limit=1.0,
            max_pixels=64_000_000,
            unreadable=unreadable,
        ):
            outputs = model(make_views(batch.pixels, batch.draws, settings, device=world.device))
            for place, index in enumerate(batch.indices.tolist()):
                yield _Row(
                    source.name(index),
                    outputs.features[place].float().cpu(),
                    None if outputs.logits is None else outputs.logits[place].float().cpu(),
                )


def _named(out: Path, suffix: str) -> AbstractContextManager[Path]:
    if out.suffix != suffix:
        raise RecipeError(f"{out}: a file that ends in {suffix} is written; choose such a name")
    return whole_file(out, overwrite=True)

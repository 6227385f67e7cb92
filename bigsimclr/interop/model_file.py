"""A network in one file: safetensors with a description of the network, verified when read.

The format carries no checksum, so the description holds a sha256 over every tensor's name, type,
shape and bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from pydantic import TypeAdapter
from torch import Tensor

from bigsimclr.errors import CheckpointError, RecipeError, StorageError
from bigsimclr.interop import PortableModel, Preprocessing
from bigsimclr.models import Architecture, restore_model
from bigsimclr.storage import whole_file

SUFFIX = ".safetensors"
_FORMAT = "bigsimclr 1"


def write_model_file(path: Path, portable: PortableModel) -> None:
    """Write a network with its description to a new `.safetensors` file.

    Raises:
        RecipeError: the name does not end in .safetensors.
        StorageError: the file is there already, or cannot be written.
    """
    weights = portable.model.state_dict()
    description = {
        "format": _FORMAT,
        "architecture": portable.architecture.to_json(),
        "classes": json.dumps(portable.classes),
        "preprocessing": json.dumps(asdict(portable.preprocessing)),
        "origin": portable.origin,
        "sha256": _digest(weights),
    }
    write_tensors(path, weights, description)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],  # any shapes [...]
    metadata: Mapping[str, str],
) -> None:
    """Write tensors to a new `.safetensors` file, whole or not at all.

    Raises:
        RecipeError: the name does not end in .safetensors.
        StorageError: the file is there already, or cannot be written.
    """
    if path.suffix != SUFFIX:
        raise RecipeError(f"{path}: a {SUFFIX} file is written; choose a name that ends so")
    rows = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path, overwrite=False) as beside:
        try:
            safetensors.torch.save_file(rows, beside, dict(metadata))
        except safetensors.SafetensorError as error:  # a full disk, too, is none of its OSErrors
            raise StorageError(f"{path} cannot be written: {error}") from error


def read_model_file(path: Path) -> PortableModel:
    """Read a file that `write_model_file` wrote, and verify every byte of its weights.

    Raises:
        CheckpointError: the file is missing, damaged, or something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no file")
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            description = opened.metadata() or {}
            # Copies: the file's own pages must not change under a network in use.
            weights = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error})") from error
    if description.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} does not describe its network ({_FORMAT!r} expected); import-tf and "
            "`export --to safetensors` write files that do"
        )
    if description.get("sha256") != _digest(weights):
        raise CheckpointError(f"{path} is damaged (sha256 of the weights differs)")
    try:
        architecture = Architecture.from_json(description["architecture"])
        classes = TypeAdapter(tuple[str, ...]).validate_json(description["classes"])
        prepared = TypeAdapter(Preprocessing).validate_json(description["preprocessing"])
        model = restore_model(architecture, weights)
    except (KeyError, ValueError, RuntimeError) as error:
        raise _contradictory(path, str(error).partition("\n")[0]) from error
    if len(classes) != (architecture.classes or 0):
        raise _contradictory(path, f"{len(classes)} class names")
    return PortableModel(model, architecture, classes, prepared, description.get("origin", ""))


def _contradictory(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} does not describe its own weights ({what})")


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()

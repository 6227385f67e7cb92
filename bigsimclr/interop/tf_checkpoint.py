"""Official TensorFlow checkpoints become our networks, without TensorFlow."""

import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from bigsimclr.errors import CheckpointError, RecipeError
from bigsimclr.interop import PortableModel, Preprocessing
from bigsimclr.interop.tf_graph import layer_in_graph
from bigsimclr.interop.tf_inference import infer_architecture
from bigsimclr.interop.tf_names import Naming, from_official
from bigsimclr.interop.tf_variables import OfficialVariables, match_variables, open_variables
from bigsimclr.models import restore_model

_SMALL_IMAGE: Final = 32  # pixels; up to this size the official code has no crop in evaluation
_EVAL_CROP: Final = 0.875
_SEARCH_DEPTH: Final = 3  # folders below the one that is named
_LIST_LIMIT: Final = 1 << 20  # bytes of a `checkpoint` file
_NAMED: Final = 3  # checkpoints that an error names
_ARCHIVES: Final = (".tar.gz", ".tgz", ".tar", ".zip")


@dataclass(frozen=True)
class Imported:
    """A network out of an official checkpoint."""

    portable: PortableModel
    prefix: Path  # of the checkpoint's files
    naming: Naming
    variables: int  # read
    skipped: int  # left: momenta, counters, moving averages
    layer_is_recorded: bool  # what the classifier reads is in the graph beside the variables


def import_checkpoint(
    path: Path,
    *,
    from_layer: int | None = None,
    classes: tuple[str, ...] | None = None,
    image_size: int | None = None,
    resize: Literal["tf1", "tf2"] | None = None,
) -> Imported:
    """Read an official checkpoint as a network.

    Depth, width, stem, selective kernels, head and classes follow from the variables, and all of
    these must be there, with nothing left over. Memory in use is that of the weights and of twice
    the largest one.

    Args:
        path: what `find_checkpoint` understands.
        from_layer: what the classifier reads, 0 the features, k the head's layer k; None: what the
            graph beside the variables says, or without one, see `infer_architecture`.
        classes: names of the classifier's outputs; None: their numbers.
        image_size: side of the network's images in pixels; None: 32 with a cifar stem, else 224.
        resize: bicubic kernel of its images; None: that of the code that wrote the checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it is not of a SimCLR network.
        RecipeError: an argument contradicts the checkpoint.

    Source: google-research/simclr data.py get_preprocess_fn, data_util.py CROP_PROPORTION.
    """
    if image_size is not None and image_size < 1:
        raise RecipeError(f"image_size {image_size}: an image has at least one pixel")
    prefix = find_checkpoint(path)
    variables = open_variables(prefix)
    recorded = layer_in_graph(prefix)
    architecture = infer_architecture(variables, from_layer, recorded)
    keys = match_variables(variables, architecture)
    names = _class_names(prefix, architecture.classes or 0, classes)
    weights = {ours: _read_finite(variables, key) for ours, key in keys.items()}
    size = image_size or (32 if architecture.backbone.stem == "cifar" else 224)
    portable = PortableModel(
        model=restore_model(architecture, weights),
        architecture=architecture,
        classes=names,
        preprocessing=Preprocessing(
            image_size=size,
            resize=resize or variables.naming,
            eval_crop_proportion=1.0 if size <= _SMALL_IMAGE else _EVAL_CROP,
        ),
        origin=f"{_short_name(prefix)} ({variables.naming.upper()})",
    )
    skipped = len(variables.bundle.variables) - len(keys)
    return Imported(
        portable,
        prefix,
        variables.naming,
        variables=len(keys),
        skipped=skipped,
        layer_is_recorded=architecture.from_layer == recorded,
    )


def compare_with_checkpoint(prefix: Path, portable: PortableModel) -> int:
    """Read a checkpoint again and compare every tensor of a network with it, bit by bit.

    Args:
        prefix: of the checkpoint's files.
        portable: the network that was read from it.

    Returns:
        How many tensors were compared: all that the network has.

    Raises:
        CheckpointError: a tensor differs, or the checkpoint cannot be read.
    """
    variables = open_variables(prefix)
    keys = match_variables(variables, portable.architecture)
    state = portable.model.state_dict()
    for ours, key in keys.items():
        if not _same_bits(state[ours], from_official(variables.bundle.read(key))):
            raise CheckpointError(f"{ours!r} is not {key!r} of {prefix}")
    return len(keys)


def find_checkpoint(path: Path) -> Path:
    """Return the prefix of the checkpoint that a path means.

    Args:
        path: the prefix itself (`model.ckpt-250228`), one of its files, a `checkpoint` file that
            names it, a SavedModel or TF-Hub module, or a folder with one of these up to three
            folders down, and no other.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    try:
        return _find(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _find(path: Path) -> Path:
    if _has_index(path):
        return path
    if path.is_dir():
        found = _prefixes_below(path, _SEARCH_DEPTH)
        if not found:
            raise CheckpointError(
                f"{path} holds no TensorFlow checkpoint (no .index file, {_SEARCH_DEPTH} folders "
                "down); unpack archives first"
            )
        if len(found) > 1:
            named = ", ".join(str(prefix.relative_to(path)) for prefix in found[:_NAMED])
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            raise CheckpointError(f"{path} holds several checkpoints; name one: {named}{more}")
        return found[0]
    if not path.is_file():
        raise CheckpointError(f"{path} is no file, no folder, and no checkpoint ({path}.index)")
    if path.name == "checkpoint":
        return _listed(path)
    prefix = re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", path.name)
    if prefix != path.name:
        return path.with_name(prefix)
    if path.name == "saved_model.pb":
        raise CheckpointError(f"{path} holds no weights; name its folder, {path.parent}")
    if path.name.endswith(_ARCHIVES):
        raise CheckpointError(f"{path} is an archive; unpack it and name the folder")
    raise CheckpointError(f"{path} is no part of a TensorFlow checkpoint")


def _prefixes_below(folder: Path, depth: int) -> list[Path]:
    """Return the prefixes in the topmost folders that have any."""
    if (folder / "checkpoint").is_file():
        return [_listed(folder / "checkpoint")]
    saved_model = folder / "variables" / "variables"
    if _has_index(saved_model):
        return [saved_model]
    here = [index.with_suffix("") for index in sorted(folder.glob("*.index"))]
    if here or depth == 0:
        return here
    below = sorted(child for child in folder.iterdir() if child.is_dir())
    return [prefix for child in below for prefix in _prefixes_below(child, depth - 1)]


def _listed(file: Path) -> Path:
    """Return the prefix that a `checkpoint` file names.

    The path in it may be of another machine: the checkpoint beside the file goes first.
    """
    with file.open("rb") as opened:
        text = opened.read(_LIST_LIMIT).decode("utf-8", "replace")
    named = re.search(r'^\s*model_checkpoint_path\s*:\s*"([^"\n]+)"', text, re.MULTILINE)
    if named is None:
        raise CheckpointError(f"{file} names no model_checkpoint_path; name a checkpoint's prefix")
    name = PureWindowsPath(named[1]).name  # splits at slashes, too
    for prefix in (file.parent / name, file.parent / named[1]):
        if _has_index(prefix):
            return prefix
    raise CheckpointError(
        f"{file} names {name!r}, which is not beside it; copy its files there, or "
        "name another checkpoint's prefix"
    )


def _has_index(prefix: Path) -> bool:
    return Path(f"{prefix}.index").is_file()


def _class_names(prefix: Path, outputs: int, classes: tuple[str, ...] | None) -> tuple[str, ...]:
    if classes is None:
        return tuple(map(str, range(outputs)))
    if len(classes) != outputs:
        raise RecipeError(f"{len(classes)} class names for the {outputs} classes of {prefix}")
    return classes


def _read_finite(variables: OfficialVariables, key: str) -> Tensor:
    array = variables.bundle.read(key)
    if not np.isfinite(array).all():
        raise CheckpointError(f"{variables.bundle.prefix}: {key!r} has values that are not finite")
    return from_official(array)


def _short_name(prefix: Path) -> str:
    """Return the prefix's name; of a SavedModel, whose own says nothing, that of its folder."""
    is_saved_model = prefix.name == "variables" and prefix.parent.name == "variables"
    name = prefix.resolve().parent.parent.name if is_saved_model else prefix.name
    return " ".join(name.split())


def _same_bits(
    ours: Tensor,  # any shape [...]
    theirs: Tensor,  # any shape [...]
) -> bool:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    return torch.equal(ours.contiguous().view(torch.int32), theirs.view(torch.int32))

"""Checkpoints: directories of safetensors and JSON, there whole and verified or not at all.

A checkpoint is the directory `<examples seen, 12 digits>/`: one `<section>.safetensors` per
section, `facts.json`, and `manifest.json` with the size and sha256 of every file. Several ranks
write `<section>-00001-of-00004.safetensors` and so on, each with some of the tensors: whole ones,
under the model's own names, so that any number of ranks and any strategy can read them.
`bigsimclr.engine.saving` writes checkpoints. Nothing is ever unpickled.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import safetensors
import safetensors.torch
from torch import Tensor

from bigsimclr.engine.manifest import (
    FACTS,
    NewerSchemaError,
    damage,
    read_file,
    read_manifest,
)
from bigsimclr.errors import CheckpointError

Tensors: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""Section -> name -> tensor; sections are, for instance, `model` and `optimizer`."""

SUFFIX: Final = ".safetensors"
DIRECTORY_NAME: Final = re.compile(r"[0-9]{12}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, in memory."""

    path: Path
    examples: int  # examples seen when it was written
    tensors: dict[str, dict[str, Tensor]]  # section -> name -> contiguous CPU tensor
    facts: dict[str, object]  # JSON values: step, recipe digest, versions, ...


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """Read the newest intact checkpoint of a run; damaged ones are named in a warning and skipped.

    Args:
        root: the directory that holds the checkpoints of a run.

    Returns:
        The checkpoint, or None when the run never published one.

    Raises:
        CheckpointError: there are checkpoints and none is intact, or the newest intact one was
            written by a later version: starting again from nothing is for a person to decide.
    """
    damaged: list[str] = []
    for path in published(root):
        try:
            return read_checkpoint(path)
        except NewerSchemaError:
            raise
        except CheckpointError as error:
            _log.warning("%s; trying the one before it", error)
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {root} is intact: "
            f"{'; '.join(damaged)}. Restore one, or move the folder away to start again."
        )
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and verify every byte of it.

    Args:
        path: the directory of the checkpoint.

    Raises:
        CheckpointError: a file is missing, extra, changed or a symbolic link, the directory was
            renamed, or the checkpoint was written by a later version.
    """
    try:
        examples, files = read_manifest(path)
        contents = {file.name: read_file(path, file) for file in files}
    except OSError as error:
        raise damage(path, f"{Path(error.filename or path).name}: {error.strerror}") from error
    try:
        facts: object = json.loads(contents.pop(FACTS))
        tensors: dict[str, dict[str, Tensor]] = {}
        for name in sorted(contents):
            section = tensors.setdefault(name.removesuffix(SUFFIX).partition("-")[0], {})
            # Popping frees each file's bytes as soon as its tensors exist.
            section.update(safetensors.torch.load(contents.pop(name)))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damage(path, f"unreadable content: {error}") from error
    if not isinstance(facts, dict):
        raise damage(path, f"{FACTS} is not an object")
    return Checkpoint(path=path, examples=examples, tensors=tensors, facts=facts)


def clear_unfinished(root: Path) -> None:
    """Remove what killed processes left half written or half deleted; the caller holds the lock.

    Args:
        root: the directory that holds the checkpoints of a run.
    """
    if not root.is_dir():
        return
    for path in root.iterdir():
        if not path.name.startswith((".tmp-", ".del-")):
            continue
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)


def published(folder: Path) -> list[Path]:
    """List published checkpoints, newest first; names count, file times do not."""
    if not folder.is_dir():
        return []
    names = (path for path in folder.iterdir() if DIRECTORY_NAME.fullmatch(path.name))
    return sorted(names, reverse=True)

"""Checkpoints: directories of safetensors and JSON, there whole and verified or not at all.

A checkpoint is the directory `<examples seen, 12 digits>/`: one `<section>.safetensors` per
section, `facts.json`, and `manifest.json` with the size and sha256 of every file. It is written
beside its place and moved there by one rename after everything is on disk, so a killed process
leaves the earlier checkpoints as they were. Nothing is ever unpickled.
"""

import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bigsimclr.engine.manifest import (
    FACTS,
    MANIFEST,
    NewerSchemaError,
    canonical_json,
    damage,
    is_intact,
    manifest_json,
    read_file,
    read_manifest,
    write_file,
)
from bigsimclr.errors import CheckpointError, NumericsError, StorageError

Tensors: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""Section -> name -> tensor; sections are, for instance, `model` and `optimizer`."""

_SUFFIX = ".safetensors"
_DIRECTORY_NAME = re.compile(r"[0-9]{12}")
_SECTION_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, in memory."""

    path: Path
    examples: int  # examples seen when it was written
    tensors: dict[str, dict[str, Tensor]]  # section -> name -> contiguous CPU tensor
    facts: dict[str, object]  # JSON values: step, recipe digest, versions, ...


def save_checkpoint(
    root: Path, *, examples: int, tensors: Tensors, facts: Mapping[str, object], keep: int
) -> Path:
    """Publish one checkpoint and delete old ones; the caller holds the lock of the run directory.

    An intact checkpoint of the same `examples` is kept as it is, a damaged one is set aside as
    `.bad-*`. What killed processes left unfinished is removed.

    Args:
        root: the directory that holds the checkpoints of a run.
        examples: examples seen; names the checkpoint.
        tensors: section -> name -> tensor of any device, layout and dtype; all are finite.
        facts: JSON values that describe the state.
        keep: number of newest intact checkpoints to keep; 2 at least.

    Returns:
        The directory of the checkpoint.

    Raises:
        NumericsError: a tensor holds NaN or infinity; nothing was written.
        StorageError: the disk is full, read-only or failing; earlier checkpoints are untouched.
    """
    if keep < 2:
        raise ValueError(f"keep={keep}: at least 2 checkpoints are kept, one may be damaged")
    final = root / f"{examples:012d}"
    if examples < 0 or not _DIRECTORY_NAME.fullmatch(final.name):
        raise ValueError(f"examples={examples} does not fit 12 digits")
    _check_values(tensors)
    facts_json = canonical_json(dict(facts))
    needed = len(facts_json) + sum(t.nbytes for named in tensors.values() for t in named.values())
    try:
        root.mkdir(parents=True, exist_ok=True)
        clear_unfinished(root)
        if not is_intact(final):
            _check_space(final, needed)
            _publish(final, examples=examples, tensors=tensors, facts_json=facts_json)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write checkpoint {final}: {error.strerror or error}; it needs {_mb(needed)}, "
            f"{_mb(_free_bytes(root))} are free. Earlier checkpoints are untouched."
        ) from error
    _prune(final, keep=keep)
    return final


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
    for path in _published(root):
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
        # Popping frees each file's bytes as soon as its tensors exist.
        tensors = {
            name.removesuffix(_SUFFIX): safetensors.torch.load(contents.pop(name))
            for name in sorted(contents)
        }
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


# --- writing ---------------------------------------------------------------------------------


def _check_values(tensors: Tensors) -> None:
    """Refuse names that are no file names, and values nobody could resume from."""
    for section, named in tensors.items():
        if not _SECTION_NAME.fullmatch(section):
            raise ValueError(f"section {section!r} is not lower-case letters, digits and _")
        for name, tensor in named.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NumericsError(
                    f"{section} tensor {name} holds NaN or infinite values; no checkpoint was "
                    "written, the last one is intact"
                )


def _check_space(final: Path, needed: int) -> None:
    """Fail before the first byte when the checkpoint cannot fit."""
    free = _free_bytes(final.parent)
    if free is not None and free < needed:
        raise StorageError(
            f"no space for checkpoint {final}: it needs {_mb(needed)}, {_mb(free)} are free. "
            "Earlier checkpoints are untouched."
        )


def _publish(final: Path, *, examples: int, tensors: Tensors, facts_json: bytes) -> None:
    """Write beside, sync, rename: `final` appears whole or not at all."""
    folder = final.parent
    temporary = folder / f".tmp-{final.name}-{secrets.token_hex(4)}"
    temporary.mkdir(mode=0o700)
    try:
        files = [write_file(temporary / FACTS, facts_json)]
        for section, named in sorted(tensors.items()):
            content = safetensors.torch.save(_host_copies(named))
            files.append(write_file(temporary / f"{section}{_SUFFIX}", content))
        write_file(temporary / MANIFEST, manifest_json(examples, files))
        temporary.chmod(stat.S_IMODE(folder.stat().st_mode))
        _sync_directory(temporary)
        if final.is_symlink() or final.exists():
            final.rename(folder / f".bad-{final.name}-{secrets.token_hex(4)}")
        temporary.rename(final)
        _sync_directory(folder)
    finally:
        # After the rename there is nothing here; before it, nothing must stay.
        shutil.rmtree(temporary, ignore_errors=True)


def _host_copies(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy to the host: safetensors wants contiguous tensors that share no storage."""
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        for name, tensor in named.items()
    }


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(final: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` intact checkpoints; damaged ones in between stay."""
    intact = 0
    try:
        for path in _published(final.parent):
            if path == final:
                intact += 1
            elif intact < keep:
                # A damaged checkpoint must not count: it would push out one that can be read.
                intact += is_intact(path)
            else:
                # Renamed first: a kill in the middle must not leave half a checkpoint behind.
                doomed = path.rename(path.with_name(f".del-{path.name}-{secrets.token_hex(4)}"))
                shutil.rmtree(doomed)
    except OSError as error:
        _log.warning("cannot delete old checkpoints in %s: %s", final.parent, error.strerror)


# --- reading ---------------------------------------------------------------------------------


def _published(folder: Path) -> list[Path]:
    """List published checkpoints, newest first; names count, file times do not."""
    if not folder.is_dir():
        return []
    names = (path for path in folder.iterdir() if _DIRECTORY_NAME.fullmatch(path.name))
    return sorted(names, reverse=True)


def _free_bytes(path: Path) -> int | None:
    """Bytes free for this user on the disk of `path`; None where the disk does not say."""
    try:
        disk = os.statvfs(path)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else None


def _mb(size: int | None) -> str:
    return "an unknown number of bytes" if size is None else f"{size / 1e6:,.1f} MB"

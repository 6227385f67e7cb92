"""Writing checkpoints: each rank its part, beside the training, and all of it or nothing.

A save begins with copies on the host, for which the training waits. A thread of every rank then
writes this rank's tensors into a directory beside the checkpoint's place. When all are on the disk
the first rank adds the manifest and moves the directory there by one rename, so that a killed
process leaves the earlier checkpoints as they were.

Whatever fails on one rank fails on all of them.
"""

import json
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Final

import safetensors.torch
import torch
from torch import Tensor

from bigsimclr.engine.checkpoint import (
    DIRECTORY_NAME,
    SUFFIX,
    Tensors,
    clear_unfinished,
    published,
)
from bigsimclr.engine.manifest import (
    FACTS,
    MANIFEST,
    StoredFile,
    canonical_json,
    is_intact,
    manifest_json,
    write_file,
)
from bigsimclr.errors import NumericsError, StorageError
from bigsimclr.world import ALONE, World

_SECTION_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")

_log = logging.getLogger(__name__)


class Shares:
    """Deals tensors out to the ranks, each to the one that has the least to write so far.

    Every rank must ask for the same tensors in the same order.
    """

    def __init__(self, world: World) -> None:
        self._rank = world.rank
        self._loads = [0] * world.size

    def is_kept(self, name: str, bytes_: int) -> bool:  # noqa: ARG002 - the order says enough
        """Say whether this rank writes a tensor."""
        rank = self._loads.index(min(self._loads))
        self._loads[rank] += bytes_
        return rank == self._rank


@dataclass
class _Save:
    """A save in progress."""

    examples: int
    final: Path
    temporary: Path
    needed: int  # bytes of all ranks
    thread: Thread
    files: list[StoredFile] = field(default_factory=list)  # of this rank, complete at its end
    error: OSError | None = None


class Saver:
    """Writes the checkpoints of a run, one at a time; the caller holds the lock of its directory.

    Every rank makes the same calls in the same order.

    Args:
        root: the directory that holds the checkpoints of a run.
        keep: number of newest intact checkpoints to keep; 2 at least.
        world: the ranks that write.
        fence: raises StorageError when another process has taken the directory over.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        world: World = ALONE,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        if keep < 2:
            raise ValueError(f"keep={keep}: at least 2 checkpoints are kept, one may be damaged")
        self._root, self._keep, self._world, self._fence = root, keep, world, fence
        self._save: _Save | None = None
        self.newest: Path | None = None  # that this saver has published
        self.blocked_seconds = 0.0  # for which the training waited, since it was last asked

    def require_space(self, tensors: Tensors) -> None:
        """Refuse to train towards a checkpoint that would not fit on the disk.

        Args:
            tensors: what `begin` will be given; only their sizes count.

        Raises:
            StorageError: there is no space for it.
        """
        needed = sum(self._world.numbers(_bytes_of(tensors)))
        with self._world.together():
            if self._world.rank == 0:
                self._check_space(f"a checkpoint in {self._root}", needed)

    def is_written(self) -> bool:
        """Say whether a save has begun, and no rank has anything left to write of it."""
        # Whether one has begun is known alike on all ranks, so that most steps ask nobody.
        return self._save is not None and all(
            self._world.numbers(int(not self._save.thread.is_alive()))
        )

    def begin(self, *, examples: int, tensors: Tensors, facts: Mapping[str, object]) -> None:
        """Copy a state and begin to write it; an earlier save is finished first.

        An intact checkpoint of the same `examples` is kept as it is, a damaged one is set aside as
        `.bad-*`. What killed processes left unfinished is removed.

        Args:
            examples: examples seen; names the checkpoint.
            tensors: this rank's part: section -> name -> tensor of any device, layout and dtype;
                all are finite.
            facts: JSON values that describe the state; the first rank's are stored.

        Raises:
            NumericsError: a tensor holds NaN or infinity; nothing was written.
            StorageError: the disk is full, read-only or failing; earlier checkpoints are untouched.
        """
        self.finish()
        started = time.perf_counter()
        final = self._root / f"{examples:012d}"
        if examples < 0 or not DIRECTORY_NAME.fullmatch(final.name):
            raise ValueError(f"examples={examples} does not fit 12 digits")
        copies: dict[str, dict[str, Tensor]] = {}
        with self._world.together():
            _check_values(tensors)
            copies.update({name: _host_copies(named) for name, named in tensors.items()})
        facts_json = canonical_json(dict(facts)) if self._world.rank == 0 else b""
        needed = sum(self._world.numbers(len(facts_json) + _bytes_of(copies)))
        place = ""
        with self._world.together():
            if self._world.rank == 0:
                place = self._make_place(final, needed)
        place = self._world.texts(place)[0]
        if place:
            save = _Save(examples, final, self._root / place, needed, Thread())
            save.thread = Thread(target=self._write, args=(save, copies, facts_json), daemon=True)
            save.thread.start()
            self._save = save
        else:
            self.newest = final
        self.blocked_seconds += time.perf_counter() - started

    def finish(self) -> Path | None:
        """Wait for the save in progress and publish it.

        Returns:
            The newest checkpoint that this saver has published.

        Raises:
            StorageError: a rank could not write, or the directory was taken over; earlier
                checkpoints are untouched.
        """
        save, self._save = self._save, None
        if save is None:
            return self.newest
        started = time.perf_counter()
        save.thread.join()
        try:
            with self._world.together():
                if save.error is not None:
                    raise _unwritable(save.final, save.needed, save.error)
            listed = self._world.texts(json.dumps([asdict(file) for file in save.files]))
            with self._world.together():
                if self._world.rank == 0:
                    files = [StoredFile(**entry) for text in listed for entry in json.loads(text)]
                    self._publish(save, files)
        finally:
            if self._world.rank == 0:
                # After the rename there is nothing here; before it, nothing must stay.
                shutil.rmtree(save.temporary, ignore_errors=True)
        if self._world.rank == 0:
            _prune(save.final, keep=self._keep)
        self.newest = save.final
        self.blocked_seconds += time.perf_counter() - started
        return save.final

    def _check_space(self, what: str, needed: int) -> None:
        """Fail before the first byte when a checkpoint cannot fit."""
        free = _free_bytes(self._root)
        if free is not None and free < needed:
            raise StorageError(
                f"no space for {what}: it needs {_mb(needed)}, {_mb(free)} are free. "
                "Earlier checkpoints are untouched."
            )

    def _make_place(self, final: Path, needed: int) -> str:
        """Make the directory to write into; the name is empty where the checkpoint exists."""
        try:
            # Before anything is cleared away, which may be the new holder's save.
            self._fence()
            self._root.mkdir(parents=True, exist_ok=True)
            clear_unfinished(self._root)
            if is_intact(final):
                return ""
            self._check_space(f"checkpoint {final}", needed)
            name = f".tmp-{final.name}-{secrets.token_hex(4)}"
            (self._root / name).mkdir(mode=0o700)
        except StorageError:
            raise
        except OSError as error:
            raise _unwritable(final, needed, error) from error
        return name

    def _write(self, save: _Save, copies: dict[str, dict[str, Tensor]], facts_json: bytes) -> None:
        """Write this rank's files, in a thread of its own."""
        rank, size = self._world.rank, self._world.size
        ending = f"-{rank + 1:05d}-of-{size:05d}{SUFFIX}" if size > 1 else SUFFIX
        try:
            if rank == 0:
                save.files.append(write_file(save.temporary / FACTS, facts_json))
            for section in sorted(copies):
                content = safetensors.torch.save(copies.pop(section))
                save.files.append(write_file(save.temporary / f"{section}{ending}", content))
        except OSError as error:
            save.error = error

    def _publish(self, save: _Save, files: list[StoredFile]) -> None:
        """Add the manifest, sync, rename: the checkpoint appears whole or not at all."""
        try:
            write_file(save.temporary / MANIFEST, manifest_json(save.examples, files))
            save.temporary.chmod(stat.S_IMODE(self._root.stat().st_mode))
            _sync_directory(save.temporary)
            final = save.final
            # As late as can be: a process may stand still anywhere, for hours.
            self._fence()
            if final.is_symlink() or final.exists():
                final.rename(self._root / f".bad-{final.name}-{secrets.token_hex(4)}")
            save.temporary.rename(final)
            _sync_directory(self._root)
        except StorageError:
            raise
        except OSError as error:
            raise _unwritable(save.final, save.needed, error) from error


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


def _bytes_of(tensors: Tensors) -> int:
    return sum(tensor.nbytes for named in tensors.values() for tensor in named.values())


def _unwritable(final: Path, needed: int, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write checkpoint {final}: {error.strerror or error}; it needs {_mb(needed)}, "
        f"{_mb(_free_bytes(final.parent))} are free. Earlier checkpoints are untouched."
    )


def _host_copies(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy to the host: the training goes on, and safetensors wants contiguous tensors."""
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
        for path in published(final.parent):
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


def _free_bytes(path: Path) -> int | None:
    """Bytes free for this user where `path` is or will be; None where the disk does not say."""
    place = next((place for place in (path, *path.parents) if place.exists()), path)
    try:
        disk = os.statvfs(place)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else None


def _mb(size: int | None) -> str:
    return "an unknown number of bytes" if size is None else f"{size / 1e6:,.1f} MB"

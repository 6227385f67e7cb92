"""What a run measured: `metrics.jsonl`, one JSON line per record, and TensorBoard if asked.

A line is {"examples": int, "step": int, "time": unix seconds, "values": {"train/loss": float}}.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bigsimclr.errors import MissingExtraError
from bigsimclr.storage import publish

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE_NAME = "metrics.jsonl"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """Values measured at one moment of a run."""

    examples: int  # examples seen
    step: int  # updates made
    time: float  # unix seconds
    values: dict[str, float]  # name -> value; NaN where a value was not finite


class Records:
    """Append records to a run directory as they are made.

    A full disk costs records, never the run: the first failure is logged, and each later record is
    tried again.

    Args:
        run_dir: the run directory; it exists.
        tensorboard: also write TensorBoard events to `tensorboard/`, by examples seen.

    Raises:
        MissingExtraError: `tensorboard` is wanted and not installed.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool) -> None:
        self._path = run_dir / FILE_NAME
        self._board_dir = run_dir / "tensorboard"
        self._board = _board_writer(self._board_dir, purge_step=None) if tensorboard else None
        self._warned = False
        self._descriptor = _open_append(self._path)
        _cut_torn_line(self._descriptor)

    def write(self, *, examples: int, step: int, values: Mapping[str, float]) -> None:
        """Append one record.

        Args:
            examples: examples seen.
            step: updates made.
            values: name -> value; values that are not finite are stored as null.
        """
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        record = {"examples": examples, "step": step, "time": time.time(), "values": finite}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        end = os.fstat(self._descriptor).st_size
        try:
            _write_whole(self._descriptor, line)
        except OSError as error:
            os.ftruncate(self._descriptor, end)
            if not self._warned:
                _log.warning("cannot write %s: %s; training goes on", self._path, error)
            self._warned = True
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, global_step=examples)
            self._board.flush()

    def rewind(self, examples: int) -> None:
        """Drop the records beyond a checkpoint, which a resumed run measures again.

        Args:
            examples: examples seen at the checkpoint.
        """
        records = ((line, _parse(line)) for line in _lines(self._path))
        kept = [line for line, record in records if record and record.examples <= examples]
        publish(self._path, "".join(f"{line.decode()}\n" for line in kept))
        os.close(self._descriptor)
        self._descriptor = _open_append(self._path)
        if self._board is not None:
            self._board.close()
            self._board = _board_writer(self._board_dir, purge_step=examples + 1)

    def close(self) -> None:
        """Close the files; harmless when called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._board is not None:
            self._board.close()
            self._board = None


def read_records(run_dir: Path) -> list[Record]:
    """Read the records of a run, oldest first; lines a killed process left torn are passed over.

    Args:
        run_dir: the run directory; without a `metrics.jsonl` there are no records.
    """
    records = (_parse(line) for line in _lines(run_dir / FILE_NAME))
    return [record for record in records if record is not None]


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n") if path.exists() else []


def _parse(line: bytes) -> Record | None:
    try:
        record: object = json.loads(line)
    except ValueError:
        return None
    match record:
        case {
            "examples": int(examples),
            "step": int(step),
            "time": float(moment),
            "values": dict(values),
        }:
            numbers = {k: math.nan if v is None else float(v) for k, v in values.items()}
            return Record(examples=examples, step=step, time=moment, values=numbers)
        case _:
            return None


def _open_append(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)


def _write_whole(descriptor: int, content: bytes) -> None:
    if os.write(descriptor, content) < len(content):
        raise OSError("the disk took only a part of the line")


def _cut_torn_line(descriptor: int) -> None:
    """Drop an unfinished last line, or the next record would be glued to it."""
    size = os.fstat(descriptor).st_size
    content = os.pread(descriptor, size, 0)
    if not content.endswith(b"\n"):
        os.ftruncate(descriptor, content.rfind(b"\n") + 1)


def _board_writer(directory: Path, *, purge_step: int | None) -> "SummaryWriter":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            "TensorBoard is not installed: pip install 'bigsimclr[tensorboard]'"
        ) from error
    return SummaryWriter(str(directory), purge_step=purge_step)

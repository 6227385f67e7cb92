"""When a run was worked on: `attempts.jsonl`, a JSON line when an attempt begins and when it ends.

    {"event": "began", "time": unix seconds, "step": int, "world_size": int, "job": "123" or null,
     "restart": int, "reached": int or null, "alive": unix seconds or null}
    {"event": "ended", "time": unix seconds, "step": int, "why": "done"}

A killed attempt leaves no end. `job` and `restart` are Slurm's. `reached` and `alive` are the step
and the time of the last record that the attempts before have left, some of which a resumed run
drops and measures again.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

FILE_NAME: Final = "attempts.jsonl"
_LATEST: Final = 1e11  # unix seconds; also keeps damaged numbers from overflowing
_MOST: Final = 2**53  # steps, processes and restarts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """One attempt to train a run, from its first step to its end."""

    began: float  # unix seconds
    first_step: int  # updates that the checkpoint it continues had made
    world_size: int
    job: str | None  # number of the Slurm job
    restart: int  # times that Slurm had started the job again
    reached: int | None = None  # step of the last record before it; None: there was none
    alive: float | None = None  # unix seconds of that record
    ended: float | None = None  # unix seconds; None: it goes on, or was killed
    last_step: int | None = None  # updates made in the end
    why: str | None = None  # "done", a signal's name such as "SIGTERM", or an error's class


def note_began(
    run_dir: Path,
    *,
    step: int,
    world_size: int,
    job: str | None,
    restart: int,
    reached: int | None,
    alive: float | None,
) -> None:
    """Append that an attempt begins to train; a full disk costs the line, never the run.

    Args:
        run_dir: the run directory; it exists.
        step: updates made by the checkpoint that it continues.
        world_size: number of ranks, W.
        job: number of the Slurm job.
        restart: times that Slurm has started the job again.
        reached: step of the last record before it.
        alive: unix seconds of that record.
    """
    _append(
        run_dir / FILE_NAME,
        {
            "event": "began",
            "time": time.time(),
            "step": step,
            "world_size": world_size,
            "job": job,
            "restart": restart,
            "reached": reached,
            "alive": alive,
        },
    )


def note_ended(run_dir: Path, *, step: int, why: str) -> None:
    """Append that the attempt ends; a full disk costs the line, never the run.

    Args:
        run_dir: the run directory.
        step: updates made.
        why: "done", the name of a signal, or the class of an error.
    """
    event = {"event": "ended", "time": time.time(), "step": step, "why": why}
    _append(run_dir / FILE_NAME, event)


def read_attempts(run_dir: Path) -> list[Attempt]:
    """Read the attempts of a run, oldest first; torn and foreign lines are passed over.

    Args:
        run_dir: the run directory; without an `attempts.jsonl` there are no attempts.

    Raises:
        OSError: the file is there and cannot be read.
    """
    path = run_dir / FILE_NAME
    attempts: list[Attempt] = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        event = _event(line)
        began = _began(event)
        if began is not None:
            attempts.append(began)
        elif attempts and attempts[-1].ended is None:
            attempts[-1] = _with_end(attempts[-1], event)
    return attempts


def _event(line: bytes) -> Mapping[str, object]:
    try:
        found: object = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _began(event: Mapping[str, object]) -> Attempt | None:
    began, step = _moment(event.get("time")), _count(event.get("step"))
    size, restart = _count(event.get("world_size")), _count(event.get("restart"))
    if event.get("event") != "began" or began is None or step is None or size is None:
        return None
    job = event.get("job")
    return Attempt(
        began=began,
        first_step=step,
        world_size=size,
        job=job if isinstance(job, str) else None,
        restart=restart or 0,
        reached=_count(event.get("reached")),
        alive=_moment(event.get("alive")),
    )


def _with_end(attempt: Attempt, event: Mapping[str, object]) -> Attempt:
    ended, step = _moment(event.get("time")), _count(event.get("step"))
    why = event.get("why")
    if event.get("event") != "ended" or ended is None or step is None or not isinstance(why, str):
        return attempt
    return replace(attempt, ended=ended, last_step=step, why=why)


def _count(value: object) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value <= _MOST else None


def _moment(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if 0 <= value <= _LATEST else None


def _append(path: Path, event: Mapping[str, object]) -> None:
    line = json.dumps(event).encode() + b"\n"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _write(descriptor, line)
        finally:
            os.close(descriptor)
    except OSError as error:
        _log.warning("cannot write %s: %s; training goes on", path, error)


def _write(descriptor: int, line: bytes) -> None:
    end = os.fstat(descriptor).st_size
    if end and os.pread(descriptor, 1, end - 1) != b"\n":
        line = b"\n" + line  # what a killed process left torn stays a line of its own
    try:
        _write_whole(descriptor, line)
        os.fsync(descriptor)  # a lost machine tells no more
    except OSError:
        os.ftruncate(descriptor, end)
        raise


def _write_whole(descriptor: int, content: bytes) -> None:
    if os.write(descriptor, content) < len(content):
        raise OSError("the disk took only a part of the line")

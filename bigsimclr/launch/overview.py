"""Runs and their jobs at a glance, from run directories and Slurm's queue."""

import json
import math
import re
import statistics
import time
from codecs import getincrementaldecoder
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Final

from bigsimclr.errors import DistributedError, RecipeError
from bigsimclr.launch import scheduler
from bigsimclr.launch.jobs import FOLDER, SubmittedJob, job_folder, jobs_of, parts_of
from bigsimclr.launch.restarts import RestartLog, last_end
from bigsimclr.launch.scheduler import QueuedJob
from bigsimclr.recipe.yaml_tree import show
from bigsimclr.report.records import Record, read_records

_LOG_SECONDS: Final = 0.5  # between two looks at a log
_QUEUE_SECONDS: Final = 5.0  # between two looks at the queue
_LOG_BYTES: Final = 1 << 20  # read at once
_DEPTH: Final = 3  # folders below the one that is looked at
_RECENT: Final = 20  # records that the remaining time is estimated from


@dataclass(frozen=True)
class RunLine:
    """What is to be said of one run."""

    run: str
    job: str  # numbers of its jobs that wait or run, else of the last; empty without any
    state: str
    done: int | None  # updates, or runs of a pipeline
    total: int | None
    loss: float | None
    seconds_left: float | None
    restarts: int

    def as_facts(self) -> dict[str, object]:
        """Return the facts as plain JSON values."""
        return {
            "run": self.run,
            "job": self.job or None,
            "state": self.state,
            "done": self.done,
            "total": self.total,
            "loss": self.loss,
            "seconds_left": self.seconds_left,
            "restarts": self.restarts,
        }


def list_runs(folder: Path) -> tuple[list[RunLine], str | None]:
    """List the runs below a folder.

    Args:
        folder: looked through, some levels deep.

    Returns:
        A line for each run or pipeline, and why the states of jobs are not known, if so.

    Raises:
        RecipeError: there is no such folder.
    """
    if not folder.is_dir():
        raise RecipeError(f"{folder} is no folder; name one that holds runs")
    found = list(_runs(folder, _DEPTH))
    active: Mapping[str, QueuedJob] = {}
    note = None
    if any(jobs_of(run) for run in found):
        try:
            active = scheduler.queue()
        except DistributedError as error:
            note = str(error)
    return [_line(run, folder, active) for run in found], note


def _runs(folder: Path, depth: int) -> Iterator[Path]:
    """Find runs; what lies inside one belongs to it."""
    names = ("recipe.yaml", "pipeline.json", f"{FOLDER}/jobs.jsonl")
    if any((folder / name).is_file() for name in names):
        yield folder
    elif depth:
        for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
            if not inner.name.startswith(".") and inner.name != FOLDER and not inner.is_symlink():
                yield from _runs(inner, depth - 1)


def _line(run: Path, folder: Path, active: Mapping[str, QueuedJob]) -> RunLine:
    jobs = jobs_of(run)
    working = [job.number for job in jobs if job.number in active]
    parts = parts_of(run)
    newest = max(parts, key=lambda part: _modified(part / "metrics.jsonl"), default=run)
    records = [record for record in read_records(newest) if "train/loss" in record.values]
    done: int | None
    total: int | None
    if (run / "pipeline.json").is_file():
        done, total = sum((part / "result.json").exists() for part in parts), len(parts)
        is_finished, left = done == total, None
    else:
        done = records[-1].step if records else None
        total = _steps(run)
        is_finished = (run / "result.json").exists()
        left = None if is_finished else _seconds_left(records, total)
    shown = working or [job.number for job in jobs[-1:]]
    return RunLine(
        run=str(run.relative_to(folder)) if run != folder else str(run),
        job=",".join(shown),
        state=_state(run, [active[number] for number in working], jobs, is_finished=is_finished),
        done=done,
        total=total,
        loss=records[-1].values["train/loss"] if records else None,
        seconds_left=left,
        restarts=sum(RestartLog(job_folder(run), job.number).restarts() for job in jobs),
    )


def _state(
    run: Path, queued: list[QueuedJob], jobs: list[SubmittedJob], *, is_finished: bool
) -> str:
    if is_finished and not queued:
        return "finished"
    if queued:
        first = next((job for job in queued if job.state == "RUNNING"), queued[0])
        reason = "" if first.reason in ("", "None") else f" ({first.reason})"
        return first.state.lower() + (reason if first.state != "RUNNING" else "")
    for job in reversed(jobs):
        ended = last_end(job_folder(run), job.number)
        if ended is not None:
            return ended
    return "not running"


def _modified(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _steps(run: Path) -> int | None:
    try:
        steps = json.loads((run / "plan.json").read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None


def _seconds_left(records: list[Record], total: int | None) -> float | None:
    """Estimate the time to the end from the last records; pauses between jobs do not count."""
    recent = records[-_RECENT:]
    paces = [
        (later.time - earlier.time) / (later.step - earlier.step)
        for earlier, later in pairwise(recent)
        if later.step > earlier.step
    ]
    if not paces or total is None:
        return None
    left = statistics.median(paces) * (total - records[-1].step)
    return left if math.isfinite(left) else None


def overview_text(lines: Sequence[RunLine]) -> str:
    """Write runs as a table."""
    rows = [("run", "job", "state", "step", "loss", "left", "restarts")]
    for line in lines:
        left = line.seconds_left
        total = "?" if line.total is None else f"{line.total:,}"
        rows.append(
            (
                show(line.run, 60),
                line.job or "-",
                line.state,
                "-" if line.done is None else f"{line.done:,}/{total}",
                "-" if line.loss is None else f"{line.loss:.4g}",
                "-" if left is None else str(timedelta(seconds=int(left))),
                str(line.restarts),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(f"{c:<{width}}" for c, width in row).rstrip() for row in cells)


def active_jobs(target: Path) -> list[str]:
    """Return the jobs of a run that wait or run; for a number, that job.

    Raises:
        RecipeError: the target is neither a run with jobs nor a job of this user.
        DistributedError: Slurm does not answer.
    """
    number = str(target)
    if re.fullmatch(r"\d+(_\d+)?", number):
        active = scheduler.queue()
        return [job for job in active if job == number or job.startswith(f"{number}_")]
    jobs = jobs_of(target)
    if not jobs:
        raise RecipeError(f"{target} has no jobs; bigsimclr runs lists those that have")
    active = scheduler.queue()
    return [job.number for job in jobs if job.number in active]


def read_log(run: Path, *, follow: bool) -> Iterator[str]:
    """Yield the log of a run's newest job that has one.

    Args:
        run: a run directory.
        follow: go on until the job neither waits nor runs.

    Raises:
        RecipeError: there is no such run, or it has no jobs.
        DistributedError: Slurm does not answer.
    """
    jobs = jobs_of(run)
    if not jobs and not run.is_dir():
        raise RecipeError(f"{run} is no folder; bigsimclr runs lists the runs there are")
    if not jobs:
        raise RecipeError(f"{run} has no jobs; its progress is in {run / 'metrics.jsonl'}")
    begun = [job for job in jobs if Path(job.log).exists()] or jobs
    job, position, looked = begun[-1], 0, 0.0
    is_active, decoder = True, getincrementaldecoder("utf-8")("replace")
    while True:
        if follow and time.monotonic() - looked > _QUEUE_SECONDS:
            is_active, looked = job.number in scheduler.queue(), time.monotonic()
        content = _read_on(Path(job.log), position)
        position += len(content)
        is_over = not content and (not follow or not is_active)
        text = decoder.decode(content, final=is_over)
        if text:
            yield text
        if is_over:
            return
        if not content:
            time.sleep(_LOG_SECONDS)


def _read_on(path: Path, position: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(position)
            return file.read(_LOG_BYTES)
    except FileNotFoundError:  # the job has not begun
        return b""

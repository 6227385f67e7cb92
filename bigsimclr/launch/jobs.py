"""The jobs of a run: which were submitted, and where each writes its log.

Every run directory has a folder `slurm` with its job files; `jobs.jsonl` there lists the jobs,
oldest first.
"""

import json
import os
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from bigsimclr.errors import StorageError
from bigsimclr.storage import publish

FOLDER: Final = "slurm"
_FILE: Final = "jobs.jsonl"


@dataclass(frozen=True)
class SubmittedJob:
    """One job that was submitted for a run."""

    number: str  # 12, or 12_3 for an element of an array
    step: str  # of a pipeline; empty for a single stage
    log: str  # its file
    submitted: float  # unix seconds
    profile: str  # name of the profile


def job_folder(run: Path) -> Path:
    """Return where a run keeps its job files."""
    return run / FOLDER


def make_job_folder(run: Path) -> Path:
    """Make the folder of a run's job files, closed to others: jobs execute what lies there.

    Raises:
        StorageError: it cannot be made, or somebody else may write there.
    """
    folder = job_folder(run)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        raise StorageError(f"{folder} cannot be made: {error.strerror}") from error
    if not stat.S_ISDIR(facts.st_mode):
        raise StorageError(f"{folder} is a link; use another --out")
    if facts.st_uid != os.getuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StorageError(
            f"{folder} can be written by others, and a job would execute what they put there: "
            f"chmod 700 {folder}"
        )
    return folder


def jobs_of(run: Path) -> list[SubmittedJob]:
    """List the jobs of a run, oldest first; lines that cannot be read are passed over."""
    path = job_folder(run) / _FILE
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(SubmittedJob(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def parts_of(run: Path) -> list[Path]:
    """Return the runs that a run consists of: itself, or those of a pipeline."""
    try:
        steps = json.loads((run / "pipeline.json").read_text(encoding="utf-8"))["steps"]
        return [run / str(planned["path"]) for step in steps for planned in step["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return [run]


def note_jobs(run: Path, jobs: Sequence[SubmittedJob]) -> None:
    """Add jobs to a run's list.

    Raises:
        StorageError: the list cannot be written.
    """
    lines = [json.dumps(asdict(job)) for job in (*jobs_of(run), *jobs)]
    publish(job_folder(run) / _FILE, "".join(f"{line}\n" for line in lines))

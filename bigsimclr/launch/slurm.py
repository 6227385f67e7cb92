"""Submitting jobs to Slurm, through submitit.

What submitit pickles for a job is the name of a function and strings. The job's process becomes
`bigsimclr srun` at once, so a requeued job runs the package as it is by then.
"""

import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import NoReturn

from typing_extensions import override

from bigsimclr.errors import DistributedError, MissingExtraError, RecipeError
from bigsimclr.launch.profile import Profile, time_seconds
from bigsimclr.launch.scheduler import complaint
from bigsimclr.launch.submission import Job, Submission, note_submitted

try:
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError
except ImportError as error:
    raise MissingExtraError(
        "submitting to Slurm needs submitit: pip install 'bigsimclr[slurm]'"
    ) from error


def become(*words: str) -> NoReturn:
    """Go on as `bigsimclr` with these words; this is what a job runs first."""
    os.execv(sys.executable, [sys.executable, "-u", "-m", "bigsimclr", *words])  # noqa: S606


class _Executor(SlurmExecutor):
    """submitit's, which also makes scripts where there is no Slurm."""

    @classmethod
    @override
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        """Return the batch script of a job with these parameters."""
        text: str = self._make_submission_file_text(self._submitit_command_str, "")
        return text


def script(job: Job, profile: Profile, *, dependencies: Sequence[str]) -> str:
    """Return the batch script of a job, as `submit` would make it.

    Args:
        job: what is submitted.
        profile: what it asks of Slurm.
        dependencies: numbers of the jobs, or words for them, that must have ended well.
    """
    executor = _executor(job, profile, dependencies)
    if len(job.elements) > 1:
        executor.parameters["map_count"] = len(job.elements)
    return executor.script()


def submit(
    submission: Submission, profile: Profile, *, profile_name: str, after: Sequence[str]
) -> Iterator[tuple[Job, list[str]]]:
    """Submit jobs in order, each with the numbers that Slurm gave its elements.

    Args:
        submission: the jobs; what they read is written.
        profile: what each asks of Slurm.
        profile_name: noted with the jobs.
        after: numbers of jobs that must have ended well before the first of these begins.

    Raises:
        RecipeError: Slurm refuses a job.
        DistributedError: Slurm is not here, or does not answer.
    """
    given: dict[str, str] = {}
    for job in submission.jobs:
        needs = [given[step] for step in job.needs] or list(after)
        executor = _executor(job, profile, needs)
        with _plain_errors(job.folder):
            if len(job.elements) == 1:
                made = [executor.submit(become, *job.elements[0].words)]
            else:
                with executor.batch():
                    made = [executor.submit(become, *element.words) for element in job.elements]
            numbers = [found.job_id for found in made]
        note_submitted(job, numbers, [found.paths.stdout for found in made], profile_name)
        given[job.step] = numbers[0].partition("_")[0]
        yield job, numbers


def _executor(job: Job, profile: Profile, dependencies: Sequence[str]) -> _Executor:
    # The shell becomes the job, so that signals to the batch script reach it, and nobody is left
    # behind when Slurm ends the script.
    python = shlex.quote(sys.executable if profile.python is None else str(profile.python))
    executor = _Executor(folder=job.folder, python=f"exec {python}")
    extra: dict[str, object] = {
        "signal": f"USR2@{profile.signal_seconds}",
        "requeue" if profile.requeue else "no-requeue": True,
        "kill-on-invalid-dep": "yes",
    }
    if profile.reservation is not None:
        extra["reservation"] = profile.reservation
    executor.update_parameters(
        job_name=job.name,
        wckey=None,
        time=math.ceil(time_seconds(profile.time) / 60),
        stderr_to_stdout=True,
        use_srun=False,
        setup=[f"module load {name}" for name in profile.modules] or None,
        additional_parameters=extra,
        dependency=f"afterok:{':'.join(dependencies)}" if dependencies else None,
        **_resources(profile),
    )
    return executor


def _resources(profile: Profile) -> Mapping[str, object]:
    gpus = str(profile.gpus_per_node)
    if profile.gpu_type is not None:
        gpus = f"{profile.gpu_type}:{gpus}"
    wanted: dict[str, object | None] = {
        "nodes": profile.nodes,
        "ntasks_per_node": profile.ranks,
        "cpus_per_task": profile.cpus_per_rank,
        "gpus_per_node": gpus if profile.gpus_per_node else None,
        "mem": None if profile.memory_gb is None else f"{profile.memory_gb}GB",
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": profile.exclude,
        "comment": profile.comment,
        "exclusive": profile.exclusive or None,
    }
    return {name: value for name, value in wanted.items() if value is not None}


@contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """Turn what submitit and sbatch raise into one line, and leave no half of a job behind."""
    before = set(folder.iterdir()) if folder.is_dir() else set()
    try:
        with redirect_stderr(StringIO()):  # submitit prints what sbatch said, besides raising it
            yield
    except FileNotFoundError as error:
        _remove_new(folder, before)
        raise DistributedError(
            "Slurm's sbatch is not here; run this on a login node of the cluster"
        ) from error
    except (FailedJobError, FailedSubmissionError) as error:
        _remove_new(folder, before)
        raise RecipeError(f"Slurm refuses the job: {complaint(str(error), 'sbatch')}") from error


def _remove_new(folder: Path, before: set[Path]) -> None:
    for path in set(folder.iterdir()) - before:
        path.unlink()

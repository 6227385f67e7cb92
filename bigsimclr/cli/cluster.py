"""Commands for a Slurm cluster: submit a recipe, see what became of it, end it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bigsimclr.cli.command import OnlyOption, OverridesArgument, RecipeArgument, RunArgument

if TYPE_CHECKING:
    from bigsimclr.launch.profile import Profile
    from bigsimclr.launch.submission import Submission

ProfileOption = Annotated[
    str, typer.Option("--on", metavar="PROFILE", help="Cluster profile: a file, or slurm/NAME.")
]


ArrayOption = Annotated[
    list[str] | None,
    typer.Option(
        "--array",
        metavar="KEY=V,V,...",
        help="One run for each value, as a job array below RUN; given twice: all combinations.",
    ),
]
AfterOption = Annotated[
    list[Path] | None,
    typer.Option("--after", metavar="RUN", help="Begin when this run's jobs have ended well."),
]
ExamplesOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Training images to plan for, in a dry run."),
]
SpeedOption = Annotated[
    float | None,
    typer.Option(metavar="N", min=1e-9, help="Measured speed of a rank, for a dry run's hours."),
]


def submit(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    on: ProfileOption,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the profile."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="RUN", help="Run directory; default: runs/RECIPE."),
    ] = None,
    array: ArrayOption = None,
    after: AfterOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the batch scripts; do nothing.")
    ] = False,
    examples: ExamplesOption = None,
    images_per_second: SpeedOption = None,
) -> None:
    """Submit a recipe to Slurm, as jobs that requeue themselves.

    They continue until the run is finished. A pipeline becomes one job for each step, each waiting
    for the step that it builds on. The same command submits again what is not finished.
    """
    from bigsimclr.launch.profile import load_profile
    from bigsimclr.launch.submission import check_shares, plan_submission
    from bigsimclr.recipe import run_name

    profile = load_profile(on, setting or [])
    changes, before = overrides or [], after or []
    directory = out if out is not None else Path("runs") / run_name(recipe).replace("/", "-")
    planned = plan_submission(recipe, changes, out=directory, sweep=array or [], waits=bool(before))
    check_shares(planned, profile)
    if dry_run:
        from bigsimclr.checking.allocation import dry_run_text

        speed, waits = images_per_second, bool(before)
        print(
            dry_run_text(
                planned, profile, recipe, changes, examples=examples, speed=speed, waits=waits
            )
        )
    elif not planned.jobs:
        print(f"{directory}: finished already")
    else:
        _submit(planned, profile, on, before)


def _submit(planned: "Submission", profile: "Profile", on: str, before: list[Path]) -> None:
    from bigsimclr.launch.slurm import submit as submit_jobs
    from bigsimclr.launch.submission import (
        check_cluster,
        check_idle,
        jobs_to_wait_for,
        write_files,
    )

    check_cluster(profile, on)
    check_idle(planned)
    numbers = jobs_to_wait_for(before)
    write_files(planned, profile)
    for job, given in submit_jobs(planned, profile, profile_name=on, after=numbers):
        what = f"step {job.step}" if job.step else f"{len(given)} run{'s' * (len(given) > 1)}"
        print(f"job {given[0] if len(given) == 1 else given[0].partition('_')[0]}: {what}")
    run = planned.jobs[0].elements[0].run
    print(f"see: bigsimclr runs {planned.out.parent}    bigsimclr logs -f {run}")


def srun(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="Run directory.")],
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="PROFILE", help="Profile that says how ranks are started."),
    ] = None,
    only: OnlyOption = None,
) -> None:
    """In a batch script: run a recipe on all tasks of the job.

    Saves and requeues the job when its time is up; `slurm/train.sbatch` shows what sbatch has to
    be told.
    """
    from bigsimclr.launch.batch import run_allocated
    from bigsimclr.launch.jobs import make_job_folder
    from bigsimclr.launch.profile import Profile, load_profile

    # The time limit is sbatch's; inside of a job nothing asks for it.
    profile = Profile(time="24:00:00") if on is None else load_profile(on)
    words = ["run", recipe, *(overrides or []), "--out", str(out)]
    code = run_allocated(
        [*words, *([] if only is None else ["--only", only])],
        profile=profile,
        folder=make_job_folder(out.absolute()),
        watched=out.absolute() / (only or ""),
    )
    raise typer.Exit(code)


def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of runs.")] = Path("runs"),
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List runs with their jobs: state, step, loss, time left."""
    from bigsimclr.launch.overview import list_runs, overview_text

    lines, note = list_runs(folder)
    if as_json:
        print(json.dumps({"runs": [line.as_facts() for line in lines], "note": note}, indent=2))
        return
    print(overview_text(lines) if lines else f"{folder}: no runs")
    if note is not None:
        print(f"\nstates of jobs are not known: {note}")


def cancel(
    targets: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories, or numbers of jobs.")
    ],
) -> None:
    """Cancel the jobs of runs; `submit` continues them.

    What they have saved stays.
    """
    from bigsimclr.launch.overview import active_jobs
    from bigsimclr.launch.scheduler import cancel as cancel_jobs

    for target in targets:
        jobs = active_jobs(target)
        if jobs:
            cancel_jobs(jobs)
        print(f"{target}: {'cancelled ' + ', '.join(jobs) if jobs else 'no job waits or runs'}")


def logs(
    run: RunArgument,
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")
    ] = False,
) -> None:
    """Print the log of a run's newest job."""
    from bigsimclr.launch.overview import read_log

    for text in read_log(run, follow=follow):
        print(text, end="", flush=True)

"""What a recipe takes on a cluster: memory against the GPU, hours, allocations; its scripts."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bigsimclr.checking import CheckedRun, check_recipe
from bigsimclr.checking.costs import si
from bigsimclr.launch.profile import GpuName, Profile, time_seconds
from bigsimclr.launch.submission import Job, Submission
from bigsimclr.recipe.schema import KnnRecipe
from bigsimclr.recipe.yaml_tree import show

PEAK_FLOPS: Final[dict[GpuName, float]] = {"a100": 312e12, "h100": 989e12, "h200": 989e12}
"""Dense 16-bit arithmetic a second, from NVIDIA's data sheets of the SXM boards."""
USABLE_BYTES: Final[dict[GpuName, int]] = {
    "a100": 80_000_000_000,
    "h100": 80_000_000_000,
    "h200": 140_000_000_000,
}
"""What estimates may take: a board has 6% more, for images, loss, buffers and workspaces."""
_LONGEST_COMMAND: Final = 10_000  # characters
UTILISATION: Final = 0.35
"""Share of the peak that is assumed where nothing was measured."""


def allocation_rows(
    run: CheckedRun, profile: Profile, *, images_per_second: float | None
) -> list[tuple[str, str]]:
    """Say what a stage takes with a profile, as (topic, text) rows.

    Args:
        run: the stage, checked for the profile's world size.
        profile: the cluster.
        images_per_second: measured, of one rank; None: estimated from the FLOPs.
    """
    rows = [("ranks", _ranks(profile))]
    cost = run.cost
    if cost is None:
        return rows
    if profile.gpu is not None:
        usable = USABLE_BYTES[profile.gpu]
        fits = "fits" if cost.memory_bytes <= usable else "does not fit"
        hint = "" if fits == "fits" else "; bigsimclr check --gpus lists what takes less"
        text = f"about {si(cost.memory_bytes, 'B')} of {si(usable, 'B')} of a {profile.gpu}: {fits}"
        rows.append(("gpu memory", text + hint))
    seconds, how = _seconds(run, profile, images_per_second)
    if seconds is None:
        return [*rows, ("hours", how)]
    rows.append(("hours", f"{_hours(seconds)} on {profile.world_size} ranks, {how}"))
    useful = time_seconds(profile.time) - profile.signal_seconds
    count = math.ceil(seconds / useful)
    text = f"{count} of {profile.time}, that is {_times(count - 1, 'requeue')} when the time is up"
    if count > 1 and not profile.requeue:
        text += "; requeue: false, so each has to be submitted"
    rows.append(("allocations", text))
    return rows


def _ranks(profile: Profile) -> str:
    where = "on a GPU each" if profile.gpus_per_node else "on CPUs"
    ranks = _times(profile.ranks, "rank")
    cpus = _times(profile.cpus_per_rank, "CPU")
    nodes = _times(profile.nodes, "node")
    return f"{profile.world_size}: {nodes} with {ranks} {where}, {cpus} for a rank"


def _seconds(
    run: CheckedRun, profile: Profile, images_per_second: float | None
) -> tuple[float | None, str]:
    cost, recipe = run.cost, run.recipe
    if isinstance(recipe, KnnRecipe) or cost is None or cost.steps is None:
        return None, "not known: so are the steps; give --examples N"
    if images_per_second is not None:
        images = cost.steps * recipe.batch.global_batch
        rate = images_per_second * profile.world_size
        return images / rate, f"at {images_per_second:g} images a second and rank"
    if profile.gpu is None:
        return None, "not known; --images-per-second N says what a rank does"
    peak = PEAK_FLOPS[profile.gpu]
    return (
        cost.steps * cost.update_flops / (UTILISATION * peak * profile.world_size),
        f"if {UTILISATION:.0%} of {si(peak, 'FLOP/s')} are reached, which is not measured; "
        "--images-per-second N replaces it",
    )


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 100 else f"{hours:,.0f} h"


def _times(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def dry_run_text(
    submission: Submission,
    profile: Profile,
    source: str,
    changes: Sequence[str],
    *,
    examples: int | None,
    speed: float | None,
    waits: bool,
) -> str:
    """Say what `submit` would do: the plan of every run, and every batch script.

    Args:
        submission: the jobs.
        profile: what each asks of Slurm.
        source: the recipe.
        changes: `key=value` texts.
        examples: training images to plan for where the data are not here.
        speed: measured images a second of one rank; None: estimated from the FLOPs.
        waits: whether other jobs come first.

    Raises:
        RecipeError: the recipe cannot be shared among these ranks.
        MissingExtraError: submitit is not installed.
    """
    lines = []
    for directory, all_changes in _plans(submission, changes):
        checked = check_recipe(
            source, all_changes, world_size=profile.world_size, examples=examples
        )
        for run in checked:
            rows = [*run.rows, *allocation_rows(run, profile, images_per_second=speed)]
            lines += [f"# {run.path or directory}", *_table(rows), ""]
    lines += [f"# finished already: {name}" for name in submission.finished]
    for job in submission.jobs:
        lines += _job_lines(job, profile, waits=waits)
    return "\n".join(lines).rstrip()


def _plans(submission: Submission, changes: Sequence[str]) -> list[tuple[Path, list[str]]]:
    """Return each recipe's directory with all its changes; a sweep has several."""
    elements = [element for job in submission.jobs for element in job.elements]
    swept = [(each.run, [*changes, *each.changes]) for each in elements if each.changes]
    return swept or [(submission.out, list(changes))]


def _job_lines(job: Job, profile: Profile, *, waits: bool) -> list[str]:
    from bigsimclr.launch.batch import Allocation, srun_words
    from bigsimclr.launch.slurm import script

    needs = [f"JOB_OF_{step.upper()}" for step in job.needs] or ["JOB_BEFORE"] * waits
    given = Allocation(
        job="",
        name="",
        restart=0,
        nodes=("",) * profile.nodes,
        tasks=profile.world_size,
        cpus_per_task=str(profile.cpus_per_rank),
        shell=0,
    )
    lines = [f"# batch script{f' of step {job.step}' * bool(job.step)}, in {job.folder}"]
    lines += script(job, profile, dependencies=needs).splitlines()
    for element in job.elements:
        words = shlex.join(["bigsimclr", *element.words])
        lines.append(f"# which goes on as: {show(words, _LONGEST_COMMAND)}")
    lines.append(f"# and starts the ranks by: {shlex.join(srun_words(given, profile))} ...")
    return [*lines, ""]


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(topic) for topic, _ in rows)
    return [f"{topic:<{width}}  {text}" for topic, text in rows]

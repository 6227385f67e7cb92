"""From a recipe to the jobs that run it: one, one for each step of a pipeline, or an array."""

import itertools
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bigsimclr.errors import DataError, RecipeError
from bigsimclr.launch import scheduler
from bigsimclr.launch.jobs import (
    SubmittedJob,
    job_folder,
    jobs_of,
    make_job_folder,
    note_jobs,
    parts_of,
)
from bigsimclr.launch.profile import Profile, find_profile, time_seconds
from bigsimclr.recipe.keys import nearest
from bigsimclr.recipe.loader import (
    deepest,
    is_pipeline,
    load_recipe,
    parse_overrides,
    plain_value,
    recipe_text,
    save_recipe,
    tree_of,
)
from bigsimclr.recipe.names import find_recipe
from bigsimclr.recipe.pipeline import PlannedRun, missing_inputs, plan_pipeline
from bigsimclr.recipe.plan import share_batch
from bigsimclr.recipe.schema import AnyStage, KnnRecipe, PipelineRecipe
from bigsimclr.recipe.yaml_tree import read_value, show
from bigsimclr.storage import publish

_PATH: Final = re.compile(r"[\w._+=:@,/ -]+")  # no quotes, no % that sbatch would replace
_LONGEST_PATH: Final = 400  # characters; names of job files come on top
_LONGEST_PART: Final = 200  # bytes of a file's or folder's name; file systems take 255
_LABEL: Final = re.compile(r"[^A-Za-z0-9._+=,-]")
_LONGEST_NAME: Final = 60


@dataclass(frozen=True)
class Element:
    """One run of a job, or of an element of a job array."""

    run: Path  # its run directory
    words: tuple[str, ...]  # of `bigsimclr`, in the batch script
    recipe: AnyStage | None  # what it runs; None for a step of a pipeline
    changes: tuple[str, ...] = ()  # `key=value` texts of its own, in a sweep


@dataclass(frozen=True)
class Job:
    """One call of sbatch."""

    step: str  # of a pipeline; empty for a single stage
    name: str
    folder: Path  # of its job files
    elements: tuple[Element, ...]  # several: a job array
    needs: tuple[str, ...]  # steps whose jobs must have ended well


@dataclass(frozen=True)
class Submission:
    """All that one `bigsimclr submit` asks for."""

    out: Path
    jobs: tuple[Job, ...]
    finished: tuple[str, ...]  # steps that need no job any more
    recipes: tuple[AnyStage, ...]  # of all runs that are not finished
    pipeline: PipelineRecipe | None
    source: Path


def plan_submission(
    source: str,
    changes: Sequence[str],
    *,
    out: Path,
    sweep: Sequence[str] = (),
    waits: bool = False,
) -> Submission:
    """Say which jobs a recipe takes; nothing is written.

    Args:
        source: a recipe file, or a name that `bigsimclr recipes` lists.
        changes: `key=value` texts.
        out: the run directory; with a sweep, the folder of its run directories.
        sweep: `key=value,value,...` texts; one run for each combination.
        waits: whether another run comes first, which may yet make what is missing.

    Raises:
        RecipeError: the recipe, a change or a path cannot be used.
        DataError: a parent or a list of labels is missing.
    """
    out = out.absolute()
    check_path(out, "--out")
    file = find_recipe(source)
    recipe = load_recipe(file) if is_pipeline(file) else None
    if isinstance(recipe, PipelineRecipe):
        if sweep:
            raise RecipeError("--array: a pipeline has grids of its own; use those of its steps")
        runs = plan_pipeline(recipe, source=file, overrides=parse_overrides(changes), directory=out)
        jobs, finished = _steps(recipe, runs, changes, out)
        recipes = tuple(run.recipe for run in runs if run.step not in finished)
        return Submission(out, jobs, finished, recipes, recipe, file)
    points = _points(sweep)
    loaded = [(label, texts, load_recipe(file, [*changes, *texts])) for label, texts in points]
    elements = [
        _stage(stage, out / label if label else out, texts)
        for label, texts, stage in loaded
        if not isinstance(stage, PipelineRecipe)
    ]
    missing = [] if waits else [line for element in elements for line in _missing(element)]
    if missing:
        raise DataError("\n".join(dict.fromkeys(missing)))
    job = Job("", _name(out), job_folder(out), tuple(elements), ())
    recipes = tuple(stage for *_, stage in loaded if not isinstance(stage, PipelineRecipe))
    return Submission(out, (job,), (), recipes, None, file)


def check_shares(submission: Submission, profile: Profile) -> None:
    """Refuse recipes that the profile's ranks could not share, before they wait in a queue.

    Raises:
        RecipeError: a global batch does not divide.
    """
    for recipe in submission.recipes:
        if not isinstance(recipe, KnnRecipe):
            share_batch(recipe, world_size=profile.world_size)


def check_path(path: Path, key: str) -> None:
    """Refuse a path that a batch script could not carry.

    Raises:
        RecipeError: it has other characters than letters, digits and a few signs, or is too long.
    """
    text = str(path)
    if len(text) > _LONGEST_PATH:
        raise RecipeError(f"{key}: {show(text)} has {len(text)} characters; {_LONGEST_PATH} fit")
    for part in path.parts:
        if len(os.fsencode(part)) > _LONGEST_PART:
            raise RecipeError(
                f"{key}: '{show(part)}' is too long a name; {_LONGEST_PART} bytes fit"
            )
    if not _PATH.fullmatch(text):
        strange = next(sign for sign in text if not _PATH.fullmatch(sign))
        raise RecipeError(
            f"{key}: {show(text, 200)} holds {show(repr(strange))}; in paths of jobs use letters, "
            "digits, spaces and . _ + = : @ , / -"
        )


def _points(sweep: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Spell out a sweep: for each combination a label, and its `key=value` texts."""
    axes = []
    for text in sweep:
        key, equals, written = text.partition("=")
        origin = f"--array {show(key)}"
        read = read_value(f"[{written}]", origin)
        values = plain_value(read.root)
        if isinstance(values, list) and len(values) == 1 and isinstance(values[0], list):
            values = values[0]  # it was written with its brackets
        if not equals or read.problems or not isinstance(values, list) or not values:
            raise RecipeError(f"{origin}: write it as KEY=VALUE,VALUE,...")
        axes.append([(key, value) for value in values])
    points = []
    for point in itertools.product(*axes):
        label = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in point)
        texts = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in point]
        if len(label) > _LONGEST_PART:
            raise RecipeError(f"--array: '{show(label)}' is too long a name for a run directory")
        points.append((_LABEL.sub("-", label), texts))
    if len({label for label, _ in points}) < len(points):
        raise RecipeError("--array: two combinations are the same; name each value once")
    return points


def _stage(recipe: AnyStage, run: Path, changes: Sequence[str]) -> Element:
    folder = job_folder(run)
    words = ("srun", str(folder / "recipe.yaml"), "--out", str(run))
    how = ("--on", str(folder / "profile.json"))
    return Element(run, (*words, *how), recipe, tuple(changes))


def _missing(element: Element) -> list[str]:
    if element.recipe is None:
        return []
    return missing_inputs(PlannedRun("", "", {}, None, element.recipe))


def _steps(
    recipe: PipelineRecipe, runs: Sequence[PlannedRun], changes: Sequence[str], out: Path
) -> tuple[tuple[Job, ...], tuple[str, ...]]:
    """Make a job for each step that is not finished; it runs the step's runs one by one."""
    folder = job_folder(out)
    done = [
        step.name
        for step in recipe.steps
        if all((out / run.path / "result.json").exists() for run in runs if run.step == step.name)
    ]
    missing = [line for run in runs if run.step not in done for line in missing_inputs(run)]
    if missing:
        raise DataError("\n".join(dict.fromkeys(missing)))
    jobs = []
    for step in recipe.steps:
        if step.name in done:
            continue
        words = ("srun", str(folder / "recipes" / "pipeline.yaml"), *changes)
        words += ("--only", step.name, "--out", str(out), "--on", str(folder / "profile.json"))
        needs = () if step.parent is None or step.parent in done else (step.parent,)
        element = Element(out, words, None)
        jobs.append(Job(step.name, _name(out / step.name), folder, (element,), needs))
    return tuple(jobs), tuple(done)


def _name(run: Path) -> str:
    """Name a job after its run."""
    words = run.parts[-2:] if run.parent.name != "runs" else run.parts[-1:]
    return _LABEL.sub("-", "-".join(words).strip("/"))[-_LONGEST_NAME:].lstrip("-") or "bigsimclr"


def check_cluster(profile: Profile, name: str) -> None:
    """Refuse a profile that the cluster cannot serve, before anything is submitted.

    Raises:
        RecipeError: an unknown partition, or more time or nodes than it gives.
        DistributedError: Slurm does not answer.
    """
    found = scheduler.partitions()
    default = next((key for key, fields in found.items() if fields.get("Default") == "YES"), None)
    chosen = profile.partition or default
    if chosen is None:
        raise _refused(name, "partition", f"the cluster has no default; name one of {_list(found)}")
    for part in chosen.split(","):
        if part not in found:
            near = nearest(part, found)
            hint = f"did you mean '{near}'?" if near else f"it has {_list(found)}"
            raise _refused(name, "partition", f"the cluster has no partition '{part}'; {hint}")
        _check_limits(profile, part, found[part], name)


def _check_limits(profile: Profile, partition: str, fields: Mapping[str, str], name: str) -> None:
    longest = scheduler.minutes(fields.get("MaxTime", ""))
    if longest is not None and time_seconds(profile.time) > 60 * longest:
        text = f"{profile.time} is more than partition '{partition}' gives"
        raise _refused(name, "time", f"{text} ({fields['MaxTime']})")
    most = fields.get("MaxNodes", ""), fields.get("TotalNodes", "")
    nodes = min((int(number) for number in most if number.isdecimal()), default=profile.nodes)
    if profile.nodes > nodes:
        text = f"{profile.nodes} are more than partition '{partition}' gives ({nodes})"
        raise _refused(name, "nodes", text)


def _refused(name: str, key: str, text: str) -> RecipeError:
    return RecipeError(f"{deepest(tree_of(find_profile(name)), [key]).origin}: {key}: {text}")


def _list(names: Mapping[str, object]) -> str:
    return ", ".join(names)


def check_idle(submission: Submission) -> None:
    """Refuse to submit a run that a job is still working on.

    Raises:
        RecipeError: one of its jobs waits or runs.
        DistributedError: Slurm does not answer.
    """
    active = scheduler.queue()
    runs = {submission.out, *(element.run for job in submission.jobs for element in job.elements)}
    for run in sorted(runs):
        for job in jobs_of(run):
            if job.number in active:
                state = active[job.number].state
                raise RecipeError(
                    f"{run}: job {job.number} works on it ({state}); bigsimclr cancel {run} ends "
                    "it, and another --out makes a new run"
                )


def jobs_to_wait_for(runs: Sequence[Path]) -> list[str]:
    """Return the numbers of the jobs that work on runs.

    Raises:
        RecipeError: a run is neither finished nor worked on.
        DistributedError: Slurm does not answer.
    """
    if not runs:
        return []
    for run in runs:
        check_path(run.absolute(), "--after")
    active = scheduler.queue()
    found = []
    for run in runs:
        inner = [path for path in run.iterdir() if path.is_dir()] if run.is_dir() else []
        jobs = jobs_of(run) or [job for path in inner for job in jobs_of(path)]  # of a sweep
        numbers = [job.number for job in jobs if job.number in active]
        if not numbers and not (run / "result.json").exists() and not _is_done(run):
            raise RecipeError(f"--after {run}: no job works on it, and it is not finished")
        found += numbers
    return found


def _is_done(run: Path) -> bool:
    """Say whether a pipeline or a sweep has finished."""
    swept = [path.parents[1] for path in run.glob(f"*/{job_folder(Path())}/jobs.jsonl")]
    parts = [part for part in parts_of(run) if part != run] or swept
    return bool(parts) and all((part / "result.json").exists() for part in parts)


def write_files(submission: Submission, profile: Profile) -> None:
    """Keep what the jobs will read in the run directory, so that later edits change nothing.

    Raises:
        StorageError: it cannot be written, or others may write there.
    """
    text = profile.model_dump_json(indent=1)
    for job in submission.jobs:
        make_job_folder(job.folder.parent)
        for element in job.elements:
            folder = make_job_folder(element.run)
            publish(folder / "profile.json", f"{text}\n")
            if element.recipe is not None:
                save_recipe(element.recipe, folder / "recipe.yaml")
    if submission.pipeline is not None:
        _write_pipeline(submission.pipeline, submission)


def _write_pipeline(recipe: PipelineRecipe, submission: Submission) -> None:
    folder = job_folder(submission.out) / "recipes"
    steps = []
    for step in recipe.steps:
        file = find_recipe(step.recipe, beside=submission.source.parent)
        publish(folder / f"{step.name}.yaml", file.read_text(encoding="utf-8"))
        steps.append(step.model_copy(update={"recipe": f"{step.name}.yaml"}))
    copy = recipe.model_copy(update={"steps": tuple(steps)})
    publish(folder / "pipeline.yaml", recipe_text(copy))


def note_submitted(job: Job, numbers: Sequence[str], logs: Sequence[Path], profile: str) -> None:
    """Note for every run which job works on it."""
    now = time.time()
    for element, number, log in zip(job.elements, numbers, logs, strict=True):
        note_jobs(element.run, [SubmittedJob(number, job.step, str(log), now, profile)])

"""What a run directory holds, read without trust: what is missing or damaged becomes a note."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from bigsimclr.errors import BigSimCLRError, RecipeError
from bigsimclr.recipe.yaml_tree import Node, read_tree
from bigsimclr.report.attempts import Attempt, read_attempts
from bigsimclr.report.records import Record, read_records

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

_LARGEST_FILE = 4_000_000  # bytes; recipes and results are a few thousand
_NAMED_IMAGES = 3  # of the unreadable ones; the rest is in their file
_LONGEST_CHAIN = 16  # parents followed upwards; also ends a circle


@dataclass(frozen=True)
class Run:
    """One run of one stage."""

    path: str  # relative to the reported directory; "." when it is the run itself
    step: str  # the pipeline's name of the step, or the stage
    stage: str  # "" when nothing says
    grid: Mapping[str, Json]  # keys that differ between the runs of a step
    parent: str | None
    recipe_text: str  # "" when missing
    recipe: Mapping[str, Json]
    plan: Mapping[str, Json]
    environment: Mapping[str, Json]
    records: Sequence[Record]
    attempts: Sequence[Attempt]
    result: Mapping[str, Json] | None  # None: not finished

    @property
    def started(self) -> bool:
        """Whether the run left anything behind."""
        return bool(self.recipe_text or self.records or self.result is not None)

    @property
    def protocol(self) -> Mapping[str, Json]:
        """How the accuracy was measured; empty when not finished."""
        return mapping((self.result or {}).get("protocol"))

    @property
    def metrics(self) -> Mapping[str, Json]:
        """The final metrics; empty when not finished."""
        return mapping((self.result or {}).get("metrics"))

    @property
    def accuracy(self) -> float | None:
        """Share of held-out images classified right, 0 to 1."""
        return number(self.metrics.get("accuracy"))


@dataclass(frozen=True)
class Step:
    """A step of a pipeline, whether or not any of its runs was made."""

    name: str
    stage: str


@dataclass(frozen=True)
class RunSet:
    """Everything one report is about."""

    name: str
    is_pipeline: bool
    command: str | None  # that made the run, where it was noted
    pipeline_text: str  # "" for a single run
    steps: tuple[Step, ...]
    runs: tuple[Run, ...]
    ancestors: tuple[Run, ...]  # runs outside the directory that a single run descends from
    notes: tuple[str, ...]  # what could not be read

    @cached_property
    def by_path(self) -> Mapping[str, Run]:
        """All runs by their path."""
        return {run.path: run for run in (*self.ancestors, *self.runs)}

    def lineage(self, run: Run) -> Iterator[Run]:
        """Yield a run, its parent, the parent's parent and so on."""
        for _ in range(_LONGEST_CHAIN):
            yield run
            if run.parent is None or run.parent not in self.by_path:
                return
            run = self.by_path[run.parent]

    def of_step(self, step: Step) -> tuple[Run, ...]:
        """Return the runs of one step, in order."""
        return tuple(run for run in self.runs if run.step == step.name)


def mapping(value: Json) -> Mapping[str, Json]:
    """Return a JSON object, or an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: Json) -> Sequence[Json]:
    """Return a JSON list, or an empty one for anything else."""
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()


def number(value: Json) -> float | None:
    """Return a finite JSON number as a float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # A float compares false with both bounds when it is NaN; a huge int must not overflow.
    return float(value) if -1e300 < value < 1e300 else None


def text(value: Json) -> str | None:
    """Return a non-empty JSON string, or None for anything else."""
    return value if isinstance(value, str) and value else None


def read_run_set(run_dir: Path) -> RunSet:
    """Read a pipeline's directory or a single run's; whatever is missing stays empty.

    Args:
        run_dir: the directory; it need not be finished, and its files need not be sound.
    """
    notes: list[str] = []
    name = run_dir.resolve().name
    described, pipeline_text = run_dir / "pipeline.json", run_dir / "pipeline.yaml"
    if not (described.exists() or pipeline_text.exists()):
        run = _read_run(run_dir, ".", notes=notes)
        return RunSet(
            name=name,
            is_pipeline=False,
            command=text(run.environment.get("command")),
            pipeline_text="",
            steps=(Step(run.step, run.stage),),
            runs=(run,),
            ancestors=tuple(_read_ancestors(run_dir, run, notes)),
            notes=tuple(notes),
        )
    tree = mapping(_read_json(described, described.name, notes))
    written = _read_text(pipeline_text, notes)
    wanted = _parse_yaml(written, pipeline_text.name, notes)
    steps: list[Step] = []
    runs: list[Run] = []
    for entry in sequence(tree.get("steps") or wanted.get("steps")):
        step = mapping(entry)
        step_name = text(step.get("name")) or f"step {len(steps) + 1}"
        if any(other.name == step_name for other in steps):
            notes.append(f"pipeline.json: two steps are called {step_name!r}")
            step_name += f" ({len(steps) + 1})"
        stage = text(step.get("stage")) or ""
        steps.append(Step(step_name, stage))
        for item in sequence(step.get("runs")):
            planned = mapping(item)
            path = text(planned.get("path"))
            if path is None or not _is_inside(run_dir, path):
                notes.append(f"pipeline.json: {path!r} is not a folder of this run; left out")
                continue
            runs.append(
                _read_run(
                    run_dir / path,
                    path,
                    step=step_name,
                    stage=stage,
                    grid=mapping(planned.get("grid")),
                    parent=text(planned.get("parent")),
                    notes=notes,
                )
            )
    return RunSet(
        name=text(tree.get("name")) or name,
        is_pipeline=True,
        command=text(tree.get("command")),
        pipeline_text=written,
        steps=tuple(steps),
        runs=tuple(runs),
        ancestors=(),
        notes=tuple(dict.fromkeys(notes)),
    )


def _read_run(
    folder: Path,
    path: str,
    *,
    notes: list[str],
    step: str | None = None,
    stage: str = "",
    grid: Mapping[str, Json] | None = None,
    parent: str | None = None,
) -> Run:
    within = "" if path == "." else f"{path}/"
    recipe_text = _read_text(folder / "recipe.yaml", notes)
    recipe = _parse_yaml(recipe_text, f"{within}recipe.yaml", notes)
    result = _read_result(folder / "result.json", f"{within}result.json", notes)
    _note_unreadable(folder / "unreadable.txt", within, result, notes)
    stage = stage or text(mapping(result).get("stage")) or text(recipe.get("stage")) or ""
    return Run(
        path=path,
        step=step or stage or "run",
        stage=stage,
        grid=grid or {},
        parent=parent or text(mapping(result).get("parent")) or text(recipe.get("parent")),
        recipe_text=recipe_text,
        recipe=recipe,
        plan=mapping(_read_json(folder / "plan.json", f"{within}plan.json", notes)),
        environment=mapping(
            _read_json(folder / "environment.json", f"{within}environment.json", notes)
        ),
        records=_read_metrics(folder, f"{within}metrics.jsonl", notes),
        attempts=_read_attempts(folder, f"{within}attempts.jsonl", notes),
        result=result,
    )


def _read_ancestors(folder: Path, run: Run, notes: list[str]) -> Iterator[Run]:
    # A run stores its parent relative to itself or, inside a pipeline, to the pipeline.
    for _ in range(_LONGEST_CHAIN):
        if run.parent is None:
            return
        places = [base / run.parent for base in (folder, *list(folder.resolve().parents)[:3])]
        found = next((place for place in places if _is_run(place)), None)
        if found is None:
            return
        folder, run = found, _read_run(found, run.parent, notes=notes)
        yield run


def _is_run(place: Path) -> bool:
    try:
        return (place / "recipe.yaml").is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _is_inside(run_dir: Path, path: str) -> bool:
    try:
        return (run_dir / path).resolve().is_relative_to(run_dir.resolve())
    except (OSError, ValueError, RuntimeError):
        return False


def _read_text(path: Path, notes: list[str]) -> str:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            notes.append(f"{path.name}: larger than {_LARGEST_FILE:,} bytes; left out")
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:
        notes.append(f"{path.name}: cannot be read ({type(error).__name__})")
        return ""


def _read_json(path: Path, name: str, notes: list[str], *, consequence: str = "") -> Json:
    written = _read_text(path, notes)
    if not written and not path.is_file():
        return None
    try:
        value: Json = json.loads(written)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, Mapping):
        notes.append(f"{name}: damaged, {consequence or 'left out'}")
        return None
    return value


def _read_result(path: Path, name: str, notes: list[str]) -> Mapping[str, Json] | None:
    unfinished = "so its run is shown as not finished"
    result = _read_json(path, name, notes, consequence=unfinished)
    if not isinstance(result, Mapping):
        return None
    metrics = result.get("metrics")
    if not isinstance(metrics, Mapping):
        notes.append(f"{name}: damaged, metrics is no list of names and numbers; none is shown")
    elif "accuracy" in metrics and number(metrics["accuracy"]) is None:
        notes.append(f"{name}: accuracy is no finite number; it is not shown")
    return result


def _note_unreadable(
    path: Path, within: str, result: Mapping[str, Json] | None, notes: list[str]
) -> None:
    """Note the images that a run could not read; a line of the file is name, tab, reason."""
    lines = [line for line in _read_text(path, notes).split("\n") if line.strip()]
    stated = number(mapping(mapping(result).get("data")).get("unreadable")) or 0.0
    count = max(len(lines), int(stated))
    if count < 1:
        return
    named = [line.partition("\t")[0].strip() for line in lines[:_NAMED_IMAGES]]
    names = f": {', '.join(named)}" if named else ""
    names += f" and {count - len(named):,} more" if 0 < len(named) < count else ""
    run = f"{within.rstrip('/')}: " if within else ""
    listed = f" (all in {within}{path.name})" if 0 < len(named) < len(lines) else ""
    images = "1 image" if count == 1 else f"{count:,} images"
    notes.append(f"{run}{images} could not be read and took no part{names}{listed}")


def _parse_yaml(written: str, name: str, notes: list[str]) -> Mapping[str, Json]:
    if not written:
        return {}
    try:
        return mapping(_plain(read_tree(written, name).root))
    except RecipeError as error:
        notes.append(str(error))
        return {}


def _plain(node: Node) -> Json:
    if isinstance(node.value, dict):
        return {key: _plain(inner) for key, inner in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(inner) for inner in node.value]
    return node.value


def _read_metrics(folder: Path, name: str, notes: list[str]) -> Sequence[Record]:
    try:
        return tuple(read_records(folder))
    except (BigSimCLRError, OSError, ValueError, TypeError, RecursionError) as error:
        notes.append(f"{name}: {error}")
        return ()


def _read_attempts(folder: Path, name: str, notes: list[str]) -> Sequence[Attempt]:
    try:
        return tuple(read_attempts(folder))
    except OSError as error:
        notes.append(f"{name}: cannot be read ({type(error).__name__})")
        return ()

"""A pipeline expanded into its runs: one per step, or one per point of a step's grid."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigsimclr.errors import RecipeError
from bigsimclr.recipe.keys import STAGES, dotted_keys, nearest, same_ending
from bigsimclr.recipe.loader import deepest, node_of, refusal, stage_of, tree_of, try_recipe
from bigsimclr.recipe.names import find_recipe
from bigsimclr.recipe.schema import (
    AnyStage,
    PipelineRecipe,
    PipelineStep,
    PretrainRecipe,
    Recipe,
    SupervisedRecipe,
)
from bigsimclr.recipe.steps import PARENTS, step_breaches
from bigsimclr.recipe.yaml_tree import Node, show

GridPoint = Mapping[str, int | float | str]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a pipeline, checked but not begun."""

    step: str
    path: str  # relative to the pipeline's directory
    grid: GridPoint
    parent: str | None  # path of the parent run, relative to the pipeline's directory
    recipe: AnyStage


@dataclass(frozen=True)
class _Step:
    """A step whose recipe was found."""

    step: PipelineStep
    file: Path
    stage: str | None
    keys: frozenset[str]  # dotted, of the stage
    written: Node  # the step as its pipeline's file has it

    def line(self, *keys: str, text: str) -> str:
        """Say what is wrong with a key of the step, at its place."""
        return _step_line(self.step, self.written, keys, text)


def _step_line(step: PipelineStep, written: Node, keys: Sequence[str], text: str) -> str:
    return show(f"{deepest(written, keys).origin}: step '{step.name}'{text}", 1000)


@dataclass(frozen=True)
class _Point:
    """Where a run lies and what it descends from."""

    path: str
    grid: GridPoint
    parent: str | None


def plan_pipeline(
    recipe: PipelineRecipe,
    *,
    source: Path,
    overrides: Mapping[str, object],
    directory: Path,
) -> list[PlannedRun]:
    """Expand a pipeline into its runs, in order, every recipe checked.

    Args:
        recipe: the pipeline.
        source: the pipeline's file; recipes beside it are found by file name.
        overrides: keys for one step as `step.key`, or as `key` for every step that has it.
        directory: where the runs will lie.

    Raises:
        RecipeError: a step, a parent, a grid or an override does not fit; one line per mistake.
    """
    breaches = step_breaches(recipe)
    if breaches:
        raise refusal([f"{source}: {key}: {text}" for key, text in breaches])
    lines: list[str] = []
    steps = _find_steps(recipe, source, lines)
    lines += _unfit_parents(steps)
    if len(steps) == len(recipe.steps):  # else the keys of some are not known
        lines += _unfit_overrides(steps, overrides)
    points: dict[str, list[_Point]] = {}
    runs: list[PlannedRun] = []
    for step in steps:
        name = step.step.name
        points[name] = _points(step.step, points)
        own = [*_changes(step), *_overrides_of(step, steps, overrides)]
        for point in points[name]:
            stage, mistakes = try_recipe(step.file, [*own, *_given(step, point, directory)])
            lines += mistakes or _without_parent(step, stage)
            if stage is not None and not isinstance(stage, PipelineRecipe):
                runs.append(PlannedRun(name, point.path, point.grid, point.parent, stage))
    if lines:
        raise refusal(lines)
    return runs


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for a file
        return False


def missing_inputs(run: PlannedRun) -> list[str]:
    """Name the files that a run reads, that no earlier run makes, and that are not there.

    Args:
        run: of a pipeline, or of a single stage with an empty `step`.

    Returns:
        A line for each: its key as an override has it, the path, and what to do.
    """
    recipe, prefix = run.recipe, f"{run.step}." if run.step else ""
    lines = []
    labels = None if isinstance(recipe, PretrainRecipe) else recipe.labels
    if (
        labels is not None
        and labels.list is not None
        and not (_is_there(labels.list) and labels.list.is_file())
    ):
        key = f"{prefix}labels"
        hint = (
            f"give {key}.list=FILE (ImageNet's official lists are imagenet_subsets/*.txt of "
            f"google-research/simclr), or draw images: {key}.list=null {key}.percent=NUMBER"
        )
        lines.append(f"{key}.list: {_absent(labels.list)}; {hint}")
    if run.parent is None and not isinstance(recipe, PretrainRecipe | SupervisedRecipe):
        parent = recipe.parent
        if parent is not None and not _is_there(parent):
            hint = f"give {prefix}parent=DIR of a run, or a model file"
            lines.append(f"{prefix}parent: {_absent(parent)}; {hint}")
    return [show(line, 1000) for line in lines]


def _absent(path: Path) -> str:
    place = "" if path.is_absolute() else " (relative to the current directory)"
    return f"there is no {path}{place}"


def _find_steps(recipe: PipelineRecipe, source: Path, lines: list[str]) -> list[_Step]:
    """Find the recipes of the steps; a line is added for each that cannot be used."""
    root = tree_of(source)
    found = []
    for number, step in enumerate(recipe.steps):
        written = deepest(root, ["steps", str(number)])
        try:
            file = find_recipe(step.recipe, beside=source.parent)
            stage = stage_of(file)
        except RecipeError as error:
            lines.append(_step_line(step, written, ["recipe"], f": recipe: {error}"))
            continue
        if stage == "pipeline":
            text = f": recipe: {step.recipe} is a pipeline; name the recipe of a stage"
            lines.append(_step_line(step, written, ["recipe"], text))
            continue
        section = STAGES.get(stage or "")
        keys = frozenset(() if section is None else dotted_keys(section))
        found.append(_Step(step, file, stage, keys, written))
    return found


def _unfit_parents(steps: Sequence[_Step]) -> list[str]:
    """List steps whose parent is of a stage that they cannot build on."""
    stages = {step.step.name: step.stage for step in steps}
    lines = []
    for step in steps:
        parent = step.step.parent
        if parent is None or step.stage not in STAGES:
            continue
        needed = PARENTS.get(step.stage, ())
        if not needed:
            lines.append(step.line("parent", text=f" ({step.stage}) takes no parent; remove it"))
        elif stages.get(parent) in STAGES and stages[parent] not in needed:
            text = f"builds on a {' or '.join(needed)} step, and '{parent}' is {stages[parent]}"
            lines.append(step.line("parent", text=f" ({step.stage}) {text}"))
    return lines


def _without_parent(step: _Step, recipe: Recipe | None) -> list[str]:
    """Say that a step needs a parent and neither the pipeline nor its recipe has one."""
    if isinstance(recipe, PretrainRecipe | SupervisedRecipe | PipelineRecipe) or recipe is None:
        return []
    if recipe.parent is not None or step.step.parent is not None:
        return []
    name = step.step.name
    text = f"needs parent: NAME of an earlier step, or {name}.parent=RUN for one that exists"
    return [step.line("name", text=f" ({step.stage}) {text}")]


def _without_positions(key: str) -> str:
    """Drop positions in lists, which the schema does not name."""
    return ".".join(part for part in key.split(".") if not part.isdecimal())


def _unfit_overrides(steps: Sequence[_Step], overrides: Mapping[str, object]) -> list[str]:
    """List overrides that no step has, or that the pipeline itself decides."""
    by_name = {step.step.name: step for step in steps}
    known = frozenset().union(*(step.keys for step in steps))
    lines = []
    for key in overrides:
        first, _, rest = key.partition(".")
        text = None
        if first in by_name:
            step = by_name[first].step
            if rest == "parent" and step.parent is not None:
                text = f"the pipeline gives this step the parent '{step.parent}'"
        elif key == "parent":
            text = "the pipeline's steps have parents of their own; run a single stage with it"
        elif _without_positions(key) not in known:
            text = f"no step has this key; {_hint(key, by_name, known)}"
        taken = [step for step in steps if _own_key(key, step, by_name) in step.step.grid]
        if taken:
            text = f"the grid of step '{taken[0].step.name}' sets this key"
        if text is not None:
            lines.append(f"override {show(key)}: {text}")
    return lines


def _hint(key: str, by_name: Mapping[str, _Step], known: frozenset[str]) -> str:
    first, _, rest = key.partition(".")
    step = nearest(first, by_name) if rest else None
    if step is not None and _without_positions(rest) in by_name[step].keys:
        return f"did you mean '{step}.{rest}'?"
    near = same_ending(key, sorted(known)) or nearest(key, sorted(known | by_name.keys()))
    return f"did you mean '{near}'?" if near else "all keys: bigsimclr explain --all"


def _own_key(key: str, step: _Step, by_name: Mapping[str, _Step]) -> str | None:
    """Return what an override is called within a step, None where it is for other steps."""
    first, _, rest = key.partition(".")
    if first in by_name:
        return rest if first == step.step.name else None
    return key if _without_positions(key) in step.keys else None


def _changes(step: _Step) -> list[tuple[str, Node]]:
    """Return the keys that the pipeline's file sets in every run of a step."""
    return [
        (key, node_of(value, step.line("changes", key, text=f": changes: {show(key)}")))
        for key, value in step.step.changes.items()
    ]


def _overrides_of(
    step: _Step, steps: Sequence[_Step], overrides: Mapping[str, object]
) -> list[tuple[str, Node]]:
    by_name = {other.step.name: other for other in steps}
    return [
        (own, node_of(value, f"override {show(key)}"))
        for key, value in overrides.items()
        if (own := _own_key(key, step, by_name)) is not None
    ]


def _given(step: _Step, point: _Point, directory: Path) -> list[tuple[str, Node]]:
    """Return the keys that the pipeline itself sets in one run of a step."""
    # An inherited point only names the run: its keys were the parent's.
    grid = point.grid if step.step.grid else {}
    nodes = [
        (key, node_of(value, step.line("grid", key, text=f": grid: {show(key)}")))
        for key, value in grid.items()
    ]
    if point.parent is not None and step.stage in PARENTS:
        origin = step.line("parent", text=": parent")
        nodes.append(("parent", node_of(directory / point.parent, origin)))
    return nodes


def _points(step: PipelineStep, points: Mapping[str, list[_Point]]) -> list[_Point]:
    parents = points.get(step.parent or "", [])
    if not step.grid:
        return [_Point(_path(step.name, run.grid), run.grid, run.path) for run in parents] or [
            _Point(step.name, {}, None)
        ]
    grids: list[GridPoint] = [
        dict(zip(step.grid, values, strict=True))
        for values in itertools.product(*step.grid.values())
    ]
    return [_Point(_path(step.name, grid), grid, _parent_path(grid, parents)) for grid in grids]


def _path(step: str, grid: GridPoint) -> str:
    label = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in grid.items())
    return f"{step}/{label}" if label else step


def _parent_path(grid: GridPoint, parents: list[_Point]) -> str | None:
    matching = (run.path for run in parents if not run.grid or dict(run.grid) == dict(grid))
    return next(matching, None)

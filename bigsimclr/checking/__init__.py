"""What `bigsimclr check` says: recipes resolved, images counted, plans made; nothing is started."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bigsimclr.checking.costs import StageCost, cost_rows, si, stage_cost
from bigsimclr.checking.gpus import GpuTable, gpu_table
from bigsimclr.checking.networks import count_classes, stage_network, stored_network
from bigsimclr.data import build_data, count_examples
from bigsimclr.errors import DataError, RecipeError
from bigsimclr.models import Architecture
from bigsimclr.recipe import find_recipe, is_pipeline, load_recipe, parse_overrides, recipe_text
from bigsimclr.recipe.pipeline import PlannedRun, plan_pipeline
from bigsimclr.recipe.plan import describe, make_plan
from bigsimclr.recipe.schema import (
    AnyStage,
    AnyTraining,
    DistillRecipe,
    FinetuneRecipe,
    KnnRecipe,
    LinearRecipe,
    PipelineRecipe,
    PretrainRecipe,
    SupervisedRecipe,
)


@dataclass(frozen=True)
class CheckedRun:
    """One run that a recipe asks for, and what it means here."""

    path: str  # relative to the pipeline's directory; empty for a single stage
    recipe: AnyStage
    rows: tuple[tuple[str, str], ...]  # topic and text
    network: Architecture | None  # None where nothing is trained, or it is not known
    cost: StageCost | None  # as network

    @property
    def gpus(self) -> GpuTable | None:
        """Estimate the memory per GPU; None where no cost is known."""
        if self.network is None or self.cost is None or isinstance(self.recipe, KnnRecipe):
            return None
        return gpu_table(self.recipe, self.network, self.cost.teacher)

    def as_facts(self) -> dict[str, object]:
        """Return the resolved recipe, the plan and the cost as plain JSON values."""
        return {
            "run": self.path or None,
            "stage": self.recipe.stage,
            "recipe": self.recipe.model_dump(mode="json"),
            "plan": dict(self.rows),
            "cost": None if self.cost is None else self.cost.as_facts(),
        }


def check_recipe(
    name: str, changes: Sequence[str], *, world_size: int = 1, examples: int | None = None
) -> list[CheckedRun]:
    """Resolve a recipe and count its images; a pipeline gives one entry for each of its runs.

    Args:
        name: a recipe file, or a name that `bigsimclr recipes` lists.
        changes: `key=value` texts.
        world_size: number of ranks to plan for.
        examples: number of training images to plan for where the data are not here.

    Raises:
        RecipeError: the recipe or its numbers cannot be used.
    """
    source = find_recipe(name)
    loaded = load_recipe(source, () if is_pipeline(source) else changes)
    if isinstance(loaded, PipelineRecipe):
        runs = plan_pipeline(
            loaded, source=source, overrides=parse_overrides(changes), directory=Path()
        )
    else:
        runs = [PlannedRun(step="", path="", grid={}, parent=None, recipe=loaded)]
    checked: dict[str, CheckedRun] = {}
    for run in runs:
        parent = _stored_parent(run.recipe)
        if run.parent is not None:
            parent = checked[run.parent].network
        try:
            checked[run.path] = _check(run, parent, world_size=world_size, given=examples)
        except RecipeError as error:
            raise RecipeError(f"{run.path}: {error}" if run.path else str(error)) from None
    return list(checked.values())


def stage_text(run: CheckedRun) -> str:
    """Write one stage: every key and default as YAML, then what follows from them."""
    width = max(len(topic) for topic, _ in run.rows)
    rows = [f"{topic:<{width}}  {text}" for topic, text in run.rows]
    return "\n".join([recipe_text(run.recipe), *rows])


def pipeline_text(runs: Sequence[CheckedRun]) -> str:
    """Write a line for each run; runs of a grid that do the same amount of work share one."""
    alike: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        step = run.path.partition("/")[0]
        facts = [text for topic, text in run.rows if topic in ("data", "steps")]
        if step != run.recipe.stage:
            facts.insert(0, run.recipe.stage)
        if run.cost is not None:
            facts.append(f"{si(run.cost.network.total.parameters)} parameters")
            if run.cost.total_flops is not None:
                facts.append(si(run.cost.total_flops, "FLOP"))
        alike.setdefault((step, "; ".join(facts)), []).append(run.path)
    return "\n".join(f"{_named(paths)}: {facts}" for (_, facts), paths in alike.items())


def gpus_text(runs: Sequence[CheckedRun]) -> str:
    """Write the table of memory per GPU; runs of a pipeline whose tables are equal share one."""
    alike: dict[str, list[str]] = {}
    for run in runs:
        table = run.gpus
        text = "memory per GPU: not known" if table is None else table.text()
        alike.setdefault(text, []).append(run.path)
    return "\n\n".join(
        f"{_named(paths)}:\n{text}" if paths[0] else text for text, paths in alike.items()
    )


def _named(paths: Sequence[str]) -> str:
    return f"{paths[0]} (and {len(paths) - 1} more)" if len(paths) > 1 else paths[0]


def _check(
    run: PlannedRun, parent: Architecture | None, *, world_size: int, given: int | None
) -> CheckedRun:
    recipe = run.recipe
    classes = count_classes(recipe.data)
    network = stage_network(recipe, parent=parent, classes=classes)
    examples, data = _count(recipe, given)
    rows = [("data", data), *describe(recipe, examples=examples, world_size=world_size)]
    cost = None
    if not isinstance(recipe, KnnRecipe):
        if network is None:
            rows.append(("parameters", "not known: the network is the parent's, not found here"))
        else:
            cost = stage_cost(
                recipe,
                network,
                parent if isinstance(recipe, DistillRecipe) else None,
                world_size=world_size,
                steps=_steps(recipe, examples, world_size),
            )
            probes = not isinstance(recipe, PretrainRecipe) or recipe.probe.linear
            lacks = probes and classes is None and network.classes is None
            rows += cost_rows(recipe, cost, lacks_classifier=lacks)
    if _needs_parent(recipe):
        rows.append(("parent", "not given; needed to run: parent=DIR"))
    return CheckedRun(run.path, recipe, tuple(rows), network, cost)


def _stored_parent(recipe: AnyStage) -> Architecture | None:
    if isinstance(recipe, PretrainRecipe | SupervisedRecipe) or recipe.parent is None:
        return None
    return stored_network(recipe.parent)


def _needs_parent(recipe: AnyStage) -> bool:
    return not isinstance(recipe, PretrainRecipe | SupervisedRecipe) and recipe.parent is None


def _steps(recipe: AnyTraining, examples: int | None, world_size: int) -> int | None:
    if examples is None:
        return recipe.schedule.steps
    return make_plan(recipe, examples=examples, world_size=world_size).steps


def _count(recipe: AnyStage, given: int | None) -> tuple[int | None, str]:
    """Count the images that a stage trains on, or take what is given where they are not here."""
    by_epochs = not isinstance(recipe, KnnRecipe) and recipe.schedule.steps is None
    unknown = "steps are not known" if by_epochs else "not counted"
    missing = None
    try:
        counted, held_out = count_examples(recipe.data)
    except DataError as error:
        missing = str(error)
        if given is None:
            return None, f"{unknown}: {missing}, or --examples N to plan for N images"
        counted, held_out = given, 0
    try:
        examples = _walked(recipe, counted)
    except DataError as error:
        return None, f"{unknown}: {error}"
    if missing is None:
        return examples, f"{examples:,} training images, {held_out:,} held out"
    share = "" if examples == counted else f" of {counted:,}"
    return examples, f"{examples:,} training images{share}, as given; {missing}"


def _walked(recipe: AnyStage, examples: int) -> int:
    """Count the images that a stage trains on: those with labels where only labels can teach."""
    if isinstance(recipe, LinearRecipe | FinetuneRecipe | SupervisedRecipe):
        return _labelled(recipe, examples)
    return examples


def _labelled(recipe: LinearRecipe | FinetuneRecipe | SupervisedRecipe, examples: int) -> int:
    from bigsimclr.data.subsets import read_list

    labels = recipe.labels
    if labels.list is not None:
        return len(read_list(labels.list))
    if labels.percent is not None:
        return max(1, int(examples * labels.percent / 100.0 + 1e-9))
    classes = count_classes(recipe.data)
    if classes is None:
        classes = len(build_data(recipe.data).train.classes)
    return (labels.per_class or 0) * classes

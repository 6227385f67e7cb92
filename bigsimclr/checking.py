"""What `bigsimclr check` says: recipes resolved, images counted, plans made; nothing is started."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bigsimclr.data import build_data, count_examples
from bigsimclr.errors import DataError, RecipeError
from bigsimclr.recipe import find_recipe, is_pipeline, load_recipe, parse_overrides, recipe_text
from bigsimclr.recipe.pipeline import plan_pipeline
from bigsimclr.recipe.plan import describe
from bigsimclr.recipe.schema import (
    AnyStage,
    FinetuneRecipe,
    LinearRecipe,
    PipelineRecipe,
    PretrainRecipe,
    SupervisedRecipe,
)
from bigsimclr.recipe.sections import DigitsData


@dataclass(frozen=True)
class CheckedRun:
    """One run that a recipe asks for, and what it means here."""

    path: str  # relative to the pipeline's directory; empty for a single stage
    recipe: AnyStage
    rows: tuple[tuple[str, str], ...]  # topic and text

    def as_facts(self) -> dict[str, object]:
        """Return the resolved recipe and the plan as plain JSON values."""
        return {
            "run": self.path or None,
            "stage": self.recipe.stage,
            "recipe": self.recipe.model_dump(mode="json"),
            "plan": dict(self.rows),
        }


def check_recipe(name: str, changes: Sequence[str], *, world_size: int = 1) -> list[CheckedRun]:
    """Resolve a recipe and count its images; a pipeline gives one entry for each of its runs.

    Args:
        name: a recipe file, or a name that `bigsimclr recipes` lists.
        changes: `key=value` texts.
        world_size: number of ranks to plan for.

    Raises:
        RecipeError: the recipe or its numbers cannot be used.
    """
    source = find_recipe(name)
    loaded = load_recipe(source, () if is_pipeline(source) else changes)
    if not isinstance(loaded, PipelineRecipe):
        return [CheckedRun("", loaded, (*_rows("", loaded, world_size), *_parent_row(loaded)))]
    runs = plan_pipeline(
        loaded, source=source, overrides=parse_overrides(changes), directory=Path()
    )
    return [CheckedRun(r.path, r.recipe, _rows(r.path, r.recipe, world_size)) for r in runs]


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
        alike.setdefault((step, "; ".join(facts)), []).append(run.path)
    return "\n".join(
        f"{paths[0]}{f' (and {len(paths) - 1} more)' if len(paths) > 1 else ''}: {facts}"
        for (_, facts), paths in alike.items()
    )


def _parent_row(recipe: AnyStage) -> list[tuple[str, str]]:
    if isinstance(recipe, PretrainRecipe | SupervisedRecipe) or recipe.parent is not None:
        return []
    return [("parent", "not given; needed to run: parent=DIR")]


def _rows(path: str, recipe: AnyStage, world_size: int) -> tuple[tuple[str, str], ...]:
    examples: int | None = None
    held_out: int | None = None
    missing = ""
    try:
        examples, held_out = count_examples(recipe.data)
        examples = _walked(recipe, examples)
    except DataError as error:
        examples, missing = None, str(error)
    try:
        rows = describe(recipe, examples=examples, held_out=held_out, world_size=world_size)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}" if path else str(error)) from None
    return (("data", f"steps are not known: {missing}"), *rows[1:]) if missing else tuple(rows)


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
    if isinstance(recipe.data, DigitsData):
        classes = 10
    else:
        classes = len(build_data(recipe.data).train.classes)
    return (labels.per_class or 0) * classes

"""Rules of pipelines that follow from the pipeline's own text: names, parents, keys and grids."""

from collections.abc import Collection

from bigsimclr.recipe.keys import nearest
from bigsimclr.recipe.schema import PipelineRecipe, PipelineStep

_TRAINED = ("pretrain", "finetune", "supervised", "distill")

PARENTS = {
    "linear": _TRAINED,
    "knn": _TRAINED,
    "finetune": ("pretrain",),
    "distill": ("finetune", "supervised", "distill", "linear"),
}
"""The stages whose runs a stage builds on; a stage that is missing here takes no parent."""


def step_breaches(recipe: PipelineRecipe) -> list[tuple[str, str]]:
    """List the rules across steps that a pipeline breaks, as (dotted key, message)."""
    breaches: list[tuple[str, str]] = []
    grids: dict[str, dict[str, tuple[int | float | str, ...]]] = {}
    for number, step in enumerate(recipe.steps):
        if step.name in grids:
            breaches.append((f"steps.{number}.name", "an earlier step has this name; rename one"))
        if step.parent is not None and step.parent not in grids:
            breaches.append((f"steps.{number}.parent", _no_step(step.parent, grids)))
        breaches += ((f"steps.{number}.{key}", text) for key, text in _decided_twice(step))
        inherited = grids.get(step.parent or "", {})
        if step.grid and inherited not in ({}, step.grid):
            text = f"differs from that of the parent '{step.parent}'; leave it out to inherit that"
            breaches.append((f"steps.{number}.grid", text))
        grids[step.name] = step.grid or inherited
    return breaches


def _no_step(name: str, earlier: Collection[str]) -> str:
    near = nearest(name, earlier)
    if near:
        hint = f"did you mean '{near}'?"
    else:
        hint = f"earlier are {', '.join(earlier)}" if earlier else "this is the first step"
    return f"no earlier step is named '{name}'; {hint}"


def _decided_twice(step: PipelineStep) -> list[tuple[str, str]]:
    """List keys of a step that something else of the step decides, as (key, message)."""
    breaches = []
    for setting in ("changes", "grid"):
        keys = step.changes if setting == "changes" else step.grid
        if "stage" in keys:
            breaches.append((setting, "stage: is the recipe's; name another recipe"))
        if "parent" in keys and step.parent is not None:
            breaches.append((setting, f"parent: the step has the parent '{step.parent}'; keep one"))
    breaches += [
        ("changes", f"{key}: the grid sets this key too; keep one")
        for key in step.changes
        if key in step.grid
    ]
    return breaches

"""What fits into memory here, for recipes that leave it to be found."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bigsimclr.engine import Objective
from bigsimclr.engine.checkpoint import Checkpoint
from bigsimclr.engine.probe import find_memory, find_micro_batch
from bigsimclr.models.anatomy import Memory
from bigsimclr.models.memory import save_memory
from bigsimclr.models.norm import frozen_running_statistics, share_batch_norm, shared_batch_norms
from bigsimclr.parallel.precision import Precision
from bigsimclr.recipe.plan import share_batch
from bigsimclr.recipe.schema import AnyTraining
from bigsimclr.recipe.sections import AdamW
from bigsimclr.world import ALONE, World


def fitting_micro_batch(
    recipe: AnyTraining,
    objective: Objective,
    resume: Checkpoint | None,
    *,
    views: int,  # random views of each image
    world: World,
) -> int | None:
    """Return the images per forward pass that a run takes where its recipe says auto.

    A run that goes on takes as many as before, so that batch norm sees as many: unless it goes on
    with another number of ranks whose share is no multiple of it.

    Args:
        recipe: the stage.
        objective: what is computed; its model is whole, on its device, and not yet sharded.
        resume: where the run goes on.
        views: random views of each image.
        world: the ranks, which all take the same number.

    Returns:
        The number; None where the recipe gives it.

    Raises:
        RecipeError: nothing fits.
    """
    if recipe.batch.micro_batch != "auto":
        return None
    rank_batch = share_batch(recipe, world_size=world.size).rank_batch
    before = None if resume is None else resume.facts.get("micro_batch")
    if isinstance(before, int) and rank_batch % before == 0:
        return before
    with _apart(objective.model):
        return find_micro_batch(_trial(recipe, objective, views, world), rank_batch, world)


def fitting_memory(
    recipe: AnyTraining,
    objective: Objective,
    *,
    views: int,  # random views of each image
    world: World,
) -> Memory:
    """Return how a run saves memory: what its recipe says, or where it says auto, what fits.

    A run that goes on may find another way, which changes no number.

    Args:
        recipe: the stage.
        objective: what is computed; its model is whole, on its device, and not yet sharded.
        views: random views of each image.
        world: the ranks, which all take the same.
    """
    wanted = recipe.parallel.memory
    if wanted != "auto":
        return wanted
    if world.device.type == "cpu":
        return "none"  # a host promises more than it has, and ends the process
    images = share_batch(recipe, world_size=world.size).micro_batch
    trial = _trial(recipe, objective, views, world)

    def try_one(memory: Memory) -> None:
        save_memory(objective.model, memory)
        trial(images)

    with _apart(objective.model):
        return find_memory(try_one, world)


def _trial(
    recipe: AnyTraining, objective: Objective, views: int, world: World
) -> Callable[[int], None]:
    """Return what passes so many images forward and backward, and leaves nothing behind."""
    model, size = objective.model, recipe.augment.image_size
    precision = Precision(world.device, recipe.parallel.precision)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moments = 2 if isinstance(recipe.optimizer, AdamW) else 1

    def pass_images(images: int) -> None:
        held = [torch.empty_like(p) for p in trained for _ in range(moments)]
        blank = torch.zeros(images * views, 3, size, size, device=world.device)
        try:
            with frozen_running_statistics(model), precision.compute():
                rows = objective.embed(blank)
            rows.float().square().sum().backward()
        finally:
            held.clear()
            for parameter in trained:
                parameter.grad = None

    return pass_images


@contextmanager
def _apart(model: nn.Module) -> Iterator[None]:
    """Let batch norm speak to no other rank: one without memory must not leave others waiting."""
    shared = shared_batch_norms(model)
    share_batch_norm(model, ALONE)
    try:
        yield
    finally:
        for norm, ranks in shared.items():
            norm.world = ranks

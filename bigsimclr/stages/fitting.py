"""How many images fit into a forward pass here, for recipes that leave it to be found."""

import torch

from bigsimclr.engine import Objective
from bigsimclr.engine.checkpoint import Checkpoint
from bigsimclr.engine.probe import find_micro_batch
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
    model, size = objective.model, recipe.augment.image_size
    precision = Precision(world.device, recipe.parallel.precision)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def try_one(images: int) -> None:
        moments = 2 if isinstance(recipe.optimizer, AdamW) else 1
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

    # A rank without memory must not leave the others waiting in a collective.
    shared = shared_batch_norms(model)
    share_batch_norm(model, ALONE)
    try:
        return find_micro_batch(try_one, rank_batch, world)
    finally:
        for norm, ranks in shared.items():
            norm.world = ranks

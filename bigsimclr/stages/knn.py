"""Nearest-neighbour evaluation of frozen features.

Source: Wu et al. 2018, arXiv 1805.01978 (votes weighted by exp(cosine / 0.1)).
"""

from bigsimclr.errors import DataError
from bigsimclr.recipe.schema import KnnRecipe
from bigsimclr.stages.evaluate import neighbour_accuracy
from bigsimclr.stages.inputs import Inputs, open_inputs
from bigsimclr.stages.load import load_parent
from bigsimclr.stages.run_directory import RunDirectory
from bigsimclr.world import World


def evaluate_neighbours(
    recipe: KnnRecipe, *, world: World, run: RunDirectory
) -> tuple[dict[str, float], Inputs]:
    """Let the labelled training images vote on the held-out images.

    Raises:
        DataError: there are no held-out images.
    """
    parent = load_parent(recipe.parent, stages=("pretrain",))
    inputs = open_inputs(
        recipe,
        labels=recipe.labels,
        walk="labelled",
        directory=run.path,
        device=world.device,
    )
    if inputs.held_out is None:
        raise DataError("knn needs held-out images; set data.held_out or data.held_out_fraction")
    run.describe(recipe, {"examples": len(inputs.indices), "neighbours": recipe.neighbours})
    values = neighbour_accuracy(
        parent.model.to(world.device),
        inputs,
        neighbours=recipe.neighbours,
        from_layer=recipe.from_layer,
        batch_size=recipe.batch_size,
    )
    return values, inputs

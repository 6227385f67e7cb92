"""Nearest-neighbour evaluation of frozen features.

Source: Wu et al. 2018, arXiv 1805.01978 (votes weighted by exp(cosine / 0.1)).
"""

from dataclasses import dataclass

from bigsimclr.engine.stop import StopRequest
from bigsimclr.errors import DataError
from bigsimclr.recipe.schema import KnnRecipe
from bigsimclr.stages.evaluate import labelled_held_out, neighbour_accuracy
from bigsimclr.stages.inputs import Inputs, open_inputs
from bigsimclr.stages.load import Loaded, check_layer, load_parent
from bigsimclr.stages.run_directory import ActiveRun
from bigsimclr.world import World


@dataclass(frozen=True)
class Measured:
    """What an evaluation found, and of what."""

    accuracy: float
    inputs: Inputs
    parent: Loaded


def evaluate_neighbours(
    recipe: KnnRecipe, *, world: World, run: ActiveRun, stop: StopRequest
) -> Measured:
    """Let the labelled training images vote on the held-out images.

    Raises:
        DataError: there are no held-out images.
    """
    with world.together():
        parent = load_parent(recipe)
        check_layer(recipe.from_layer, parent)
    inputs = open_inputs(
        recipe,
        labels=recipe.labels,
        walk="labelled",
        world=world,
        stop=stop,
    )
    if not labelled_held_out(inputs).size:
        raise DataError(
            "knn needs labelled held-out images; set data.held_out or data.held_out_fraction"
        )
    facts = {"examples": len(inputs.indices), "neighbours": recipe.neighbours}
    with world.together():
        if world.rank == 0:
            run.fence()
            run.directory.describe(recipe, facts, labels=inputs.label_names)
    values = neighbour_accuracy(
        parent.model.to(world.device),
        inputs,
        neighbours=recipe.neighbours,
        from_layer=recipe.from_layer,
        batch_size=recipe.batch_size,
    )
    return Measured(values["knn/accuracy"], inputs, parent)

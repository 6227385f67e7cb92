"""Everything that follows from a recipe, the number of images and the world size.

The recipe says what is wanted and is never written to; the plan says what that means here.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from bigsimclr.errors import RecipeError
from bigsimclr.recipe.schema import (
    AnyStage,
    AnyTraining,
    DistillRecipe,
    KnnRecipe,
    LinearRecipe,
    PretrainRecipe,
    SupervisedRecipe,
)

Update = Literal["direct", "accumulated", "cached"]


@dataclass(frozen=True)
class BatchShares:
    """How the images of one update are spread; known before any image is counted."""

    rank_batch: int  # images per update on one rank
    micro_batch: int  # images per forward pass on one rank
    update: Update


@dataclass(frozen=True)
class Plan:
    """Derived numbers of one training stage."""

    world_size: int
    examples: int  # training images the stage walks through
    global_batch: int  # images per update over all ranks
    rank_batch: int  # images per update on one rank
    micro_batch: int  # images per forward pass on one rank
    update: Update
    steps: int  # updates in the whole run
    warmup_steps: int
    peak_learning_rate: float  # after scaling by the global batch
    negatives: int | None  # other views each view is compared with; contrastive stages only
    chance_loss: float | None  # nats; the loss of features that carry nothing, on the same scale

    @property
    def steps_per_epoch(self) -> float:
        """Updates per pass over the training images."""
        return self.examples / self.global_batch

    def as_facts(self) -> dict[str, object]:
        """Return the plan as plain JSON values."""
        return {**dataclasses.asdict(self), "steps_per_epoch": self.steps_per_epoch}


def total_steps(examples: int, epochs: float, global_batch: int) -> int:
    """Count the updates of a run.

    Source: google-research/simclr model_util.py get_train_steps.
    """
    return int(examples * epochs // global_batch) + 1


def warmup_steps(examples: int, warmup_epochs: float, global_batch: int) -> int:
    """Count the updates of the warm-up; the division rounds down before the rounding.

    Source: google-research/simclr model_util.py learning_rate_schedule.
    """
    return round(warmup_epochs * examples // global_batch)


def scaled_rate(
    base: float, scaling: Literal["none", "linear", "sqrt"], global_batch: int
) -> float:
    """Scale a base learning rate by the global batch.

    Source: google-research/simclr model_util.py learning_rate_schedule.
    """
    if scaling == "linear":
        return base * global_batch / 256
    if scaling == "sqrt":
        return base * math.sqrt(global_batch)
    return base


def chance_loss(pairs: int, queue_length: int = 0) -> float:
    """Return the NT-Xent loss of views that all look alike, in nats, summed over two directions."""
    return 2.0 * math.log(2 * pairs - 1 + queue_length)


def rule_breaches(recipe: AnyStage) -> list[tuple[str, str]]:
    """List the rules across sections that a recipe breaks, as (dotted key, message)."""
    if isinstance(recipe, KnnRecipe):
        return []
    breaches = _batch_breaches(recipe)
    if isinstance(recipe, SupervisedRecipe | DistillRecipe) and (
        recipe.from_layer > recipe.head.layers
    ):
        breaches.append(
            ("from_layer", f"{recipe.from_layer} is beyond the {recipe.head.layers} head layers")
        )
    if isinstance(recipe, DistillRecipe):
        if recipe.labelled_weight > 0 and recipe.batch.update == "accumulated":
            breaches.append(
                ("batch.update", "accumulated is not exact for a labelled mix; use cached")
            )
        if recipe.labelled_weight > 0 and recipe.labels is None:
            breaches.append(("labelled_weight", "needs a labels section to mix in"))
        if recipe.labelled_weight == 0 and recipe.labels is not None:
            breaches.append(("labels", "has no effect while labelled_weight is 0"))
    return breaches


def _batch_breaches(recipe: AnyTraining) -> list[tuple[str, str]]:
    batch = recipe.batch
    breaches: list[tuple[str, str]] = []
    if isinstance(recipe, PretrainRecipe) and batch.global_batch < 2:
        breaches.append(("batch.global_batch", "a contrastive loss needs 2 images at least"))
    elif not isinstance(recipe, PretrainRecipe | LinearRecipe) and 1 in (
        batch.global_batch,
        batch.micro_batch,
    ):
        breaches.append(("batch", "batch norm needs 2 images in every forward pass at least"))
    if batch.update == "accumulated" and isinstance(recipe, PretrainRecipe):
        micro = batch.micro_batch or max(batch.global_batch // 2, 1)
        breaches.append(
            (
                "batch.update",
                "accumulated is not offered for a contrastive loss: with micro-batches of "
                f"{micro} every view would meet {2 * micro - 2} negatives instead of "
                f"{2 * batch.global_batch - 2}; use cached, which gives the loss and gradient of "
                "the whole batch",
            )
        )
    if batch.micro_batch is not None and batch.micro_batch > batch.global_batch:
        breaches.append(
            ("batch.micro_batch", f"{batch.micro_batch} is larger than the global batch")
        )
    elif batch.micro_batch is not None and batch.global_batch % batch.micro_batch:
        breaches.append(
            (
                "batch.micro_batch",
                f"global_batch {batch.global_batch} is not a multiple of {batch.micro_batch}",
            )
        )
    elif batch.update == "direct" and batch.micro_batch not in (None, batch.global_batch):
        breaches.append(("batch.update", "direct takes the whole batch at once; drop micro_batch"))
    return breaches


def share_batch(recipe: AnyTraining, *, world_size: int = 1) -> BatchShares:
    """Spread the images of one update over ranks and forward passes.

    Raises:
        RecipeError: the numbers do not fit together; the message names the key.
    """
    for key, message in rule_breaches(recipe):
        raise RecipeError(f"{key}: {message}")
    batch = recipe.batch
    if batch.global_batch % world_size:
        near = max(1, round(batch.global_batch / world_size)) * world_size
        raise RecipeError(
            f"batch.global_batch: {batch.global_batch} is not a multiple of {world_size} ranks; "
            f"nearest is {near}"
        )
    rank_batch = batch.global_batch // world_size
    micro_batch = min(batch.micro_batch or rank_batch, rank_batch)
    if rank_batch % micro_batch:
        raise RecipeError(
            f"batch.micro_batch: {rank_batch} images per rank are not a multiple of {micro_batch}"
        )
    update = _choose_update(recipe, whole=micro_batch == rank_batch)
    return BatchShares(rank_batch, micro_batch, update)


def make_plan(recipe: AnyTraining, *, examples: int, world_size: int = 1) -> Plan:
    """Derive the plan of a training stage.

    Args:
        recipe: the stage.
        examples: number of training images the stage walks through.
        world_size: number of ranks.

    Raises:
        RecipeError: the numbers do not fit together; the message names the key.
    """
    shares, batch = share_batch(recipe, world_size=world_size), recipe.batch
    contrastive = recipe if isinstance(recipe, PretrainRecipe) else None
    if contrastive is not None and examples < batch.global_batch:
        raise RecipeError(
            f"batch.global_batch: {examples} images cannot fill a batch of {batch.global_batch} "
            f"without repeating an image as its own negative; try batch.global_batch="
            f"{_power_of_two_below(examples)}"
        )
    queue = 0 if contrastive is None else _queue_length(contrastive)
    if queue and queue > examples - batch.global_batch:
        raise RecipeError(
            f"loss.queue.length: {queue:,} past projections of {examples:,} images would hold "
            "views of an image as its own negatives; at most "
            f"loss.queue.length={max(examples - batch.global_batch, 0)}"
        )
    schedule = recipe.schedule
    steps = schedule.steps or total_steps(examples, schedule.epochs or 0.0, batch.global_batch)
    warmup = warmup_steps(examples, schedule.warmup_epochs, batch.global_batch)
    if warmup >= steps:
        raise RecipeError(
            f"schedule.warmup_epochs: the warm-up of {warmup} updates is not shorter than the run "
            f"of {steps}"
        )
    return Plan(
        world_size=world_size,
        examples=examples,
        global_batch=batch.global_batch,
        rank_batch=shares.rank_batch,
        micro_batch=shares.micro_batch,
        update=shares.update,
        steps=steps,
        warmup_steps=warmup,
        peak_learning_rate=scaled_rate(
            recipe.optimizer.learning_rate, recipe.optimizer.rate_scaling, batch.global_batch
        ),
        negatives=_negatives(batch.global_batch, queue) if contrastive is not None else None,
        chance_loss=chance_loss(batch.global_batch, queue) if contrastive is not None else None,
    )


def _choose_update(recipe: AnyTraining, *, whole: bool) -> Update:
    if recipe.batch.update != "auto":
        return recipe.batch.update
    if whole:
        return "direct"
    mixed = isinstance(recipe, DistillRecipe) and recipe.labelled_weight > 0
    return "cached" if isinstance(recipe, PretrainRecipe) or mixed else "accumulated"


def _power_of_two_below(number: int) -> int:
    return 1 << (max(number, 1).bit_length() - 1)


def describe(
    recipe: AnyStage, *, examples: int | None, world_size: int = 1
) -> list[tuple[str, str]]:
    """Say in words what a stage will do, as (topic, text) rows.

    Args:
        recipe: the stage.
        examples: number of training images; None where the data are not at hand.
        world_size: number of ranks.

    Raises:
        RecipeError: as `make_plan`.
    """
    if isinstance(recipe, KnnRecipe):
        return [("knn", f"{recipe.neighbours} neighbours, head layer {recipe.from_layer}")]
    rows = [_batch_row(recipe, world_size)]
    if examples is not None:
        plan = make_plan(recipe, examples=examples, world_size=world_size)
        text = (
            f"{plan.steps:,} updates of {plan.global_batch:,} images "
            f"({plan.steps / plan.steps_per_epoch:.1f} epochs), {plan.warmup_steps:,} warm-up"
        )
        rows.insert(0, ("steps", text))
    batch, optimizer = recipe.batch.global_batch, recipe.optimizer
    if isinstance(recipe, PretrainRecipe):
        queue = _queue_length(recipe)
        rows.append(("negatives", f"{_negatives(batch, queue):,} for every view"))
        rows.append(("chance loss", f"{chance_loss(batch, queue):.3f} nats, both directions"))
    peak = scaled_rate(optimizer.learning_rate, optimizer.rate_scaling, batch)
    text = (
        f"{peak:.6g} ({optimizer.kind}, {optimizer.learning_rate:g}, "
        f"scaling {optimizer.rate_scaling}), then cosine to 0"
    )
    return [*rows, ("learning rate", text)]


def _queue_length(recipe: PretrainRecipe) -> int:
    return 0 if recipe.loss.queue is None else recipe.loss.queue.length


def _negatives(global_batch: int, queue: int) -> int:
    return 2 * global_batch - 2 + queue


def _batch_row(recipe: AnyTraining, world_size: int) -> tuple[str, str]:
    shares = share_batch(recipe, world_size=world_size)
    return (
        "batch",
        f"{recipe.batch.global_batch:,} = {world_size} rank{'s' * (world_size > 1)} "
        f"x {shares.rank_batch:,}; micro-batch {shares.micro_batch:,}, update {shares.update}",
    )

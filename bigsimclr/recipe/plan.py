"""Everything that follows from a recipe, the number of images and the world size.

The recipe says what is wanted and is never written to; the plan says what that means here.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Final, Literal

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
from bigsimclr.recipe.strategies import ParallelSection

Update = Literal["direct", "accumulated", "cached"]

_NO_TWO_PASSES: Final = (
    "two_pass would make every layer's statistics wait for all images, so that their backward pass "
    "keeps all blocks' inputs of the whole batch: exactly what parallel.memory=block without "
    "batch.micro_batch keeps, which is exact and offered"
)


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
    breaches = _parallel_breaches(recipe.parallel)
    if isinstance(recipe, KnnRecipe):
        return breaches
    breaches += _batch_breaches(recipe)
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


def _parallel_breaches(parallel: ParallelSection) -> list[tuple[str, str]]:
    breaches: list[tuple[str, str]] = []
    if not parallel.reshard and parallel.strategy != "fsdp2":
        breaches.append(
            (
                "parallel.reshard",
                f"{parallel.strategy} gathers no parameters that could stay; false is for "
                "parallel.strategy=fsdp2",
            )
        )
    if parallel.gradient_exchange == "bf16" and parallel.strategy not in {"ddp", "zero1"}:
        breaches.append(
            (
                "parallel.gradient_exchange",
                f"{parallel.strategy} adds gradients up in its own type; bf16 is for "
                "parallel.strategy=ddp or zero1",
            )
        )
    if parallel.cuda_graph and parallel.strategy not in {"ddp", "zero1"}:
        breaches.append(
            (
                "parallel.cuda_graph",
                f"{parallel.strategy} moves parameters while it computes; true is for "
                "parallel.strategy=ddp or zero1",
            )
        )
    if parallel.cuda_graph and parallel.precision == "fp16":
        breaches.append(
            (
                "parallel.cuda_graph",
                "a graph cannot follow the loss scale of fp16; use parallel.precision=bf16",
            )
        )
    if parallel.offload and not parallel.strategy.startswith("deepspeed_"):
        breaches.append(
            (
                "parallel.offload",
                f"{parallel.strategy} keeps the optimizer state on the device; true is for "
                "parallel.strategy=deepspeed_zero1, 2 or 3",
            )
        )
    return breaches


def _batch_breaches(recipe: AnyTraining) -> list[tuple[str, str]]:
    batch = recipe.batch
    given = None if batch.micro_batch == "auto" else batch.micro_batch
    breaches: list[tuple[str, str]] = []
    if isinstance(recipe, PretrainRecipe) and batch.global_batch < 2:
        breaches.append(("batch.global_batch", "a contrastive loss needs 2 images at least"))
    elif not isinstance(recipe, PretrainRecipe | LinearRecipe) and 1 in (
        batch.global_batch,
        given,
    ):
        breaches.append(("batch", "batch norm needs 2 images in every forward pass at least"))
    if batch.update == "accumulated" and isinstance(recipe, PretrainRecipe):
        micro = max(batch.global_batch // 2, 1) if given is None else given
        breaches.append(
            (
                "batch.update",
                "accumulated is not offered for a contrastive loss: with micro-batches of "
                f"{micro} every view would meet {2 * micro - 2} negatives instead of "
                f"{2 * batch.global_batch - 2}; use cached, which gives the loss and gradient of "
                "the whole batch",
            )
        )
    if batch.batch_norm == "two_pass" and (
        batch.update in ("accumulated", "cached") or batch.micro_batch == "auto"
    ):
        breaches.append(("batch.batch_norm", _NO_TWO_PASSES))
    if given is not None and given > batch.global_batch:
        breaches.append(("batch.micro_batch", f"{given} is larger than the global batch"))
    elif given is not None and batch.global_batch % given:
        breaches.append(
            (
                "batch.micro_batch",
                f"global_batch {batch.global_batch} is not a multiple of {given}",
            )
        )
    elif batch.update == "direct" and batch.micro_batch not in (None, batch.global_batch):
        breaches.append(("batch.update", "direct takes the whole batch at once; drop micro_batch"))
    return breaches


def share_batch(
    recipe: AnyTraining, *, world_size: int = 1, micro_batch: int | None = None
) -> BatchShares:
    """Spread the images of one update over ranks and forward passes.

    Args:
        recipe: the stage.
        world_size: number of ranks.
        micro_batch: images per forward pass that were found to fit, where the recipe says auto;
            None plans for the rank's whole share there.

    Raises:
        RecipeError: the numbers do not fit together; the message names the key.
    """
    for key, message in rule_breaches(recipe):
        raise RecipeError(f"{key}: {message}")
    batch, group = recipe.batch, recipe.parallel.sync_group_size
    if batch.global_batch % world_size:
        near = max(1, round(batch.global_batch / world_size)) * world_size
        raise RecipeError(
            f"batch.global_batch: {batch.global_batch} is not a multiple of {world_size} ranks; "
            f"nearest is {near}"
        )
    if group is not None and world_size % group:
        fits = next(n for n in range(min(group, world_size), 0, -1) if world_size % n == 0)
        raise RecipeError(
            f"parallel.sync_group_size: {world_size} ranks do not make groups of {group}; "
            f"parallel.sync_group_size={fits} does"
        )
    rank_batch = batch.global_batch // world_size
    wanted = micro_batch if batch.micro_batch == "auto" else batch.micro_batch
    taken = rank_batch if wanted is None else min(wanted, rank_batch)
    if rank_batch % taken:
        raise RecipeError(
            f"batch.micro_batch: {rank_batch} images per rank are not a multiple of {taken}"
        )
    if taken * (world_size if group is None else group) == 1 and not isinstance(
        recipe, LinearRecipe
    ):
        # Of two values batch norm makes +1 and -1: an image's two views come out opposite.
        key = "batch.global_batch" if rank_batch == 1 else "batch.micro_batch"
        raise RecipeError(f"{key}: batch norm needs 2 images in every forward pass at least")
    update = _choose_update(recipe, whole=taken == rank_batch)
    if batch.batch_norm == "two_pass":
        if update != "direct":
            raise RecipeError(f"batch.batch_norm: {_NO_TWO_PASSES}")
        if group not in (None, world_size):
            raise RecipeError(
                "batch.batch_norm: two_pass takes the images of all ranks; drop "
                "parallel.sync_group_size"
            )
    return BatchShares(rank_batch, taken, update)


def make_plan(
    recipe: AnyTraining, *, examples: int, world_size: int = 1, micro_batch: int | None = None
) -> Plan:
    """Derive the plan of a training stage.

    Args:
        recipe: the stage.
        examples: number of training images the stage walks through.
        world_size: number of ranks.
        micro_batch: as in `share_batch`.

    Raises:
        RecipeError: the numbers do not fit together; the message names the key.
    """
    shares = share_batch(recipe, world_size=world_size, micro_batch=micro_batch)
    batch = recipe.batch
    contrastive = recipe if isinstance(recipe, PretrainRecipe) else None
    if contrastive is not None and examples < 2:
        raise RecipeError("data: a contrastive loss needs 2 images at least, and there is one")
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
    pieces = f"micro-batch {shares.micro_batch:,}, update {shares.update}"
    if recipe.batch.micro_batch == "auto":
        pieces = f"micro-batch as large as fits, at most {shares.micro_batch:,}"
    return (
        "batch",
        f"{recipe.batch.global_batch:,} = {world_size} rank{'s' * (world_size > 1)} "
        f"x {shares.rank_batch:,}; {pieces}",
    )

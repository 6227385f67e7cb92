"""What a training stage costs, in numbers and in words.

The memory of one rank is estimated from exact counts:

* Weights, gradients, moments and batch norm's statistics in float32, in every precision: autocast
  makes 16-bit copies of the weights, counted as all there at once, as at the end of a forward pass.
  There is no other copy of the weights.
* What a strategy shards, in even parts. fsdp2 and deepspeed_zero3 gather the largest unit beside
  that, a residual block or the head: its weights, its gradient, and the weights of the next one.
* The views of one forward pass: what each keeps until its backward pass, and what computing one
  block again adds to that (`models.cost`).

On top come images, loss, communication buffers, workspaces and fragmentation.
"""

from dataclasses import dataclass

from bigsimclr.errors import RecipeError
from bigsimclr.models import Architecture
from bigsimclr.models.anatomy import Memory
from bigsimclr.models.cost import Cost, cost
from bigsimclr.recipe.plan import Update, share_batch
from bigsimclr.recipe.schema import AnyTraining, DistillRecipe, LinearRecipe, PretrainRecipe
from bigsimclr.recipe.sections import AdamW
from bigsimclr.recipe.strategies import StrategyName

_FLOAT_BYTES = 4  # weights, gradients, moments and statistics are float32 in every precision
_COPY_BYTES = 2  # autocast's 16-bit copy of a weight, kept for the backward pass
_GATHERED_AT_ONCE = 3  # weights and gradient of one unit, and the weights of the next
_HELD_AT_ONCE = 4  # the largest activations that inference holds at a time; measured: 3.5 to 5


@dataclass(frozen=True)
class StageCost:
    """What one training stage costs."""

    network: Cost
    teacher: Cost | None  # distillation only; None where it is not at hand
    update: Update
    views: int  # in one forward pass of one rank
    update_flops: int  # one update on all ranks, with a teacher's or an averaged copy's part
    steps: int | None  # updates of the run; None where they are not known
    state_bytes: int  # per rank: weights, gradients, moments, a teacher or an averaged copy
    view_bytes: int  # activations of one view, while it is computed or in its backward pass

    @property
    def total_flops(self) -> int | None:
        """Return the FLOPs of the whole run."""
        return None if self.steps is None else self.update_flops * self.steps

    @property
    def memory_bytes(self) -> int:
        """Return the estimated memory of one rank."""
        return self.state_bytes + self.views * self.view_bytes

    def as_facts(self) -> dict[str, int | None]:
        """Return the numbers as plain JSON values."""
        network = self.network
        return {
            "backbone_parameters": network.backbone.parameters,
            "backbone_statistics": network.backbone.statistics,
            "head_parameters": network.head.parameters,
            "head_statistics": network.head.statistics,
            "classifier_parameters": network.classifier.parameters,
            "forward_flops": network.total.flops,
            "update_flops": self.update_flops,
            "total_flops": self.total_flops,
            "activation_bytes": self.view_bytes,
            "state_bytes": self.state_bytes,
            "memory_bytes": self.memory_bytes,
        }


def stage_cost(
    recipe: AnyTraining,
    network: Architecture,
    teacher: Architecture | None,  # distillation only; None where it is not at hand
    *,
    world_size: int,
    steps: int | None,
) -> StageCost:
    """Count what a training stage costs.

    Raises:
        RecipeError: no network of this width exists, or the batch cannot be shared.
    """
    shares = share_batch(recipe, world_size=world_size)
    own = network_cost(recipe, network, lever_of(recipe))
    taught_by = None
    if teacher is not None:
        precision, size = recipe.parallel.precision, recipe.augment.image_size
        taught_by = cost(teacher, image_size=size, precision=precision, frozen=True)
    image_flops = _image_flops(recipe, own, taught_by, is_cached=shares.update == "cached")
    return StageCost(
        network=own,
        teacher=taught_by,
        update=shares.update,
        views=shares.micro_batch * views_of(recipe),
        update_flops=recipe.batch.global_batch * image_flops,
        steps=steps,
        state_bytes=state_bytes(
            recipe, own, taught_by, strategy=recipe.parallel.strategy, world_size=world_size
        ),
        view_bytes=view_bytes(recipe, own),
    )


def lever_of(recipe: AnyTraining) -> Memory:
    """Return how a stage saves memory; nothing where it is left to what a GPU has."""
    memory = recipe.parallel.memory
    return "none" if memory == "auto" else memory


def network_cost(recipe: AnyTraining, network: Architecture, memory: Memory) -> Cost:
    """Count what the network of a stage costs, with one way to save memory.

    Raises:
        RecipeError: no network of this width exists.
    """
    try:
        return cost(
            network,
            image_size=recipe.augment.image_size,
            precision=recipe.parallel.precision,
            frozen=isinstance(recipe, LinearRecipe),
            memory=memory,
        )
    except ValueError as error:
        raise RecipeError(f"backbone: {error}") from None


def views_of(recipe: AnyTraining) -> int:
    """Count the views that a stage makes of one image."""
    return 2 if isinstance(recipe, PretrainRecipe) else 1


def view_bytes(recipe: AnyTraining, own: Cost) -> int:
    """Estimate the activations of one view."""
    held = own.total.activation_bytes + own.again_bytes
    if isinstance(recipe, LinearRecipe):
        held += _HELD_AT_ONCE * own.largest_activation_bytes
    return held


def state_bytes(
    recipe: AnyTraining,
    own: Cost,
    teacher: Cost | None,
    *,
    strategy: StrategyName,
    world_size: int,
) -> int:
    """Estimate the memory of one rank that does not grow with the views."""
    whole, parallel = own.total, recipe.parallel
    trained = own.classifier if isinstance(recipe, LinearRecipe) else whole
    weights, gradients = whole.parameters, trained.parameters
    moments = (2 if isinstance(recipe.optimizer, AdamW) else 1) * trained.parameters
    floats = whole.statistics
    if strategy in ("fsdp2", "deepspeed_zero3"):
        unit = max(own.largest_block_parameters, own.head.parameters)
        stays = strategy == "fsdp2" and not parallel.reshard
        floats += weights + unit if stays else _GATHERED_AT_ONCE * unit
        weights = _share(weights, world_size)
    if strategy in ("fsdp2", "deepspeed_zero3", "deepspeed_zero2"):
        gradients = _share(gradients, world_size)
    if strategy.startswith("deepspeed_") and parallel.offload:
        moments = 0
    elif strategy != "ddp":
        moments = _share(moments, world_size)
    floats += weights + gradients + moments
    if isinstance(recipe, PretrainRecipe) and recipe.loss.queue is not None:
        floats += whole.parameters + whole.statistics
        floats += recipe.loss.queue.length * recipe.head.output_width
    if teacher is not None:
        floats += teacher.total.parameters + teacher.total.statistics
    copies = 0 if parallel.precision == "fp32" else _COPY_BYTES * trained.parameters
    return _FLOAT_BYTES * floats + copies


def _share(numbers: int, world_size: int) -> int:
    return -(-numbers // world_size)


def cost_rows(
    recipe: AnyTraining, found: StageCost, *, lacks_classifier: bool
) -> list[tuple[str, str]]:
    """Say in words what a stage costs, as (topic, text) rows."""
    return [
        ("parameters", _parameters_text(found.network, lacks_classifier=lacks_classifier)),
        ("compute", _compute_text(recipe, found)),
        ("memory", _memory_text(recipe, found)),
    ]


def si(value: float, unit: str = "") -> str:
    """Write a number with three digits and a decimal prefix."""
    prefixes = iter("kMGTPEZY")
    prefix = ""
    while value >= 999.5 and (larger := next(prefixes, None)) is not None:
        value, prefix = value / 1000, larger
    return f"{value:.3g} {prefix}{unit}".rstrip()


def _image_flops(recipe: AnyTraining, own: Cost, teacher: Cost | None, *, is_cached: bool) -> int:
    """Count the FLOPs of one image in one update; a backward pass counts as two forward ones."""
    forward = own.total.flops
    # Gradient caching passes forward twice; blocks may be passed again in the backward pass.
    update = (3 + is_cached) * forward + own.again_flops
    match recipe:
        case LinearRecipe():
            return forward + 2 * own.classifier.flops
        case PretrainRecipe():
            # The queue takes what the averaged copy makes of the second view.
            return 2 * update + (forward if recipe.loss.queue is not None else 0)
        case _:
            taught = 0 if teacher is None else (1 + is_cached) * teacher.total.flops
            return update + taught


def _parameters_text(network: Cost, *, lacks_classifier: bool) -> str:
    backbone = network.backbone
    texts = [
        f"{si(network.total.parameters)}: backbone {si(backbone.parameters)} "
        f"({si(backbone.parameters + backbone.statistics)} with batch norm's statistics, as the "
        "paper counts)"
    ]
    if network.head.parameters:
        texts.append(f"head {si(network.head.parameters)}")
    if network.classifier.parameters:
        texts.append(f"classifier {si(network.classifier.parameters)}")
    elif lacks_classifier:
        texts.append("the classifier not counted, as its classes are not known here")
    return ", ".join(texts)


def _compute_text(recipe: AnyTraining, found: StageCost) -> str:
    match recipe:
        case LinearRecipe():
            how = "backward in the classifier alone"
        case _ if found.update == "cached":
            how = "x 4 with the backward pass and cached's second forward pass"
        case _:
            how = "x 3 with the backward pass"
    if isinstance(recipe, DistillRecipe):
        known = found.teacher is not None
        how += ", and the teacher's forward pass" if known else ", without the unknown teacher"
    if isinstance(recipe, PretrainRecipe) and recipe.loss.queue is not None:
        how += ", and the averaged copy's forward pass"
    again = found.network.again_flops / found.network.total.flops
    if again:
        how += f", and {again:.0%} of the forward pass again"
    text = (
        f"{si(found.network.total.flops, 'FLOP')} forward per view, {how}: "
        f"{si(found.update_flops, 'FLOP')} per update"
    )
    return text if found.total_flops is None else f"{text}, {si(found.total_flops, 'FLOP')} in all"


def _memory_text(recipe: AnyTraining, found: StageCost) -> str:
    kept = "held while a view passes" if isinstance(recipe, LinearRecipe) else "kept per view"
    if found.network.again_bytes:
        kept = "kept per view or made again"
    if recipe.parallel.memory == "auto":
        kept += " unless memory=auto finds too little"
    strategy = recipe.parallel.strategy
    under = "" if strategy == "ddp" else f" under {strategy}"
    return (
        f"activations {si(found.view_bytes, 'B')} {kept}; about {si(found.memory_bytes, 'B')} per "
        f"rank: {si(found.state_bytes, 'B')} weights, gradients, moments{under} + "
        f"{si(found.views * found.view_bytes, 'B')} for {found.views:,} views; images, loss and "
        "workspaces come on top"
    )

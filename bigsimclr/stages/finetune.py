"""Training with labels: fine-tuning from a head layer, linear evaluation, and from scratch.

The three differ in where the weights come from and which of them move.

Source: Chen et al. 2020, section 2 (fine-tuning from the middle of the projection head) and 3.1;
google-research/simclr tf2/model.py. Linear evaluation freezes batch norm as the TF1 code does.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from bigsimclr.data.loader import Batch
from bigsimclr.engine import Losses, MakeViews
from bigsimclr.engine.loop import Trained
from bigsimclr.engine.stop import StopRequest
from bigsimclr.errors import DataError
from bigsimclr.losses.classify import cross_entropy
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.norm import share_batch_norm
from bigsimclr.models.simclr import SimCLR
from bigsimclr.recipe.schema import FinetuneRecipe, LinearRecipe, SupervisedRecipe
from bigsimclr.report.progress import Progress
from bigsimclr.stages.evaluate import held_out_accuracy
from bigsimclr.stages.inputs import Inputs, open_inputs
from bigsimclr.stages.load import Loaded, check_layer, load_parent
from bigsimclr.stages.run_directory import ActiveRun
from bigsimclr.stages.training import Task, plan_of, run_training
from bigsimclr.world import World

LabelRecipe = LinearRecipe | FinetuneRecipe | SupervisedRecipe


def classify(model: SimCLR, views: Tensor) -> Tensor:
    """Return the logits [N,K] of a model that has a classifier."""
    logits = model(views).logits
    if not isinstance(logits, Tensor):
        raise AssertionError("the model has no classifier")
    return logits


class Classification:
    """Cross-entropy of a classifier on labelled images."""

    separable = True

    def __init__(self, model: SimCLR, *, frozen: bool) -> None:
        self.model = model
        model.train(mode=not frozen)
        if frozen:
            model.requires_grad_(requires_grad=False)
            if model.classifier is not None:
                model.classifier.requires_grad_(requires_grad=True)

    def embed(self, views: Tensor) -> Tensor:
        """Return the logits."""
        return classify(self.model, views)

    def loss(self, rows: Tensor, batch: Batch) -> Losses:
        """Return the mean cross-entropy over the images."""
        labels = batch.labels.to(rows.device)
        hits = (rows.detach().argmax(1) == labels).float().mean()
        return Losses(cross_entropy(rows, labels), {"train/accuracy": hits})

    def after_update(
        self,
        pieces: Sequence[Batch],
        make_views: MakeViews,
        whole: Iterator[Mapping[str, Tensor]],
    ) -> None:
        """Do nothing."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return nothing: all state is in the model."""
        return {}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Do nothing."""


def train_with_labels(
    recipe: LabelRecipe, *, world: World, run: ActiveRun, progress: Progress, stop: StopRequest
) -> tuple[Trained, Task]:
    """Train a classifier: on frozen features, fine-tuned, or from scratch."""
    inputs = open_inputs(
        recipe,
        labels=recipe.labels,
        walk="labelled",
        world=world,
        stop=stop,
    )
    if len(inputs.classes) < 2:
        raise DataError(f"labels: one class ({inputs.classes[0]}) leaves nothing to tell apart")
    parent: Loaded | None = None
    if isinstance(recipe, SupervisedRecipe):
        architecture = Architecture(
            backbone=recipe.backbone,
            head=recipe.head,
            classes=len(inputs.classes),
            from_layer=recipe.from_layer,
            keep_head_layers=recipe.from_layer,
        )
        model = build_model(architecture, seed=recipe.seed)
    else:
        with world.together():
            parent = load_parent(recipe)
        architecture, model = _from_parent(recipe, parent, inputs)
    model.to(world.device)
    if not isinstance(recipe, LinearRecipe):
        share_batch_norm(model, world.neighbours(recipe.parallel.sync_group_size))
    batch_size = plan_of(recipe, inputs, world).micro_batch
    task = Task(
        objective=Classification(model, frozen=isinstance(recipe, LinearRecipe)),
        architecture=architecture,
        inputs=inputs,
        classes=inputs.classes,
        parent=parent,
        views=1,
        evaluate=lambda: held_out_accuracy(model, inputs, batch_size=batch_size),
        evaluate_every=None,
    )
    trained = run_training(
        recipe, task, world=world, run=run, progress=progress, stop=stop, title=recipe.stage
    )
    return trained, task


def _from_parent(
    recipe: LinearRecipe | FinetuneRecipe, parent: Loaded, inputs: Inputs
) -> tuple[Architecture, SimCLR]:
    check_layer(recipe.from_layer, parent)
    architecture = Architecture(
        backbone=parent.architecture.backbone,
        head=parent.architecture.head,
        classes=len(inputs.classes),
        from_layer=recipe.from_layer,
        keep_head_layers=recipe.from_layer,
    )
    # The classifier starts at zero (official zero_init_logits_layer); the rest is the parent's.
    model = build_model(architecture, seed=recipe.seed, zero_classifier=True)
    wanted = model.state_dict()
    weights = {
        name: tensor
        for name, tensor in parent.model.state_dict().items()
        if name in wanted and not name.startswith("classifier.")
    }
    weights |= {name: wanted[name] for name in wanted if name.startswith("classifier.")}
    model.load_state_dict(weights)
    return architecture, model

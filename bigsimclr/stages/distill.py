"""Distillation: a student learns a teacher's probabilities on unlabelled images.

Source: Chen et al. 2020, section 2, equations 2 and 3; google-research/simclr
colabs/distillation_self_training.ipynb (same augmented image for both, squared temperature).
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bigsimclr.data.loader import Batch
from bigsimclr.engine import Losses, MakeViews
from bigsimclr.engine.loop import Trained
from bigsimclr.engine.stop import StopRequest
from bigsimclr.errors import DataError, RecipeError
from bigsimclr.losses.classify import cross_entropy, distillation
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.norm import share_batch_norm
from bigsimclr.models.simclr import SimCLR
from bigsimclr.recipe.schema import DistillRecipe
from bigsimclr.report.progress import Progress
from bigsimclr.stages.evaluate import held_out_accuracy
from bigsimclr.stages.finetune import classify
from bigsimclr.stages.inputs import open_inputs
from bigsimclr.stages.load import load_parent
from bigsimclr.stages.run_directory import ActiveRun
from bigsimclr.stages.training import Task, plan_of, run_training
from bigsimclr.world import ALONE, World


class Distillation:
    """The teacher's probabilities as targets, mixed with labels where the recipe asks for it."""

    def __init__(
        self,
        model: SimCLR,
        teacher: SimCLR,
        *,
        temperature: float,
        labelled_weight: float,
        world: World = ALONE,
        sync_group_size: int | None = None,  # ranks that share batch norm statistics; None: all
    ) -> None:
        share_batch_norm(model, world.neighbours(sync_group_size))
        self.model = model.train()
        self._world = world
        # Labels are averaged over however many a batch holds, so micro-batches cannot be averaged.
        self.separable = labelled_weight == 0
        self._teacher = teacher.eval().requires_grad_(requires_grad=False)
        self._temperature = temperature
        self._labelled_weight = labelled_weight

    def embed(self, views: Tensor) -> Tensor:
        """Return the student's logits and, beside them, the teacher's."""
        with torch.no_grad():
            targets = classify(self._teacher, views)
        return torch.cat([classify(self.model, views), targets], dim=1)

    def loss(self, rows: Tensor, batch: Batch) -> Losses:
        """Return (1-a) distillation + a cross-entropy over the labelled images."""
        student, teacher = rows.chunk(2, dim=1)
        teacher = teacher.detach()
        total = distillation(student, teacher, temperature=self._temperature)
        agree = (student.detach().argmax(1) == teacher.argmax(1)).float().mean()
        metrics = {"train/agreement": agree}
        if self._labelled_weight > 0:
            supervised = cross_entropy(student, batch.labels.to(student.device), self._world)
            metrics["train/labelled_loss"] = supervised.detach()
            total = (1 - self._labelled_weight) * total + self._labelled_weight * supervised
        return Losses(total, metrics)

    def after_update(
        self,
        pieces: Sequence[Batch],
        make_views: MakeViews,
        whole: Iterator[Mapping[str, Tensor]],
    ) -> None:
        """Do nothing."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return nothing: the teacher is read again from its own run."""
        return {}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Do nothing."""


def distill(
    recipe: DistillRecipe, *, world: World, run: ActiveRun, progress: Progress, stop: StopRequest
) -> tuple[Trained, Task]:
    """Distil a teacher into a student of the same or another architecture."""
    with world.together():
        teacher = load_parent(recipe)
    if teacher.architecture.classes is None:
        raise RecipeError(
            f"parent: {recipe.parent} has no classifier to learn from; fine-tune it first"
        )
    inputs = open_inputs(recipe, labels=recipe.labels, walk="all", world=world, stop=stop)
    if inputs.classes and inputs.classes != teacher.classes:
        raise DataError(
            f"parent: {recipe.parent} knows {_named(teacher.classes)}, the images have "
            f"{_named(inputs.classes)}; a student learns its teacher's classes"
        )
    architecture = Architecture(
        backbone=recipe.backbone or teacher.architecture.backbone,
        head=recipe.head,
        classes=teacher.architecture.classes,
        from_layer=recipe.from_layer,
        keep_head_layers=recipe.from_layer,
    )
    model = build_model(architecture, seed=recipe.seed).to(world.device)
    batch_size = plan_of(recipe, inputs, world).micro_batch
    task = Task(
        objective=Distillation(
            model,
            teacher.model.to(world.device),
            temperature=recipe.temperature,
            labelled_weight=recipe.labelled_weight,
            world=world,
            sync_group_size=recipe.parallel.sync_group_size,
        ),
        architecture=architecture,
        inputs=inputs,
        classes=teacher.classes,
        parent=teacher,
        views=1,
        evaluate=lambda: held_out_accuracy(model, inputs, batch_size=batch_size),
        evaluate_every=None,
    )
    trained = run_training(
        recipe, task, world=world, run=run, progress=progress, stop=stop, title="distill"
    )
    return trained, task


def _named(classes: tuple[str, ...]) -> str:
    shown = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
    return f"{len(classes)} classes ({shown})"

"""Contrastive pretraining on unlabelled images.

Source: Chen et al. 2020, section 2 and 3.1; google-research/simclr tf2/run.py, tf2/model.py.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bigsimclr.data.loader import Batch
from bigsimclr.engine import Losses, MakeViews
from bigsimclr.engine.loop import Trained
from bigsimclr.engine.momentum import AveragedCopy, Queue
from bigsimclr.engine.stop import StopRequest
from bigsimclr.kernels import WIDEST_PROJECTION
from bigsimclr.losses import ContrastiveLoss, build_loss
from bigsimclr.losses.classify import cross_entropy, shown_per_rank
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.norm import share_batch_norm
from bigsimclr.models.simclr import Outputs, SimCLR
from bigsimclr.recipe.schema import PretrainRecipe
from bigsimclr.recipe.sections import QueueSection
from bigsimclr.report.progress import Progress
from bigsimclr.stages.evaluate import neighbour_accuracy
from bigsimclr.stages.inputs import Inputs, open_inputs
from bigsimclr.stages.run_directory import ActiveRun
from bigsimclr.stages.training import Task, plan_of, run_training
from bigsimclr.world import World

logger = logging.getLogger(__name__)


class Contrast:
    """NT-Xent between the two views, a linear probe behind a stop-gradient, and the queue."""

    separable = False

    def __init__(
        self,
        model: SimCLR,
        loss: ContrastiveLoss,
        *,
        width: int,  # of the projections
        queue: QueueSection | None,
        world: World,
        sync_group_size: int | None = None,  # ranks that share batch norm statistics; None: all
    ) -> None:
        share_batch_norm(model, world.neighbours(sync_group_size))
        self.model = model.to(world.device).train()
        self._world = world
        self._loss = loss
        self._width = width
        self._averaged = None if queue is None else AveragedCopy(model, queue.ema_decay)
        self._queue = None if queue is None else Queue(queue.length, width, device=world.device)

    def embed(self, views: Tensor) -> Tensor:
        """Return projections, and beside them the probe's logits where there is a probe."""
        outputs: Outputs = self.model(views)
        projections = outputs.projections[-1]
        if outputs.logits is None:
            return projections
        return torch.cat([projections, outputs.logits], dim=1)

    def loss(self, rows: Tensor, batch: Batch) -> Losses:
        """Add the contrastive loss and the probe's cross-entropy."""
        # Contiguous, so that the loss rounds alike with and without a probe beside it.
        projections, logits = rows[:, : self._width].contiguous(), rows[:, self._width :]
        first, second = projections.chunk(2)
        total = self._loss(first, second, queue=None if self._queue is None else self._queue.filled)
        seen = self._loss.metrics(first.detach(), second.detach())
        metrics = {
            "train/contrastive_accuracy": seen.accuracy,
            "train/contrastive_entropy": seen.entropy,
        }
        if logits.shape[1]:
            labels = batch.labels.to(logits.device).repeat(2)
            probe = cross_entropy(logits, labels, self._world)
            metrics |= {
                "train/loss": total.detach(),
                "probe/loss": probe.detach(),
                "probe/accuracy": self._accuracy(logits, labels),
            }
            total = total + probe
        return Losses(total, metrics)

    def _accuracy(self, logits: Tensor, labels: Tensor) -> Tensor:
        known = labels >= 0
        hits = (logits.argmax(1) == labels) & known
        return hits.sum() / shown_per_rank(known, self._world)

    def after_update(
        self,
        pieces: Sequence[Batch],
        make_views: MakeViews,
        whole: Iterator[Mapping[str, Tensor]],
    ) -> None:
        """Average the weights, then remember the second views' projections of this batch."""
        if self._averaged is None or self._queue is None:
            return
        self._averaged.update(whole)
        with torch.no_grad():
            rows = [
                self._averaged.model(make_views(piece).chunk(2)[1]).projections[-1].float()
                for piece in pieces
            ]
        # All ranks' rows in the order of the global batch: every rank holds the same queue.
        self._queue.push(self._world.gather(torch.cat(rows)).flatten(0, 1))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the averaged copy and the queue."""
        if self._averaged is None or self._queue is None:
            return {}
        return {"averaged": self._averaged.state(), "queue": self._queue.state()}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back the averaged copy and the queue."""
        if self._averaged is not None and self._queue is not None:
            self._averaged.restore(state["averaged"])
            self._queue.restore(state["queue"])


def pretrain(
    recipe: PretrainRecipe,
    *,
    world: World,
    run: ActiveRun,
    progress: Progress,
    stop: StopRequest,
) -> tuple[Trained, Task]:
    """Pretrain a network."""
    inputs = open_inputs(recipe, labels=None, walk="all", world=world, stop=stop)
    probed = recipe.probe.linear and bool(inputs.classes)
    architecture = Architecture(
        backbone=recipe.backbone,
        head=recipe.head,
        classes=len(inputs.classes) if probed else None,
        from_layer=0,
    )
    model = build_model(architecture, seed=recipe.seed, probe=True)
    plan = plan_of(recipe, inputs, world)
    every = recipe.probe.knn_every_epochs
    interval = None if every is None else max(1, round(every * plan.steps_per_epoch))

    def evaluate() -> Mapping[str, float]:
        if interval is None or interval > plan.steps:
            return {}
        return neighbour_accuracy(
            model,
            inputs,
            neighbours=recipe.probe.neighbours,
            from_layer=0,
            batch_size=min(plan.micro_batch * 2, 1024),
        )

    task = Task(
        objective=Contrast(
            model,
            build_loss(
                recipe.loss,
                world,
                fused=_fuses_loss(recipe, inputs),
            ),
            width=recipe.head.output_width,
            queue=recipe.loss.queue,
            world=world,
            sync_group_size=recipe.parallel.sync_group_size,
        ),
        architecture=architecture,
        inputs=inputs,
        classes=inputs.classes,
        parent=None,
        views=2,
        evaluate=evaluate,
        evaluate_every=interval,
    )
    trained = run_training(
        recipe, task, world=world, run=run, progress=progress, stop=stop, title="pretrain"
    )
    return trained, task


def _fuses_loss(recipe: PretrainRecipe, inputs: Inputs) -> bool:
    """Say whether the loss is fused, and log where it alone is not."""
    is_wide = recipe.head.output_width > WIDEST_PROJECTION
    if inputs.fused and is_wide:
        logger.warning(
            "kernels: the loss is plain PyTorch, since head.output_width is over %d",
            WIDEST_PROJECTION,
        )
    return inputs.fused and not is_wide

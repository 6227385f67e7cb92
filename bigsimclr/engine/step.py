"""One update of the parameters: direct, accumulated, or with cached gradients."""

import torch
from torch import Tensor

from bigsimclr.data.loader import Batch
from bigsimclr.engine import Losses, MakeViews, Objective
from bigsimclr.models.norm import frozen_running_statistics
from bigsimclr.parallel import Strategy
from bigsimclr.recipe.plan import Update


def compute_gradients(
    objective: Objective,
    batch: Batch,  # this rank's share of the update
    *,
    how: Update,
    micro_batch: int,  # images per forward pass
    make_views: MakeViews,
    strategy: Strategy,
) -> Losses:
    """Add the gradient of the batch's loss to the parameters' gradients.

    All three ways give the same gradient where they are offered, but for batch norm: its batch
    statistics are those of one forward pass, that is, of one micro-batch.

    Args:
        objective: the stage's rows and loss.
        batch: the images.
        how: direct, one forward pass; accumulated, the mean of the micro-batches' gradients, for
            separable losses only; cached, exact for every loss at the price of one more forward
            pass: rows first without a graph, then the loss's gradient with respect to the rows,
            then each micro-batch again with that gradient (Gao et al. 2021, arXiv 2101.06983).
        micro_batch: images per forward pass; unused by direct.
        make_views: augmentation of a batch or of a piece of it.
        strategy: precision, backward, synchronisation.

    Raises:
        ValueError: accumulated, for a loss that couples the images of a batch.
    """
    if how == "direct":
        return direct_gradients(objective, batch, make_views(batch), strategy)
    if how == "accumulated":
        if not objective.separable:
            raise ValueError("this loss couples the images of a batch: use cached gradients")
        return _accumulated(objective, batch, micro_batch, make_views, strategy)
    return _cached(objective, batch, micro_batch, make_views, strategy)


def _rows(objective: Objective, views: Tensor, strategy: Strategy) -> Tensor:
    with strategy.compute():
        rows = objective.embed(views)
    # Losses are computed in float32 at least, whatever the network's precision.
    return rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows


def direct_gradients(
    objective: Objective,
    batch: Batch,
    views: Tensor,  # [V*B,3,H,W]
    strategy: Strategy,
    *,
    sends: bool = True,
) -> Losses:
    """Add the gradient of the loss of some views, in one forward pass.

    Args:
        objective: the stage's rows and loss.
        batch: what the views were made of.
        views: on the device.
        strategy: precision, backward, synchronisation.
        sends: exchange gradients with other ranks; else another backward pass does.
    """
    losses = objective.loss(_rows(objective, views, strategy), batch)
    with strategy.synchronise(when=sends):
        strategy.backward(losses.total)
    return losses


def _accumulated(
    objective: Objective,
    batch: Batch,
    micro_batch: int,
    make_views: MakeViews,
    strategy: Strategy,
) -> Losses:
    pieces = batch.split(micro_batch)
    total: Tensor | None = None
    sums: dict[str, Tensor] = {}
    for number, piece in enumerate(pieces):
        share = len(piece.labels) / len(batch.labels)
        losses = objective.loss(_rows(objective, make_views(piece), strategy), piece)
        with strategy.synchronise(when=number == len(pieces) - 1):
            strategy.backward(losses.total * share)
        part = losses.total.detach() * share
        total = part if total is None else total + part
        for name, value in losses.metrics.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value * share
    if total is None:
        raise ValueError("the batch is empty")
    return Losses(total, sums)


def _cached(
    objective: Objective,
    batch: Batch,
    micro_batch: int,
    make_views: MakeViews,
    strategy: Strategy,
) -> Losses:
    pieces = batch.split(micro_batch)
    # The first pass must not move running statistics, or every image would count twice.
    with torch.no_grad(), frozen_running_statistics(objective.model):
        first = [_rows(objective, make_views(piece), strategy) for piece in pieces]
    views = len(first[0]) // len(pieces[0].labels)
    # Rows are view-major within a piece; the loss wants them view-major within the batch.
    width = first[0].shape[1]
    stacked = torch.cat([rows.view(views, -1, width) for rows in first], dim=1)
    rows = stacked.reshape(-1, width).requires_grad_()
    losses = objective.loss(rows, batch)
    (gradient,) = torch.autograd.grad(losses.total, rows)
    shares = gradient.view(views, -1, width).split([len(p.labels) for p in pieces], dim=1)
    for number, (piece, share) in enumerate(zip(pieces, shares, strict=True)):
        again = _rows(objective, make_views(piece), strategy)
        with strategy.synchronise(when=number == len(pieces) - 1):
            # A scalar whose gradient is the cached one: every strategy can take it.
            strategy.backward((again * share.reshape(-1, width)).sum())
    return Losses(losses.total.detach(), losses.metrics)

"""Losses: NT-Xent for pretraining, cross-entropy and distillation for everything after."""

from typing import Protocol

from torch import Tensor

from bigsimclr.losses.nt_xent import ContrastiveMetrics, NtXent
from bigsimclr.recipe.sections import NtXentLoss
from bigsimclr.world import ALONE, World


class ContrastiveLoss(Protocol):
    """A loss of two views' projections, with the metrics that are logged beside it."""

    def __call__(self, first: Tensor, second: Tensor, *, queue: Tensor | None = None) -> Tensor:
        """Return the loss [] of projections [B, D], [B, D] and past projections [Q, D]."""
        ...

    def metrics(self, first: Tensor, second: Tensor) -> ContrastiveMetrics:
        """Return accuracy and entropy of projections [B, D], [B, D]."""
        ...


def build_loss(
    section: NtXentLoss, world: World = ALONE, *, fused: bool = False
) -> ContrastiveLoss:
    """Make the contrastive loss that a recipe's `loss` section describes, over some ranks.

    Fused it has the digits of float32 as well: it is a small part of an update either way.
    """
    return NtXent(
        temperature=section.temperature,
        row_chunk=section.row_chunk,
        fused="fp32" if fused else None,
        world=world,
    )

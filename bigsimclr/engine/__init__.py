"""The vocabulary of training: what a stage supplies, and what the one loop needs besides."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bigsimclr.data.loader import Batch
from bigsimclr.models.simclr import SimCLR

MakeViews = Callable[[Batch], Tensor]  # -> [V*b,3,H,W] on the device, view-major


@dataclass(frozen=True)
class Losses:
    """What a loss returns for one batch."""

    total: Tensor  # [] the scalar to minimise
    metrics: Mapping[str, Tensor]  # name -> [] detached; recorded, never differentiated


class Objective(Protocol):
    """What a stage supplies: rows for views, and one scalar for all rows of a batch.

    Only `embed` is replayed per micro-batch, so the loss may couple all images of the batch.
    """

    @property
    def model(self) -> SimCLR:
        """Return the network that is trained."""
        ...

    @property
    def separable(self) -> bool:
        """Say whether the loss is a mean over images, so that micro-batches may be averaged."""
        ...

    def embed(self, views: Tensor) -> Tensor:
        """Map views [V*b,3,H,W] to rows [V*b,D]; gradients flow through the rows."""
        ...

    def loss(self, rows: Tensor, batch: Batch) -> Losses:
        """Score the rows [V*B,D] of a batch of B images, view-major."""
        ...

    def after_update(
        self,
        pieces: Sequence[Batch],
        make_views: MakeViews,
        whole: Iterator[Mapping[str, Tensor]],
    ) -> None:
        """Follow an update.

        Args:
            pieces: its micro-batches, in order.
            make_views: augmentation of a piece.
            whole: the model's tensors by name, whole, some at a time.
        """
        ...

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return tensors, by section and name, that must survive a restart beside the model."""
        ...

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `state` returned."""
        ...

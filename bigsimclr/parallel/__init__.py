"""How an update is spread over processes and devices: the protocol and its builder."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from bigsimclr.models.simclr import SimCLR
    from bigsimclr.recipe.sections import SingleProcess
    from bigsimclr.world import World

MakeOptimizer = Callable[["SimCLR"], Optimizer]


@dataclass(frozen=True)
class Update:
    """What one update of the parameters did."""

    gradient_norm: Tensor  # [] float32, over all parameters, before the optimizer
    skipped: bool  # True: fp16 gradients overflowed, the loss scale was lowered, nothing moved


class Strategy(Protocol):
    """Precision, synchronisation and the parameter update of one training process."""

    def prepare(self, model: "SimCLR", make_optimizer: MakeOptimizer) -> Optimizer:
        """Place the model for training and make its optimizer."""
        ...

    def compute(self) -> AbstractContextManager[None]:
        """Enter the arithmetic precision of forward passes."""
        ...

    def synchronise(self, *, when: bool) -> AbstractContextManager[None]:
        """Exchange gradients with other ranks only in the last micro-batch."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar to the parameters' gradients."""
        ...

    def update(self) -> Update:
        """Unscale, check, step and clear; raises NumericsError before a non-finite step."""
        ...

    def state(self) -> dict[str, float]:
        """Return what must survive a restart beside parameters and optimizer."""
        ...

    def restore(self, state: dict[str, float]) -> None:
        """Take back what `state` returned."""
        ...


def build_strategy(section: "SingleProcess", world: "World") -> Strategy:
    """Build the strategy that a recipe asks for."""
    from bigsimclr.parallel.single import Single

    return Single(world.device, precision=section.precision)

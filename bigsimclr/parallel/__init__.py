"""How an update is spread over processes and devices: the protocol and its builder."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from bigsimclr.errors import RecipeError
from bigsimclr.optim import SquaredNorms

if TYPE_CHECKING:
    from bigsimclr.models.simclr import SimCLR
    from bigsimclr.recipe.strategies import ParallelSection
    from bigsimclr.world import World


class MakeOptimizer(Protocol):
    """Makes the optimizer of a recipe."""

    def __call__(
        self, parameters: Mapping[str, Parameter], *, squared_norms: SquaredNorms | None = None
    ) -> Optimizer:
        """Make the optimizer of these parameters.

        Args:
            parameters: by the model's names; each may be this rank's part of the model's own.
            squared_norms: sums over the ranks, where the parameters are parts.
        """
        ...


class Choose(Protocol):
    """Says which rank keeps a tensor that all could keep."""

    def __call__(self, name: str, bytes_: int) -> bool:
        """Say whether this rank does; every rank asks for the same tensors in the same order."""
        ...


@dataclass(frozen=True)
class Update:
    """What one update of the parameters did."""

    gradient_norm: Tensor  # [] float32, over all parameters, before the optimizer
    skipped: bool  # True: fp16 gradients overflowed, the loss scale was lowered, nothing moved


class Strategy(Protocol):
    """Precision, synchronisation and the parameter update of one training process.

    Every rank makes the same calls in the same order.
    """

    def prepare(self, model: "SimCLR", make_optimizer: MakeOptimizer) -> None:
        """Place the model, whose weights are those of the first rank, and make its optimizer."""
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

    def set_learning_rate(self, learning_rate: float) -> None:
        """Give the next updates this rate."""
        ...

    def update(self) -> Update:
        """Unscale, check, step and clear; raises NumericsError before a non-finite step."""
        ...

    def whole(self) -> Iterator[Mapping[str, Tensor]]:
        """Yield the model's parameters and buffers by name, whole, some at a time, to the end."""
        ...

    def optimizer_part(self, is_kept: Choose) -> dict[str, Tensor]:
        """Return the tensors of the optimizer state that this rank keeps, whole; not copies."""
        ...

    def load(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Take whole tensors of the model, buffers included, and of the optimizer, exactly.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape or type.
        """
        ...

    def state(self) -> dict[str, float]:
        """Return what must survive a restart beside parameters and optimizer."""
        ...

    def restore(self, state: dict[str, float]) -> None:
        """Take back what `state` returned."""
        ...


def build_strategy(section: "ParallelSection", world: "World") -> Strategy:
    """Build the strategy that a recipe asks for.

    Raises:
        RecipeError: it cannot do what the section asks for.
        MissingExtraError: its package is not installed.
    """
    from bigsimclr.parallel.precision import Precision

    precision = Precision(world.device, section.precision)
    match section.strategy:
        case "ddp" | "zero1" | "fsdp2" if world.size == 1:  # there is nobody to share with
            from bigsimclr.parallel.single import Single

            return Single(precision)
        case "ddp":
            from bigsimclr.parallel.ddp import DataParallel

            return DataParallel(world, precision, exchange=section.gradient_exchange)
        case "zero1":
            from bigsimclr.parallel.zero1 import ZeroOne

            return ZeroOne(world, precision, exchange=section.gradient_exchange)
        case "fsdp2":
            from bigsimclr.parallel.fsdp2 import FullySharded

            return FullySharded(world, precision, reshard=section.reshard)
        case "deepspeed_zero1" | "deepspeed_zero2" | "deepspeed_zero3":
            from bigsimclr.parallel.deepspeed import DeepSpeedZero

            if section.precision == "fp16":
                raise RecipeError(
                    "parallel.precision: fp16 is not offered with deepspeed, whose loss scale "
                    "would be another than ours; use bf16, or zero1 or fsdp2"
                )
            return DeepSpeedZero(
                world, precision, stage=int(section.strategy[-1]), offload=section.offload
            )

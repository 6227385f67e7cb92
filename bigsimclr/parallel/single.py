"""One process on one device."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bigsimclr.models.simclr import SimCLR
from bigsimclr.optim import LARS, load_optimizer_state, optimizer_state, set_learning_rate
from bigsimclr.optim.tensors import copy_tensors, tensors_of
from bigsimclr.parallel import Choose, MakeOptimizer, Update
from bigsimclr.parallel.precision import Precision

if TYPE_CHECKING:
    from bigsimclr.models.layers import WorkingWeights


class Single:
    """The strategy of a single process, and of each rank that holds the whole state."""

    def __init__(self, precision: Precision) -> None:
        self._precision = precision
        self._model: SimCLR | None = None
        self._optimizer: Optimizer | None = None
        self._working: WorkingWeights | None = None
        self._is_followed = False  # the optimizer writes working copies itself

    @property
    def model(self) -> SimCLR:
        """Return the model that was prepared."""
        if self._model is None:
            raise AssertionError("prepare comes first")
        return self._model

    @property
    def optimizer(self) -> Optimizer:
        """Return the optimizer that was made."""
        if self._optimizer is None:
            raise AssertionError("prepare comes first")
        return self._optimizer

    def prepare(self, model: SimCLR, make_optimizer: MakeOptimizer) -> None:
        """Move the model to the device and make its optimizer."""
        self._model = model.to(self._precision.device)
        self._optimizer = make_optimizer(trained(model))
        self._working = self._precision.working_weights(self._model)
        self._is_followed = (
            self._working is not None
            and isinstance(self._optimizer, LARS)
            and self._optimizer.writes_copies(self._working.copies)
        )

    def compute(self) -> AbstractContextManager[None]:
        """Run forward passes in the recipe's precision."""
        return self._precision.compute()

    @contextmanager
    def synchronise(self, *, when: bool) -> Iterator[None]:  # noqa: ARG002 - no other rank
        """Do nothing: there is no other rank."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, times the fp16 loss scale, to the parameters' gradients."""
        self._precision.scaled(loss).backward()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Give the next updates this rate."""
        set_learning_rate(self.optimizer, learning_rate)

    def update(self) -> Update:
        """Step the optimizer if every gradient is finite.

        Raises:
            NumericsError: a gradient is not finite and no fp16 loss scale explains it.
        """
        parameters = list(trained(self.model).values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._precision.unscale(gradients)
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        verdict = self._precision.judge(norm)
        if not verdict.skipped:
            self.optimizer.step()
            if not self._is_followed:
                self.refresh()
        for parameter in parameters:
            parameter.grad = None
        return verdict

    def refresh(self) -> None:
        """Let 16-bit arithmetic follow the weights, which have changed."""
        if self._working is not None:
            self._working.refresh()

    def whole(self) -> Iterator[Mapping[str, Tensor]]:
        """Yield everything at once."""
        yield tensors_of(self.model)

    def optimizer_part(self, is_kept: Choose) -> dict[str, Tensor]:
        """Return the tensors of the optimizer state that this rank keeps."""
        own = optimizer_state(self.optimizer)
        return {name: value for name, value in own.items() if is_kept(name, value.nbytes)}

    def load(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Take saved tensors."""
        copy_tensors(tensors_of(self.model), model, what="model")
        load_optimizer_state(self.optimizer, optimizer)
        self.refresh()

    def state(self) -> dict[str, float]:
        """Return the loss scale."""
        return self._precision.state()

    def restore(self, state: dict[str, float]) -> None:
        """Take back the loss scale."""
        self._precision.restore(state)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that take a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}

"""One process on one device: autocast, the fp16 loss scale, and the finite check."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigsimclr.errors import NumericsError
from bigsimclr.models.simclr import SimCLR
from bigsimclr.parallel import MakeOptimizer, Update

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Single:
    """The strategy of a single process."""

    def __init__(self, device: torch.device, *, precision: Literal["fp32", "bf16", "fp16"]) -> None:
        self._device = device
        self._autocast = AUTOCAST.get(precision)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._optimizer: Optimizer | None = None
        self._parameters: list[torch.nn.Parameter] = []

    def prepare(self, model: SimCLR, make_optimizer: MakeOptimizer) -> Optimizer:
        """Move the model to the device and make its optimizer."""
        model.to(self._device)
        self._optimizer = make_optimizer(model)
        self._parameters = [
            parameter for group in self._optimizer.param_groups for parameter in group["params"]
        ]
        return self._optimizer

    @contextmanager
    def compute(self) -> Iterator[None]:
        """Run forward passes in the recipe's precision."""
        with torch.autocast(
            self._device.type, dtype=self._autocast, enabled=self._autocast is not None
        ):
            yield

    @contextmanager
    def synchronise(self, *, when: bool) -> Iterator[None]:  # noqa: ARG002 - no other rank
        """Do nothing: there is no other rank."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, times the fp16 loss scale, to the parameters' gradients."""
        self._scaler.scale(loss).backward()

    def update(self) -> Update:
        """Step the optimizer if every gradient is finite.

        Raises:
            NumericsError: a gradient is not finite and no fp16 loss scale explains it.
        """
        if self._optimizer is None:
            raise AssertionError("prepare comes first")
        self._scaler.unscale_(self._optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        finite = bool(torch.isfinite(norm))
        if not finite and not self._scaler.is_enabled():
            raise NumericsError(f"the gradient norm is {norm.item()}")
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return Update(gradient_norm=norm, skipped=not finite)

    def state(self) -> dict[str, float]:
        """Return the loss scale and its growth counter; empty without fp16."""
        return dict(self._scaler.state_dict())

    def restore(self, state: dict[str, float]) -> None:
        """Take back the loss scale, or every restart would replay its search."""
        if self._scaler.is_enabled():
            counters = {"growth_interval", "_growth_tracker"}
            self._scaler.load_state_dict(
                {name: int(value) if name in counters else value for name, value in state.items()}
            )

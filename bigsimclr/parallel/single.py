"""One process on one device: autocast, the fp16 loss scale, and the finite check."""

import math
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


class _Arriving:
    """A number on its way from the GPU to the host."""

    def __init__(self, number: Tensor) -> None:
        self._number = torch.empty((), dtype=number.dtype, pin_memory=True)
        self._number.copy_(number, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def value(self) -> Tensor:
        """Wait until it is there, which it is when another update has been queued."""
        self._event.synchronize()
        return self._number


class Single:
    """The strategy of a single process."""

    def __init__(self, device: torch.device, *, precision: Literal["fp32", "bf16", "fp16"]) -> None:
        self._device = device
        self._autocast = AUTOCAST.get(precision)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._optimizer: Optimizer | None = None
        self._parameters: list[torch.nn.Parameter] = []
        self._earlier: _Arriving | None = None

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

        On a GPU the host does not wait for the verdict on an update: it comes with the next one.
        What it concerns never reaches a checkpoint, which refuses tensors that are not finite.

        Raises:
            NumericsError: a gradient is not finite and no fp16 loss scale explains it.
        """
        if self._optimizer is None:
            raise AssertionError("prepare comes first")
        self._scaler.unscale_(self._optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        skipped = self._scaler.is_enabled() and not bool(torch.isfinite(norm))
        if not self._scaler.is_enabled():
            self._refuse_non_finite(norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if skipped and self._scaler.get_scale() < 1.0:
            raise NumericsError("fp16 gradients overflow at any loss scale")
        self._optimizer.zero_grad(set_to_none=True)
        return Update(gradient_norm=norm, skipped=skipped)

    def _refuse_non_finite(self, norm: Tensor) -> None:
        judged = norm
        if self._device.type == "cuda":
            arrived, self._earlier = self._earlier, _Arriving(norm)
            if arrived is None:
                return
            judged = arrived.value()
        if not math.isfinite(judged.item()):
            raise NumericsError(f"the gradient norm is {judged.item()}")

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

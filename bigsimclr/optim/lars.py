"""LARS: SGD with momentum whose rate adapts to each kernel's norm and gradient norm.

With adaptation off it is SGD with momentum in the TensorFlow form, where the rate is inside the
momentum buffer. A form that multiplies the buffer by the rate instead differs as soon as the rate
changes, that is at every step of a schedule.

Source: google-research/simclr lars_optimizer.py, tf2/lars_optimizer.py; arXiv 1708.03888.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, _foreach_add, _foreach_mul, _foreach_norm
from torch.optim import Optimizer
from typing_extensions import override

SquaredNorms = Callable[[list[Tensor]], list[Tensor]]
"""Squared L2 norms [] of tensors; one that sums over ranks makes LARS work on sharded tensors."""


class LARS(Optimizer):
    """Layer-wise adaptive rates with momentum; no value is read back from the device.

    Each group carries `weight_decay` (per update, added to the gradient) and `adapt` (whether the
    rate follows |weights| / |gradient|). The trust ratio is 1 where either norm is 0. Parameters
    without a gradient are left alone.

    Args:
        params: Parameters, or groups of them with `weight_decay` and `adapt`.
        learning_rate: Rate of every group that has none of its own; kept under the key `lr`.
        momentum: Share of the previous update that is kept.
        trust_coefficient: Scales |weights| / |gradient|; dimensionless.
        nesterov: Look ahead along the momentum.
        classic: Momentum of the adapted updates (official default); False adapts the momentum.
        squared_norms: Replaces the local computation of squared norms.

    Source: google-research/simclr lars_optimizer.py.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        learning_rate: float,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        nesterov: bool = False,
        classic: bool = True,
        squared_norms: SquaredNorms | None = None,
    ) -> None:
        if learning_rate < 0 or trust_coefficient <= 0 or not 0 <= momentum < 1:
            raise ValueError(
                f"learning_rate {learning_rate} must be at least 0, trust_coefficient "
                f"{trust_coefficient} positive and momentum {momentum} in [0, 1)"
            )
        super().__init__(params, {"lr": learning_rate, "weight_decay": 0.0, "adapt": True})
        self.momentum = momentum
        self.trust_coefficient = trust_coefficient
        self.nesterov = nesterov
        self.classic = classic
        self._squared_norms = squared_norms
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss and the gradients first, as other optimizers accept it.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                parameters = [p for p in group["params"] if p.grad is not None]
                if parameters:
                    self._update(
                        parameters,
                        rate=group["lr"],
                        weight_decay=group["weight_decay"],
                        adapt=group["adapt"],
                    )
        return loss

    def _update(
        self, parameters: list[Tensor], *, rate: float, weight_decay: float, adapt: bool
    ) -> None:
        """Apply one update to the parameters of one group."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        buffers = [self.state[p]["momentum"] for p in parameters]
        if weight_decay != 0:
            gradients = _list(_foreach_add(gradients, parameters, alpha=weight_decay))
        if self.classic:
            # The decay is part of the gradient whose norm is compared, as in the official code.
            steps = self._scaled(parameters, gradients, rate=rate, adapt=adapt)
            torch._foreach_mul_(buffers, self.momentum)
            torch._foreach_add_(buffers, steps)
            if self.nesterov:
                torch._foreach_add_(steps, buffers, alpha=self.momentum)
                torch._foreach_sub_(parameters, steps)
            else:
                torch._foreach_sub_(parameters, buffers)
        else:
            torch._foreach_mul_(buffers, self.momentum)
            torch._foreach_add_(buffers, gradients)
            directions = buffers
            if self.nesterov:
                directions = _list(_foreach_add(gradients, buffers, alpha=self.momentum))
            steps = self._scaled(parameters, directions, rate=rate, adapt=adapt)
            torch._foreach_sub_(parameters, steps)

    def _scaled(
        self, parameters: list[Tensor], directions: list[Tensor], *, rate: float, adapt: bool
    ) -> list[Tensor]:
        """Return the directions times rate and, where it adapts, trust ratio."""
        steps = _list(_foreach_mul(directions, rate))
        if adapt:
            weights, lengths = self._norms(parameters, directions)
            known = (weights > 0) & (lengths > 0)
            trust = torch.where(known, self.trust_coefficient * weights / lengths, 1.0)
            torch._foreach_mul_(steps, list(trust.unbind()))
        return steps

    def _norms(self, parameters: list[Tensor], directions: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the norms [P] of the parameters and [P] of the directions."""
        tensors = [*parameters, *directions]
        if self._squared_norms is None:
            norms = torch.stack(_list(_foreach_norm(tensors)))
        else:
            norms = torch.stack(self._squared_norms(tensors)).sqrt()
        return norms[: len(parameters)], norms[len(parameters) :]


def _list(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return what a foreach operation gave as a list."""
    return list(tensors)

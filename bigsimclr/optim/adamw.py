"""AdamW with the epsilon of the TensorFlow form of Adam."""

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch.nn import Parameter
from torch.optim import AdamW
from typing_extensions import override


class TensorFlowAdamW(AdamW):
    """AdamW whose epsilon is added before the correction of the squared gradients, not after.

    In TensorFlow's form epsilon belongs to the uncorrected root, so that in PyTorch's form it is
    epsilon / sqrt(1 - beta2^t) at update t: 30 times larger at first, the same later on. Where
    gradients are tiny, only this follows the official runs.

    State exists from the start, as zeros, so that it can be saved and loaded before any update.

    Args:
        params: Groups of parameters with their `weight_decay`.
        learning_rate: Kept under the key `lr`.
        betas: Decay of the running mean of the gradient and of its square.
        epsilon: Added to the root of the mean squared gradient (TensorFlow: 1e-7).

    Source: Keras `Adam`, as google-research/simclr tf2/model.py (`build_optimizer`) calls it;
    arXiv 1412.6980 section 2, the note on the order of computation.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        epsilon: float = 1e-7,
    ) -> None:
        super().__init__(params, lr=learning_rate, betas=betas, eps=epsilon)
        # One pass over memory on a CPU; on a GPU it would move the update count there, and reading
        # that below would wait for the device.
        on_cpu = all(parameter.device.type == "cpu" for parameter in self._parameters())
        for group in self.param_groups:
            group["fused"] = True if on_cpu else None
        for parameter in self._parameters():
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; see `torch.optim.AdamW.step`."""
        for group in self.param_groups:
            # All parameters of a run are updated together, so any of them tells the update.
            update = 1.0 + float(self.state[group["params"][0]]["step"])
            group["eps"] = self.defaults["eps"] / math.sqrt(1.0 - group["betas"][1] ** update)
        loss: float | None = super().step(closure)
        return loss

    def _parameters(self) -> list[Parameter]:
        """Return all parameters."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

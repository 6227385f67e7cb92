"""Losses and optimizers of other libraries, for benchmarks beside our own.

lightly's run as installed and unchanged. Its packages' own `__init__` files and its
`models.utils` import torchvision; the first are passed over and the second is left empty, because
the loss calls it only for a memory bank over several processes.

solo-learn is on no registry. Its formulas are written here from their definition, with as many
passes over memory and as many reads from the device as theirs: `solo/losses/simclr.py` and
`solo/utils/lars.py` of vturrisi/solo-learn.

pytorch-metric-learning's loss runs as installed. It pairs every positive with every negative, so
that its memory grows with the cube of N.

All three losses are means over the 2N anchors, half of the official sum over directions; they are
doubled here.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from types import ModuleType
from typing import Final

import torch
from torch import Tensor
from torch.nn import Parameter, functional as F
from torch.optim import Optimizer
from typing_extensions import override

Loss = Callable[[Tensor, Tensor], Tensor]

TRUST: Final = 0.001  # the default of both, and of the official code
_EPSILON: Final = 1e-8  # of both


@cache
def imported(name: str) -> ModuleType | None:
    """Import a module of another library; say so where it, or what it needs, is not installed."""
    try:
        if name.startswith("lightly."):
            _load_lightly()
        return importlib.import_module(name)
    except ImportError as missing:
        # A process that is asked for a figure answers on its standard output.
        print(f"{name} is left out: {missing}", file=sys.stderr)
        return None


def has_lightly() -> bool:
    """Tell whether lightly's loss and LARS can be had."""
    names = ("lightly.loss.ntx_ent_loss", "lightly.utils.lars")
    return all(imported(name) is not None for name in names)


def lightly_loss(temperature: float) -> Loss:
    """Return lightly's NTXentLoss, doubled."""
    _load_lightly()
    loss = importlib.import_module("lightly.loss.ntx_ent_loss").NTXentLoss(temperature)
    return lambda first, second: 2.0 * loss(first, second)


def lightly_lars(
    kernels: Sequence[Parameter],
    others: Sequence[Parameter],  # neither decayed nor adapted
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.9,
) -> Optimizer:
    """Return lightly's LARS in the groups of its own benchmark."""
    _load_lightly()
    module = importlib.import_module("lightly.utils.lars")
    groups = [{"params": list(kernels)}, {"params": list(others), "weight_decay": 0.0}]
    optimizer: Optimizer = module.LARS(
        groups,
        lr=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        trust_coefficient=TRUST,
    )
    return optimizer


def _load_lightly() -> None:
    """Put the packages that hold lightly's modules into place, without what they import."""
    if "lightly.models.utils" in sys.modules:
        return
    for name in (
        "lightly",
        "lightly.loss",
        "lightly.models",
        "lightly.models.modules",
        "lightly.models.utils",
    ):
        specification = importlib.util.find_spec(name)
        if specification is None:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        # Not executed; with its specification, which others ask for.
        sys.modules[name] = importlib.util.module_from_spec(specification)


def solo_loss(temperature: float) -> Loss:
    """Return solo-learn's loss, doubled: exponentials of all pairs, times two masks."""

    def loss(first: Tensor, second: Tensor) -> Tensor:
        rows = F.normalize(torch.cat([first, second]), dim=-1)
        weights = torch.exp(torch.einsum("id,jd->ij", rows, rows) / temperature)
        image = torch.arange(len(first), device=rows.device).repeat(2)
        same = image[:, None] == image[None, :]
        others = image[:, None] != image[None, :]
        same.fill_diagonal_(0)
        positives = (weights * same).sum(1)
        negatives = (weights * others).sum(1)
        return -2.0 * torch.log(positives / (positives + negatives)).mean()

    return loss


def metric_learning_loss(temperature: float) -> Loss:
    """Return pytorch-metric-learning's self-supervised NTXentLoss, doubled."""
    losses = importlib.import_module("pytorch_metric_learning.losses")
    loss = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=temperature))
    return lambda first, second: 2.0 * loss(first, second)


def solo_lars(
    kernels: Sequence[Parameter],
    others: Sequence[Parameter],  # of one dimension: neither decayed nor adapted
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.9,
) -> Optimizer:
    """Return solo-learn's LARS, which leaves out what has one dimension."""
    return _SoloLars(
        [*kernels, *others],
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        momentum=momentum,
    )


class _SoloLars(Optimizer):
    """One parameter after the other; whether its norms are zero is read back from the device."""

    def __init__(
        self,
        parameters: Iterable[Parameter],
        *,
        learning_rate: float,
        weight_decay: float,
        momentum: float,
    ) -> None:
        super().__init__(parameters, {"lr": learning_rate})
        self.weight_decay = weight_decay
        self.momentum = momentum

    @override
    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override] # loops here have no closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"])

    def _update(self, parameter: Tensor, gradient: Tensor, learning_rate: float) -> None:
        length, slope = torch.norm(parameter), torch.norm(gradient)
        if parameter.ndim > 1 and length != 0 and slope != 0:
            ratio = length / (slope + self.weight_decay * length + _EPSILON) * TRUST
            gradient = gradient.add(parameter, alpha=self.weight_decay)
            gradient *= ratio
        state = self.state[parameter]
        if "momentum" in state:
            state["momentum"].mul_(self.momentum).add_(gradient)
        else:
            state["momentum"] = gradient.clone()
        parameter.add_(state["momentum"], alpha=-learning_rate)

"""Optimizers: which parameters decay and adapt, and state addressed by parameter name."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from bigsimclr.optim.adamw import TensorFlowAdamW
from bigsimclr.optim.lars import LARS, SquaredNorms
from bigsimclr.optim.schedule import warmup_cosine
from bigsimclr.optim.tensors import copy_tensors
from bigsimclr.recipe.sections import AdamW, Lars, OptimizerSection, Sgd

__all__ = [
    "LARS",
    "ParameterKind",
    "SquaredNorms",
    "build_optimizer",
    "load_optimizer_state",
    "optimizer_state",
    "parameter_groups",
    "set_learning_rate",
    "warmup_cosine",
]

ParameterKind = Literal["kernel", "bias", "norm", "classifier_kernel", "classifier_bias"]
"""What a parameter is: decides about weight decay and layer adaptation."""

_KERNELS = frozenset({"kernel", "classifier_kernel"})


def build_optimizer(
    section: OptimizerSection,
    parameters: Mapping[str, Parameter],
    *,
    kinds: Mapping[str, ParameterKind],
    learning_rate: float,
    squared_norms: SquaredNorms | None = None,
    fused: bool = False,
) -> Optimizer:
    """Make the optimizer of a recipe's `optimizer` section.

    * LARS decays and adapts kernels; the classifier's kernel decays at the full rate without
      adaptation; batch norm and biases do neither.
    * SGD decays everything but batch norm, biases included.
    * AdamW decays kernels.

    Args:
        section: The recipe's section.
        parameters: Trained parameters by name.
        kinds: What each parameter is; may name more parameters than are trained.
        learning_rate: Rate after its scaling with the global batch.
        squared_norms: Sums over the ranks, where the parameters are parts of whole ones.
        fused: LARS and SGD update with the kernels in Triton; see `LARS`.

    Returns:
        An optimizer whose groups also list their `names` and whose state is complete from the
        start, as zeros.

    Source: google-research/simclr model_util.py (`get_optimizer`, `add_weight_decay`).
    """
    match section:
        case Lars():
            return LARS(
                _groups(
                    parameters,
                    kinds,
                    weight_decay=section.weight_decay,
                    decayed=_KERNELS,
                    adapted=frozenset({"kernel"}),
                ),
                learning_rate=learning_rate,
                momentum=section.momentum,
                trust_coefficient=section.trust_coefficient,
                squared_norms=squared_norms,
                fused=fused,
            )
        case Sgd():
            decayed = _KERNELS | {"bias", "classifier_bias"}
            return LARS(
                _groups(parameters, kinds, weight_decay=section.weight_decay, decayed=decayed),
                learning_rate=learning_rate,
                momentum=section.momentum,
                nesterov=True,
                fused=fused,
            )
        case AdamW():
            return TensorFlowAdamW(
                _groups(parameters, kinds, weight_decay=section.weight_decay, decayed=_KERNELS),
                learning_rate=learning_rate,
                betas=section.betas,
            )


def parameter_groups(module: Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Group a module's trained parameters as the official LARS treats them in pretraining.

    Weights of convolutions and dense layers, which have two axes or more, decay and adapt; biases
    and the scales of normalisations do neither.

    Args:
        module: any, such as an encoder with its projection head.
        weight_decay: added to the gradient in every update, times the weights.

    Returns:
        Groups for `LARS`; for another optimizer drop their `adapt`.

    Source: google-research/simclr model_util.py (`get_optimizer`).
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    kinds: dict[str, ParameterKind] = {
        name: "kernel" if parameter.ndim > 1 else "bias" for name, parameter in parameters.items()
    }
    return _groups(parameters, kinds, weight_decay=weight_decay, decayed=_KERNELS, adapted=_KERNELS)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Give every group this rate for its next update.

    A rate that is a tensor is filled, so that a captured update reads the new one.
    """
    filled: dict[int, Tensor] = {}
    for group in optimizer.param_groups:
        rate = group["lr"]
        if not isinstance(rate, Tensor):
            group["lr"] = learning_rate
        elif id(rate) not in filled:
            filled[id(rate)] = rate.fill_(learning_rate)


def optimizer_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors by name, as `momentum/layer1.0.conv1.weight`.

    The tensors are the optimizer's own, not copies.
    """
    return {
        f"{key}/{name}": value
        for name, parameter in _named(optimizer)
        for key, value in sorted(optimizer.state[parameter].items())
    }


def load_optimizer_state(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into the optimizer; nothing is changed unless all of them fit.

    Raises:
        CheckpointError: If a tensor is missing, unknown, or of another shape or type.
    """
    copy_tensors(optimizer_state(optimizer), tensors, what="optimizer state")


def _groups(
    parameters: Mapping[str, Parameter],
    kinds: Mapping[str, ParameterKind],
    *,
    weight_decay: float,
    decayed: frozenset[str],
    adapted: frozenset[str] = frozenset(),
) -> list[dict[str, Any]]:
    """Return parameters grouped by whether their kind decays and adapts, in order of names."""
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        decays, adapts = kinds[name] in decayed, kinds[name] in adapted
        group = groups.setdefault(
            (decays, adapts),
            {
                "params": [],
                "names": [],
                "weight_decay": weight_decay if decays else 0.0,
                "adapt": adapts,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _named(optimizer: Optimizer) -> Iterator[tuple[str, Parameter]]:
    """Yield every parameter with its name."""
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)

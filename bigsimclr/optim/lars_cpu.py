"""LARS on a CPU: memory is read once for the norms and passed once to move.

A CPU's optimizer is as slow as its memory. So the norms come from three dot products, the later of
which find a piece of weights and gradients in the caches; and the updates, fused, come after all of
them, the last first, and begin with the piece that was read last.
"""

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, _fused_sgd_

Piece = tuple[Tensor, Tensor, Tensor]
"""Weights, gradients and momenta [n] of a part of a parameter, each without gaps."""

# For each thread: 1 MB of weights and gradients, half of a recent core's second cache.
ELEMENTS: Final = 2**17
# dot sums in the type of its factors, for which anything below float32 is too coarse.
TYPES: Final = frozenset({torch.float32, torch.float64})
# Norms of weights of up to so many elements are taken in float64, at hardly any cost. In several
# pieces of larger ones rounding averages out; in one dot product all of it is the ratio's.
_SMALL: Final = 2**16
# Gradient and decay may cancel. Where less than this share of their squares is left, rounding of
# the three products shows in it, and the sum is taken from the decayed gradient itself.
_CANCELLED: Final = 1e-2


def adapt(
    parameters: Sequence[Sequence[Piece]],
    rate: float,
    *,
    weight_decay: float,
    momentum: float,
    trust_coefficient: float,
) -> None:
    """Update parameters in place, each at its own rate.

    Args:
        parameters: pieces of each.
        rate: of all; times the trust ratio it is that of one.
        weight_decay: as the optimizer's.
        momentum: as the optimizer's.
        trust_coefficient: as the optimizer's.
    """
    factors = [rate * trust_ratio(pieces, weight_decay, trust_coefficient) for pieces in parameters]
    for pieces, factor in zip(reversed(parameters), reversed(factors), strict=True):
        move(pieces, factor, weight_decay=weight_decay, momentum=momentum)


def trust_ratio(pieces: Sequence[Piece], weight_decay: float, trust_coefficient: float) -> float:
    """Return trust_coefficient * |weights| / |gradient + weight_decay * weights|, or 1.

    Args:
        pieces: of one parameter.
        weight_decay: as the optimizer's.
        trust_coefficient: dimensionless.

    Returns:
        1 where either norm is 0 or not a number.
    """
    if sum(weight.numel() for weight, _, _ in pieces) <= _SMALL:
        pieces = [
            (weight.double(), gradient.double(), buffer) for weight, gradient, buffer in pieces
        ]
    mixed = weights = gradients = 0.0
    for weight, gradient, _ in pieces:
        weights += float(torch.dot(weight, weight))
        mixed += float(torch.dot(weight, gradient))
        gradients += float(torch.dot(gradient, gradient))
    slopes = gradients + weight_decay * (2.0 * mixed + weight_decay * weights)
    if slopes < _CANCELLED * (gradients + weight_decay**2 * weights):
        slopes = 0.0
        for weight, gradient, _ in pieces:
            slope = torch.add(gradient, weight, alpha=weight_decay)
            slopes += float(torch.dot(slope, slope))
    if weights > 0.0 and slopes > 0.0:
        return trust_coefficient * math.sqrt(weights / slopes)
    return 1.0


def move(pieces: Sequence[Piece], factor: float, *, weight_decay: float, momentum: float) -> None:
    """Update parameters in place, all at one rate, the last piece first.

    PyTorch's SGD scales the decayed gradient by 1 - dampening before it joins the momentum.

    Args:
        pieces: of any parameters; nothing happens without one.
        factor: rate times trust ratio.
        weight_decay: times the weights joins the gradient.
        momentum: share of the previous update that is kept.
    """
    if not pieces:
        return
    weights, gradients, momenta = zip(*reversed(pieces), strict=True)
    _fused_sgd_(
        weights,
        gradients,
        momenta,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=1.0,
        dampening=1.0 - factor,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )

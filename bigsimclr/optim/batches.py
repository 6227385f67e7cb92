"""An optimizer's tensors in batches whose intermediate results stay small.

On a CPU a batch stays in the caches while operation after operation passes over it, and memory is
read once for all of them. On a GPU a batch bounds the memory that intermediate results take.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

# For each thread: 1 MB of three tensors and a result, half of a recent core's second cache. Half as
# much costs 10% of an update, as operations on small pieces do not pay for their calls.
_CPU_ELEMENTS: Final = 2**16
_GPU_ELEMENTS: Final = 2**26


@dataclass(frozen=True)
class Batch:
    """Parameters, or pieces of them, with their gradients and momenta."""

    owners: list[int] = field(default_factory=list)  # number of the parameter of each
    weights: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    momenta: list[Tensor] = field(default_factory=list)


def in_batches(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], momenta: Sequence[Tensor]
) -> list[Batch]:
    """Put parameters into batches in their order, on a CPU those that are large in pieces.

    Args:
        weights: of any shapes, on one device.
        gradients: one for each weight, of its shape and type.
        momenta: one for each weight, of its shape and type.
    """
    on_cpu = weights[0].device.type == "cpu"
    most = _CPU_ELEMENTS * torch.get_num_threads() if on_cpu else _GPU_ELEMENTS
    batches: list[Batch] = []
    held = 0
    for owner, tensors in enumerate(zip(weights, gradients, momenta, strict=True)):
        pieces = flat_pieces(tensors, most) if on_cpu else []
        for weight, gradient, momentum in pieces or [tensors]:
            held += weight.numel()
            if not batches or held > most:
                batches.append(Batch())
                held = weight.numel()
            batch = batches[-1]
            batch.owners.append(owner)
            batch.weights.append(weight)
            batch.gradients.append(gradient)
            batch.momenta.append(momentum)
    return batches


def flat_pieces(
    tensors: tuple[Tensor, Tensor, Tensor], most: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Cut tensors in the order of their memory, if that is the same in all; else return nothing.

    Args:
        tensors: of one shape.
        most: elements in a piece.

    Returns:
        Views [n] without gaps, or what has one dimension itself.
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        flat = [tensor if tensor.ndim == 1 else tensor.view(-1) for tensor in tensors]
    elif all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors):
        flat = [tensor.permute(0, 2, 3, 1).view(-1) for tensor in tensors]
    else:
        return []
    first, second, third = flat
    if first.numel() <= most:  # as most of a network's: cutting takes as long as their update
        return [(first, second, third)]
    return list(zip(first.split(most), second.split(most), third.split(most), strict=True))

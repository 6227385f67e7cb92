"""A run's tensors by name, and saved ones back onto them."""

from collections.abc import Mapping

import torch
from torch import Size, Tensor, nn

from bigsimclr.errors import CheckpointError


@torch.no_grad()
def copy_tensors(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, what: str) -> None:
    """Copy saved tensors onto existing ones; nothing is changed unless all of them fit.

    Args:
        own: the tensors to overwrite.
        saved: as many, of the same names, shapes and types.
        what: names the tensors in an error.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape or type.
    """
    check_tensors({name: (t.shape, t.dtype) for name, t in own.items()}, saved, what=what)
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def check_tensors(
    wanted: Mapping[str, tuple[Size, torch.dtype]], saved: Mapping[str, Tensor], *, what: str
) -> None:
    """Refuse saved tensors that do not fit.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape or type.
    """
    missing, unknown = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{what} does not fit this run: {len(missing)} missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}"
        )
    for name, (shape, dtype) in wanted.items():
        tensor = saved[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise CheckpointError(
                f"{what}: {name} is {tensor.dtype} {tuple(tensor.shape)}, this run needs "
                f"{dtype} {tuple(shape)}"
            )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, as checkpoints hold them; not copies."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}

"""Batch norm with the official running variance.

Shapes: N images, C channels, H x W positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

EPSILON: Final = 1e-5
MOMENTUM: Final = 0.1
"""Weight of the new batch in the running statistics: one minus the official decay of 0.9."""


class BatchNorm(nn.Module):
    """Normalise each channel over the batch, and keep running statistics for evaluation.

    As `torch.nn.BatchNorm2d`, but the running variance takes the *biased* batch variance, which
    divides by the number of values n. PyTorch divides by n - 1 there, which at n = 2 doubles it.

    Source: google-research/simclr resnet.py BatchNormRelu (fused=False), tf2/resnet.py.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, has_bias: bool = True, zero_scale: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.moves_running_statistics = True
        scale = torch.zeros(channels) if zero_scale else torch.ones(channels)
        self.weight = nn.Parameter(scale)
        self.bias = nn.Parameter(torch.zeros(channels)) if has_bias else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    @override
    def forward(
        self,
        inputs: Tensor,  # [N, C] or [N, C, H, W], any memory format
    ) -> Tensor:  # as inputs
        """Normalise with the batch's statistics in training mode, else with the running ones.

        Raises:
            ValueError: training mode with a single value per channel, which has no variance.
        """
        if not self.training:
            return F.batch_norm(
                inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=EPSILON
            )
        if not self.moves_running_statistics:
            return F.batch_norm(
                inputs, None, None, self.weight, self.bias, training=True, eps=EPSILON
            )
        # The kernel moves running_mean itself. The variance goes through a scratch tensor: it
        # comes out as MOMENTUM x unbiased variance, and the buffer that autograd saved for the
        # backward pass must not be changed in place after it.
        scratch = torch.zeros_like(self.running_var)
        outputs = F.batch_norm(
            inputs,
            self.running_mean,
            scratch,
            self.weight,
            self.bias,
            training=True,
            momentum=MOMENTUM,
            eps=EPSILON,
        )
        values = inputs.numel() // self.channels
        with torch.no_grad():
            self.running_var.mul_(1 - MOMENTUM).add_(scratch, alpha=(values - 1) / values)
        return outputs

    @override
    def extra_repr(self) -> str:
        return f"{self.channels}, has_bias={self.bias is not None}"


@contextmanager
def frozen_running_statistics(model: nn.Module) -> Iterator[None]:
    """Let every `BatchNorm` in `model` use batch statistics without moving the running ones.

    For forward passes that are repeated, so that each image counts once.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, BatchNorm) and module.moves_running_statistics
    ]
    for norm in norms:
        norm.moves_running_statistics = False
    try:
        yield
    finally:
        for norm in norms:
            norm.moves_running_statistics = True
